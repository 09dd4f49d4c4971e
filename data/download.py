"""Downloads that resume, are checked, and never leave half a file under its final name."""
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
    """The path in `folder` of the file at `url`, downloaded unless it is there already.

    url      may end in #sha256=HEX, the checksum that the file must have. Without it the one that
             the hub names counts; other servers name none, and only the size can be checked
    knob     the command-line knob that takes a local copy instead: for the messages
    timeout  seconds without a byte, after which a connection counts as stalled
    Until it is whole and checked, a file is called .part, and the next call goes on where it ends.
    From then on it is held against the checksum beside it, .sha256. Raises BadInput, one line.
    """
    url, _, expected = url.partition("#sha256=")
    if expected and not re.fullmatch("[0-9a-f]{64}", expected):
        raise BadInput(f"#sha256={expected} is no checksum: give 64 digits of 0-9 and a-f")
    name = re.sub(r"[^\w.-]", "_", url.partition("?")[0].rpartition("/")[2])
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"   # two hosts may share a name
    path, part, record = (Path(folder) / (name + end) for end in ("", ".part", ".sha256"))
    ways_out = f"run again (it resumes); no network? give --{knob}=PATH to a local copy"
    try:
        if path.exists():
            expected = expected or (record.read_text() if record.exists() else "")
            if expected not in ("", sha256(path)):
                raise BadInput(f"{path} does not have the SHA-256 it should: delete it to download "
                               f"{url} again, or give --{knob}=PATH to a local copy")
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        expected = fetch(url, part, expected, ways_out, timeout, tries)
        arrived = sha256(part)
        if expected not in ("", arrived):
            part.unlink()
            raise BadInput(f"{url} gave a wrong or damaged file, thrown away: its SHA-256 is "
                           f"{arrived}, not {expected}; {ways_out}")
        record.write_text(arrived)
        os.replace(part, path)
        return path
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from None


def fetch(url, part, expected, ways_out, timeout, tries):
    """Fills the file `part` with all that `url` holds; returns the SHA-256 it should have or ""."""
    redirects = Redirects()
    opener = urllib.request.build_opener(redirects)
    for attempt in range(tries):
        have = part.stat().st_size if part.exists() else 0
        headers = {"User-Agent": "nanoUnlearn"} | ({"Range": f"bytes={have}-"} if have else {})
        try:
            answer = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
        except (OSError, HTTPException, ValueError) as error:
            if getattr(error, "code", None) != 416:        # 416: no bytes there. Are ours all?
                why = error if hasattr(error, "code") else getattr(error, "reason", error)
                raise BadInput(f"cannot download {url}: {why}; {ways_out}") from None
            answer = error
        with answer:
            expected = expected or redirects.sha256
            start, total = extent(answer)
            # Start over unless these are the bytes after ours, and unless a checksum will tell
            # whether what an earlier run left us belongs to the same file.
            if start not in (0, have) or (start and not expected and not attempt):
                part.unlink(missing_ok=True)
                cut = "the server sends other bytes than it is asked for"
                continue
            cut = None if answer.status == 416 else receive(answer, part, start, total)
        if part.stat().st_size == total or (total is None and not cut):
            return expected
    raise BadInput(f"cannot download {url}: {cut or 'the connection closed early'}, {tries} times; "
                   f"{ways_out}")


def extent(answer):
    """(first, total): where in the file an answer's body begins, how long the file is.

    None, None when it is a part, but does not say which; total is None when the length is unknown.
    """
    if answer.status in (206, 416):
        said = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", answer.headers["Content-Range"] or "")
        return (int(said[1] or said[2]), int(said[2])) if said else (None, None)
    length = answer.headers["Content-Length"]
    return 0, int(length) if length else None


def receive(answer, part, start, total):
    """Writes an answer's body to `part` from byte `start` on; returns what error cut it short."""
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
    """Follows redirects and notes a large file's SHA-256, which the Hugging Face hub names in its
    first answer only, in the header X-Linked-ETag, before it points to the storage of the file."""
    sha256 = ""

    def redirect_request(self, request, body, code, message, headers, url):
        if said := re.fullmatch(r'"([0-9a-f]{64})"', headers.get("X-Linked-ETag", "")):
            self.sha256 = said[1]
        return super().redirect_request(request, body, code, message, headers, url)
