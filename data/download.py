"""Downloads files. A download resumes and is checked; only a complete file gets its final name."""
import hashlib
import os
import re
import urllib.request
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from engine.disk import sha256
from engine.knobs import BadInput


def download(url, folder, knob="source", timeout=30, tries=5):
    """The path in `folder` of the file at `url`, which is downloaded unless it is there already.

    url      may end in #sha256=HEX, the checksum that the file must have. Without it, we use the
             checksum that the Hugging Face hub gives. Other servers give none, so that only the
             size can be checked
    knob     the command-line knob that takes a local copy instead, for the messages
    timeout  seconds without a byte after which a connection counts as stalled

    An incomplete file is called .part, and the next call continues it. A complete file is checked
    in every call against the checksum in the .sha256 file beside it. Raises BadInput, one line.
    """
    url, _, expected = url.partition("#sha256=")
    if expected and not re.fullmatch("[0-9a-f]{64}", expected):
        raise BadInput(f"#sha256={expected} is not a checksum: give 64 digits of 0-9 and a-f")
    name = re.sub(r"[^\w.-]", "_", url.partition("?")[0].rpartition("/")[2])
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"   # two hosts may share a name
    path, part, record = (Path(folder) / (name + end) for end in ("", ".part", ".sha256"))
    ways_out = f"run again (it resumes); no network? give --{knob}=PATH to a local copy"
    try:
        if path.exists():
            expected = expected or (record.read_text() if record.exists() else "")
            if expected not in ("", sha256(path)):
                raise BadInput(f"{path} does not have the right SHA-256: delete it to download "
                               f"{url} again, or give --{knob}=PATH to a local copy")
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        expected = fetch(url, part, expected, ways_out, timeout, tries)
        arrived = sha256(part)
        if expected not in ("", arrived):
            part.unlink()
            raise BadInput(f"{url} gave a wrong or damaged file, which was deleted: its SHA-256 "
                           f"is {arrived}, not {expected}; {ways_out}")
        record.write_text(arrived)
        os.replace(part, path)
        return path
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from None


def fetch(url, part, expected, ways_out, timeout, tries):
    """Fills the file `part` with the content of `url`. Returns the SHA-256 it should have, or "".
    """
    redirects = Redirects()
    opener = urllib.request.build_opener(redirects)
    for attempt in range(tries):
        have = part.stat().st_size if part.exists() else 0
        headers = {"User-Agent": "nanoUnlearn"} | ({"Range": f"bytes={have}-"} if have else {})
        try:
            answer = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
        except (OSError, HTTPException, ValueError) as error:
            if getattr(error, "code", None) != 416:        # 416: no more bytes; maybe we have all
                why = error if hasattr(error, "code") else getattr(error, "reason", error)
                raise BadInput(f"cannot download {url}: {why}; {ways_out}") from None
            answer = error
        with answer:
            expected = expected or redirects.sha256
            start, total = extent(answer)
            # Start over if these bytes do not follow ours. Also start over if ours are from an
            # earlier run and no checksum can show that they belong to the same file.
            if start not in (0, have) or (start and not expected and not attempt):
                part.unlink(missing_ok=True)
                cut = "the server sends other bytes than those we asked for"
                continue
            cut = None if answer.status == 416 else receive(answer, part, start, total)
        if part.stat().st_size == total or (total is None and not cut):
            return expected
    raise BadInput(f"cannot download {url}: {cut or 'the connection closed early'}, {tries} times; "
                   f"{ways_out}")


def extent(answer):
    """(first, total): the byte of the file at which an answer's body begins, the file's length.

    Both are None if the answer is a part that does not say which. total is None if it is unknown.
    """
    if answer.status in (206, 416):
        said = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", answer.headers["Content-Range"] or "")
        return (int(said[1] or said[2]), int(said[2])) if said else (None, None)
    length = answer.headers["Content-Length"]
    return 0, int(length) if length else None


def receive(answer, part, start, total):
    """Writes an answer's body to `part` from byte `start` on. Returns the error that ended it, or
    None."""
    with (open(part, "ab" if start else "wb") as f, tqdm(
            total=total, initial=start, desc=part.stem, unit="B", unit_scale=True) as bar):
        while True:
            try:
                chunk = answer.read1(1 << 16)
            except (OSError, HTTPException) as error:
                return error
            if not chunk:
                return None
            f.write(chunk)
            bar.update(len(chunk))


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and remembers a large file's SHA-256. The Hugging Face hub gives it only in
    its first answer, which redirects to the file's storage, in the header X-Linked-ETag."""
    sha256 = ""

    def redirect_request(self, request, body, code, message, headers, url):
        if said := re.fullmatch(r'"([0-9a-f]{64})"', headers.get("X-Linked-ETag", "")):
            self.sha256 = said[1]
        return super().redirect_request(request, body, code, message, headers, url)
