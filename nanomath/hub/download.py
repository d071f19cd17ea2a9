"""Download a model or a data set: the only code of this project that opens a connection.

    python -m nanomath.hub.download gsm8k --to data        # gsm8k_train.jsonl, gsm8k_test.jsonl
    python -m nanomath.hub.download math --to data         # math_test.jsonl
    python -m nanomath.hub.download Qwen/Qwen2.5-0.5B --to models/qwen --revision main

The same command continues a download that was cut, and does nothing where all is there. A file gets
its name only when its checksum is right. Of a model only the safetensors and JSON files at the top
of its repository are taken, all of one commit: no pickles, no programs. huggingface_hub (extra
[hub]) lists them, knows HF_ENDPOINT and the user's token; it does not load them, because it starts
a cut file anew and compares no checksums. Data: NANOMATH_MIRROR, a URL, takes the place of
https://raw.githubusercontent.com.
"""

import argparse
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from tqdm import tqdm

from nanomath.base.config import one_line_errors
from nanomath.base.log import progress

TIMEOUT_S = 30  # without a byte
MAX_FAILURES = 4  # in a row, none of which brought a megabyte
WAIT_S = 0.5  # before the first further try; doubles
CHUNK = 1 << 20
RETRIED = (408, 429, 500, 502, 503, 504)
HINTS = {
    401: "; a gated model needs `hf auth login` or HF_TOKEN",
    403: "; access is refused: a gated model's page says how to get it",
    404: "; it is not there (any more)",
}


@dataclass(frozen=True)
class RemoteFile:
    """What to load and how to know it: digest is sha256, or (40 digits) git's name of a blob."""

    name: str
    url: str
    size: int
    digest: str
    headers: Mapping[str, str] = field(default_factory=dict)


