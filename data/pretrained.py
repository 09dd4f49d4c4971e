from pathlib import Path


def is_pretrained(name):
    return name.endswith(".gguf") or Path(name).is_dir()
