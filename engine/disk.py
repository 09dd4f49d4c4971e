"""Files that are either complete or missing, and folders that only one run writes at a time."""
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
except ImportError:              # on Windows, two runs in one folder are not noticed
    fcntl = None

OURS = ".nanounlearn.tmp"        # the end of the names of files that are being written
SEAL = b"sha256:"                # a sealed file is its content, then SEAL, then the digest


def write(path, content):
    """Writes bytes, an iterable of them, or what content(f) writes to f, to a file, all or nothing.
    For this, it writes and flushes a temporary file beside it and then renames that. If this fails,
    for example on a full disk, raises BadInput and keeps the old file.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}{OURS}")
    try:
        with open(partial, "wb") as f:
            if callable(content):
                content(f)
            else:
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
    """Flushes a folder's list of files to disk. Otherwise a power cut may undo a rename but not a
    later change."""
    if fcntl:
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def remove_leftovers(folder):
    """Removes the temporary files of write() that a killed run left in a folder. Call it only while
    this run has the folder locked. Other files, whatever their names, are not removed."""
    for partial in Path(folder).glob(f"**/*{OURS}"):
        if partial.is_file():
            partial.unlink()


def sha256(path):
    """Hex digest of a file, or "" if the file is missing."""
    if not Path(path).exists():
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


RACY = 2 * 10**9             # nanoseconds; a file this new may change again with the same time


def fingerprint(path, last=None, knob="source"):
    """{"sha256", "size", "modified", "seen"} (times in ns) of a regular file; of a folder, if it
    is a pretrained model, those of its files together.

    last   an earlier fingerprint. The content is not read again if size and time of change are the
           same, and if the change was more than RACY before that fingerprint
    """
    try:
        files = [path]
        if knob == "model" and path.is_dir():
            files = sorted(f for f in path.iterdir() if f.suffix in (".json", ".safetensors"))
        about = [file.stat() for file in files]
        # a pipe, <(zcat ..), is read only once
        if not all(stat.S_ISREG(a.st_mode) for a in about):
            raise BadInput(f"cannot read {path}: --{knob} needs a regular file or a URL")
        size, modified = (sum(a.st_size for a in about),
                          max((a.st_mtime_ns for a in about), default=0))
        if last and (size, modified) == (last["size"], last["modified"]) and (
                last["seen"] > last["modified"] + RACY):
            return last
        found = [sha256(file) for file in files]
        return {"seen": time.time_ns(), "sha256": found[0] if len(found) == 1 else digest(found),
                "size": size, "modified": modified}
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None


class Hashed:
    """A file for torch.save that also hashes what it gets: nothing is in memory twice. It keeps
    the error of a write that fails, in place of which torch raises one of its own."""

    def __init__(self, f):
        self.f, self.sha256, self.error = f, hashlib.sha256(), None

    def write(self, some):
        self.sha256.update(some)
        try:
            return self.f.write(some)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.f.flush()


def write_sealed(path, content):
    """Writes a dict of tensors and plain values by torch.save, with its digest at the end."""
    def save(f):
        hashed = Hashed(f)
        try:
            torch.save(content, hashed)
        except Exception as error:
            raise hashed.error or error from None
        f.write(SEAL + hashed.sha256.digest())

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write(path, save)


def read_sealed(path, device="cpu"):
    """The dict that write_sealed wrote. Raises ValueError, one line, if any byte has changed. A
    pickle that contains more than tensors and plain values is refused and not run.
    """
    content = memoryview(Path(path).read_bytes())                    # slices are no copies
    cut = len(content) - len(SEAL) - 32
    body, seal = content[:max(cut, 0)], content[max(cut, 0):]
    if not body or seal != SEAL + hashlib.sha256(body).digest():
        raise ValueError(f"{path} is damaged (its checksum does not fit): delete it to make it "
                         f"again")
    try:
        return torch.load(io.BytesIO(body), map_location=device, weights_only=True)
    except Exception as error:                    # other files may raise any exception
        raise ValueError(f"{path} is not a file of this project ({type(error).__name__})") from None


def digest(content):
    """Hex SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def lock(folder, wait=False):
    """Locks a folder for this process and returns an open file descriptor, which holds the lock. If
    another run has the folder, waits or raises BadInput. The lock ends with the process, however
    the process ends."""
    if not fcntl:
        return None
    taken = os.open(folder, os.O_RDONLY)                  # locks the folder itself: no lock file
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
    """Locks a folder for this process until the `with` ends."""
    taken = lock(folder, wait)
    try:
        yield
    finally:
        if taken is not None:
            os.close(taken)


TAKEN = {}                       # {path: lock}: folders that are locked until this process ends


def take(folder):
    """Locks a folder until this process ends, and removes what a killed run left in it."""
    if (folder := Path(folder).resolve()) not in TAKEN:
        TAKEN[folder] = lock(folder)
        remove_leftovers(folder)