_GITHUB = "https://raw.githubusercontent.com"
_GSM8K = "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
_TORA = "microsoft/ToRA/main/src/data"  # MATH: the test set; the authors' own server is gone
DATA = {  # name: file, where on GitHub, bytes, sha256
    "gsm8k": (
        ("gsm8k_train.jsonl", f"{_GSM8K}/train.jsonl", 4_166_206,
         "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
        ("gsm8k_test.jsonl", f"{_GSM8K}/test.jsonl", 749_738,
         "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    ),
    "math": (
        ("math_test.jsonl", f"{_TORA}/math/test.jsonl", 4_101_364,
         "3371949f33dd702d04b43fddd7d53a028de0aaca0e76abb1b875a050297b3aa4"),
    ),
}  # fmt: skip


def data_files(name: str) -> list[RemoteFile]:
    """Return the files of a data set, at NANOMATH_MIRROR if that is set."""
    mirror = os.environ.get("NANOMATH_MIRROR", _GITHUB).rstrip("/")
    if urlsplit(mirror).scheme not in ("http", "https"):
        raise ValueError(f"NANOMATH_MIRROR={mirror}: wanted a URL, https://...")
    return [RemoteFile(file, f"{mirror}/{where}", *known) for file, where, *known in DATA[name]]


def model_files(name: str, revision: str) -> tuple[list[RemoteFile], str]:
    """Return the safetensors and JSON files of a model on the hub, and the commit they are of.

    Raises ValueError for a name that is none, a repository without safetensors, and what the hub
    answers; also without huggingface_hub.
    """
    part = r"[A-Za-z0-9][A-Za-z0-9._-]*"
    if not re.fullmatch(f"{part}/{part}", name):
        raise ValueError(f"{name}: a model is OWNER/NAME; data sets are {', '.join(DATA)}")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # no request but for the list
    try:
        from huggingface_hub import HfApi, get_token, hf_hub_url
    except ImportError:
        raise ValueError(
            "loading models needs huggingface_hub: pip install -e .[hub] -c constraints.txt"
        ) from None
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
    except Exception as error:  # of whichever HTTP package this version of it is built on
        first_line = next(filter(None, map(str.strip, str(error).split("\n"))), "")
        raise ValueError(
            f"{name} at {revision}: the hub does not list it ({type(error).__name__}: "
            f"{first_line}); see that the name and the network are right{HINTS[401]}"
        ) from None
    headers = {"Authorization": f"Bearer {token}"} if (token := get_token()) else {}
    files = []
    for file in info.siblings or ():
        if re.fullmatch(rf"{part}\.(safetensors|json)", file.rfilename):
            url = hf_hub_url(name, file.rfilename, revision=info.sha)
            digest = file.lfs.sha256 if file.lfs else file.blob_id
            files.append(RemoteFile(file.rfilename, url, file.size, digest, headers))
    if not any(file.name.endswith(".safetensors") for file in files):
        raise ValueError(
            f"{name} at {revision} holds no .safetensors file, and no other kind is read; some "
            "models have them under another revision, such as --revision refs/pr/1"
        )
    return sorted(files, key=lambda file: file.size), info.sha


def fetch_all(files: Sequence[RemoteFile], folder: Path) -> None:
    """Load files into folder, those apart that are there. Raises ValueError, OSError: see fetch."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for file in files:
        path = folder / file.name
        if not path.exists():
            missing.append(file)
        elif _digest(path, file) != file.digest:
            raise ValueError(f"{path} is another file; remove it, or give another --to")
    needed = sum(file.size - _size(part_of(folder, file)) for file in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")
    total = sum(file.size for file in missing)
    with progress(total=total, desc="download", unit="B", unit_scale=True) as bar:
        for file in missing:
            fetch(file, folder, bar)


def part_of(folder: Path, file: RemoteFile) -> Path:
    """Return where a file is until it is whole; another version of it has another place."""
    return folder / f".{file.name}.{file.digest[:12]}.part"


def fetch(file: RemoteFile, folder: Path, bar: tqdm) -> None:
    """Load one file, from where an earlier attempt stopped; try again where the connection fails.

    Raises ValueError if what comes is not the file (nothing is kept of it) or the server refuses,
    OSError if the connection keeps failing or the disk is full (what came is kept).
    """
    part = part_of(folder, file)
    with open(part, "ab", buffering=0) as target:  # so tell() is what is kept, on a full disk too
        try:  # another process would go on writing into the file after it got its name
            fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{part} is being loaded by another process") from None
        try:
            bar.update(min(target.tell(), file.size))
            _receive_all(file, target, bar)
            os.fsync(target.fileno())
            found = _digest(part, file)
            if found != file.digest:
                raise ValueError(
                    f"{file.url}: the checksum is {found}, not {file.digest}: another file is "
                    "there now, or it was damaged on the way; nothing of it was kept"
                )
        except BaseException as error:
            if isinstance(error, ValueError) or target.tell() == 0:
                part.unlink()
            raise
        os.replace(part, folder / file.name)


def _receive_all(file: RemoteFile, target: BinaryIO, bar: tqdm) -> None:
    failures = 0
    while (start := target.tell()) < file.size:
        problem: object = "the server closed the connection"
        try:
            _receive(file, target, bar)
        except urllib.error.HTTPError as error:
            error.close()
            problem = f"HTTP status {error.code}"
            if error.code not in RETRIED:
                raise OSError(f"{file.url}: {problem}{HINTS.get(error.code, '')}") from None
        except (OSError, http.client.HTTPException) as error:
            problem = error
        if target.tell() >= file.size:
            return
        failures = 0 if target.tell() - start >= CHUNK else failures + 1
        if failures == MAX_FAILURES:
            raise OSError(
                f"{file.url}: {problem}; {target.tell()} of {file.size} bytes are kept, and the "
                "same command continues"
            )
        time.sleep(WAIT_S * 2**failures)


def _receive(file: RemoteFile, target: BinaryIO, bar: tqdm) -> None:
    """Append what one request brings."""
    start = target.tell()
    request = urllib.request.Request(file.url, headers={"User-Agent": "nanomath"})
    for name, value in file.headers.items():
        request.add_unredirected_header(name, value)
    if start:
        request.add_header("Range", f"bytes={start}-")
    opener = urllib.request.build_opener(_Redirects)
    with opener.open(request, timeout=TIMEOUT_S) as response:
        if start and response.status == 200:  # the server knows no ranges: all of it comes again
            target.truncate(0)
            bar.update(-start)
        elif start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise ValueError(f"{file.url}: the server sent another range than bytes {start}-")
        while chunk := response.read1(CHUNK):
            if target.tell() + len(chunk) > file.size:
                raise ValueError(f"{file.url}: more than its {file.size} bytes came")
            bar.update(len(chunk))
            while chunk:
                chunk = chunk[target.write(chunk) :]


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, but never from https to less; a token stays with its host."""

    def redirect_request(self, request, response, code, message, headers, url):
        here, there = urlsplit(request.full_url), urlsplit(url)
        if there.scheme not in ("https", here.scheme):
            raise ValueError(f"{request.full_url}: redirected to {url}, which is not https")
        new = super().redirect_request(request, response, code, message, headers, url)
        if new is not None and here[:2] == there[:2] and request.has_header("Authorization"):
            new.add_unredirected_header("Authorization", request.get_header("Authorization"))
        return new


def _digest(path: Path, file: RemoteFile) -> str:
    is_git = len(file.digest) == 40
    digest = hashlib.sha1(b"blob %d\0" % _size(path)) if is_git else hashlib.sha256()
    with open(path, "rb") as source:
        return hashlib.file_digest(source, lambda: digest).hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nanomath.hub.download",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="MODEL_OR_DATA", help=f"OWNER/NAME, or {', '.join(DATA)}")
    parser.add_argument("--to", metavar="DIR", help="folder [data, or models/NAME]")
    parser.add_argument("--revision", default="main", help="a model's branch, tag or commit [main]")
    args = parser.parse_args(argv)
    with one_line_errors():
        if args.name in DATA:
            files, folder, source = data_files(args.name), "data", args.name
        else:
            files, commit = model_files(args.name, args.revision)
            folder, source = f"models/{args.name.split('/')[1]}", f"{args.name}, commit {commit}"
        folder = Path(args.to or folder)
        fetch_all(files, folder)
        print(f"{folder}: {', '.join(file.name for file in files)} ({source})")


if __name__ == "__main__":
    main()
