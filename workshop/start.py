# Run this cell first. It finds the project and installs what is missing.
# Away from a checkout (on Colab), say where the project is: the path or the https address of its
# archive (.zip or .tar.gz), or of its git repository (.git). On Colab, an empty PROJECT lets you
# upload the archive.
PROJECT = ""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path


def checkout():
    """The project's folder, around this notebook or unpacked beside it; None if there is none."""
    here = Path(globals().get("__file__", "notebook")).resolve()
    beside = Path("nanoUnlearn").resolve()
    return next((f for f in (*here.parents, beside, *beside.glob("*/"))
                 if (f / "workshop").is_dir() and (f / "model.py").exists()), None)


def fetch(project):
    """Clones the project, or unpacks its archive, to ./nanoUnlearn."""
    folder = Path("nanoUnlearn").resolve()
    if project.endswith(".git"):
        subprocess.run(["git", "clone", "--quiet", "--depth=1", project, folder], check=True)
        return
    if "://" in project:
        project = urllib.request.urlretrieve(project, project.rpartition("/")[2])[0]
    shutil.unpack_archive(project, folder)


def find():
    if root := checkout():
        return root
    project = PROJECT
    if not project and "google.colab" in sys.modules:
        from google.colab import files
        print("Choose the project's archive (.zip or .tar.gz):")
        project = next(iter(files.upload()), "")
    if project:
        fetch(project)
    if root := checkout():
        return root
    raise FileNotFoundError("This notebook does not lie in a checkout of nanoUnlearn" + (
        f", and {project} does not hold one" if project else ": set PROJECT, above"))


ROOT = find()
sys.path.insert(0, str(ROOT))
missing = [name for name in ("torch", "numpy", "tiktoken", "tqdm", "matplotlib")
           if not importlib.util.find_spec(name)]
if "torch" not in missing and tuple(
        map(int, importlib.metadata.version("torch").split(".")[:2])) < (2, 9):
    missing.append("a newer torch")
if missing and "ipykernel" in sys.modules:               # a script says by itself what it lacks
    print("installing", ", ".join(missing))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r",
                    ROOT / "requirements.txt", "matplotlib"], check=True)
    importlib.invalidate_caches()
