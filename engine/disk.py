"""Files that are whole or not there, and folders that one run writes at a time."""
import hashlib
import io
import json
import os
import stat
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from engine.knobs import BadInput

try:
    import fcntl
except ImportError:              # Windows: two runs at once in one folder are not noticed there
    fcntl = None

OURS = ".nanounlearn.tmp"        # ends the names of files that are being written
SEAL = b"sha256:"                # a sealed file is its content, then SEAL and the content's digest


def write(path, content):
    """Bytes, or an iterable of them, to a file, all or nothing: a temporary file beside it is
    flushed and then renamed. BadInput when that fails, on a full disk say: the old file stays.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}{OURS}")
    try:
        with open(partial, "wb") as f:
            f.writelines([content] if isinstance(content, bytes) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
        flush(path.parent)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}" + (
            "; the one there is untouched" if path.exists() else "")) from None
    finally:
        partial.unlink(missing_ok=True)


def flush(folder):
    """Has the system write down which files a folder holds: a rename may else be lost to a power
    cut while a later change is not."""
    if fcntl:
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def remove_leftovers(folder):
    """What write() had begun when a run was killed: for the one run that has the folder. Other
    files, whatever they are called, are not ours to remove."""
    for partial in Path(folder).glob(f"**/*{OURS}"):
        if partial.is_file():
            partial.unlink()


def sha256(path):
    """Hex digest of a file; empty for a missing one."""
    if not Path(path).exists():
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


RACY = 2 * 10**9             # nanoseconds: a file changed so lately may change again unseen


def fingerprint(path, last=None, knob="source"):
    """{"sha256", "size", "modified", "seen"} (times in ns) of a regular file.

    last   an earlier fingerprint: where size and time of change are still the same, and lay well
           before it was taken, the content is not read again
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):               # a pipe, <(zcat ..): it is read twice
            raise BadInput(f"cannot read {path}: --{knob} needs a regular file or a URL")
        if last and (about.st_size, about.st_mtime_ns) == (last["size"], last["modified"]) and (
                last["seen"] > last["modified"] + RACY):
            return last
        return {"seen": time.time_ns(), "sha256": sha256(path), "size": about.st_size,
                "modified": about.st_mtime_ns}
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None


def write_sealed(path, content):
    """A dict of tensors and plain values to a file, by torch.save, with its digest at the end."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    body = buffer.getvalue()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write(path, [body, SEAL, hashlib.sha256(body).digest()])


def read_sealed(path, device="cpu"):
    """What write_sealed wrote; ValueError, in one line, when any byte of it is another. Pickles
    that hold more than tensors and plain values are refused and not run.
    """
    content = Path(path).read_bytes()
    cut = len(content) - len(SEAL) - 32
    body, seal = content[:max(cut, 0)], content[max(cut, 0):]
    if not body or seal != SEAL + hashlib.sha256(body).digest():
        raise ValueError(f"{path} is damaged (its checksum does not fit): delete it to make it "
                         f"again")
    try:
        return torch.load(io.BytesIO(body), map_location=device, weights_only=True)
    except Exception as error:                    # what is no pickle of ours may raise anything
        raise ValueError(f"{path} is not a file of this project ({type(error).__name__})") from None


def digest(content):
    """SHA-256 of a dict's JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def lock(folder, wait=False):
    """Takes a folder for this process and returns the open file that stands for it: a second run
    that asks for the folder waits, or is refused (BadInput). A process that ends, in whatever way,
    takes nothing with it."""
    if not fcntl:
        return None
    taken = os.open(folder, os.O_RDONLY)                  # the folder itself: leaves no file
    try:
        fcntl.flock(taken, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            os.close(taken)
            raise BadInput(f"another run is at work in {folder}: wait for it, or choose another "
                           f"--out") from None
        print(f"waiting for another run that is at work in {folder}")
        fcntl.flock(taken, fcntl.LOCK_EX)
    except OSError:                                       # a file system without locks
        pass
    return taken


@contextmanager
def locked(folder, wait=False):
    """A folder that is this process's until the `with` ends."""
    taken = lock(folder, wait)
    try:
        yield
    finally:
        if taken is not None:
            os.close(taken)


TAKEN = {}                       # folders that this process writes in, until it ends: {path: lock}


def take(folder):
    """Takes a folder for as long as this process lives, and clears away what a killed run left."""
    if (folder := Path(folder).resolve()) not in TAKEN:
        TAKEN[folder] = lock(folder)
        remove_leftovers(folder)
