"""Download a model or a data set: the only code of this project that opens a connection.

    python -m nanomath.hub.download gsm8k --to data        # gsm8k_train.jsonl, gsm8k_test.jsonl
    python -m nanomath.hub.download math --to data         # math_test.jsonl
    python -m nanomath.hub.download Qwen/Qwen2.5-0.5B --to models/qwen --revision main

The same command continues a download that was cut, and does nothing where all is there. Of a model
only the safetensors and JSON files at the top of its repository, and its chat template as text, are
taken, all of one commit: no pickles, no programs. huggingface_hub (extra [hub]) loads them; it
knows HF_ENDPOINT and the user's token. A data set is loaded whole and gets its name only when its
checksum is right; NANOMATH_MIRROR, a URL, takes the place of https://raw.githubusercontent.com.
"""

import argparse
import hashlib
import http.client
import os
import re
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from nanomath.base.config import one_line_errors
from nanomath.base.files import file_sha256, write_text

TIMEOUT_S = 30  # without a byte
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_TAKEN = rf"{_PART}\.(safetensors|json)|chat_template\.jinja"

_GITHUB = "https://raw.githubusercontent.com"
_GSM8K = "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
_TORA = "microsoft/ToRA/main/src/data"  # MATH: the test set; the authors' own server is gone
DATA = {  # name: file, where on GitHub, sha256
    "gsm8k": (
        ("gsm8k_train.jsonl", f"{_GSM8K}/train.jsonl",
         "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
        ("gsm8k_test.jsonl", f"{_GSM8K}/test.jsonl",
         "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    ),
    "math": (
        ("math_test.jsonl", f"{_TORA}/math/test.jsonl",
         "3371949f33dd702d04b43fddd7d53a028de0aaca0e76abb1b875a050297b3aa4"),
    ),
}  # fmt: skip


def fetch_data(name: str, folder: Path) -> list[str]:
    """Load a data set's files, those apart that are there, and return their names.

    Raises ValueError for a file that is not the one wanted, OSError if the connection fails.
    """
    mirror = os.environ.get("NANOMATH_MIRROR", _GITHUB).rstrip("/")
    if not mirror.startswith(("https://", "http://")):
        raise ValueError(f"NANOMATH_MIRROR={mirror}: wanted a URL, https://...")
    folder.mkdir(parents=True, exist_ok=True)
    for file, where, wanted in DATA[name]:
        path, url = folder / file, f"{mirror}/{where}"
        if path.exists():
            if file_sha256(path) != wanted:
                raise ValueError(f"{path} is another file; remove it, or give another --to")
            continue
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
                body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"{url}: {error}; the same command tries again") from None
        found = hashlib.sha256(body).hexdigest()
        if found != wanted:
            raise ValueError(
                f"{url}: the checksum is {found}, not {wanted}: another file is there now, or it "
                "was damaged on the way; nothing of it was kept"
            )
        write_text(path, body.decode())
    return [file for file, *_ in DATA[name]]


def fetch_model(name: str, revision: str, folder: Path) -> tuple[list[str], str]:
    """Load a model's files from the hub and return their names and the commit they are of.

    Raises ValueError for a repository without safetensors, for what the hub answers, and without
    huggingface_hub.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        raise ValueError(
            "loading models needs huggingface_hub: pip install -e '.[hub]' -c constraints.txt"
        ) from None
    try:
        # snapshot_download alone would take what lies in the folder where there is no network
        info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT_S)
        found = (file.rfilename for file in info.siblings or ())
        files = sorted(file for file in found if re.fullmatch(_TAKEN, file))
        if any(file.endswith(".safetensors") for file in files):
            snapshot_download(name, revision=info.sha, local_dir=folder, allow_patterns=files)
            return files, info.sha
    except Exception as error:  # of whichever HTTP package this version of it is built on
        first_line = next(filter(None, map(str.strip, str(error).split("\n"))), "")
        raise ValueError(
            f"{name} at {revision}: the hub does not give it ({type(error).__name__}: "
            f"{first_line}); see that the name and the network are right; a gated model needs "
            "`hf auth login` or HF_TOKEN; the same command continues"
        ) from None
    raise ValueError(
        f"{name} at {revision} holds no .safetensors file, and no other kind is read; some "
        "models have them under another revision, such as --revision refs/pr/1"
    )


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
            folder = Path(args.to or "data")
            files, source = fetch_data(args.name, folder), args.name
        elif re.fullmatch(f"{_PART}/{_PART}", args.name):
            folder = Path(args.to or f"models/{args.name.split('/')[1]}")
            files, commit = fetch_model(args.name, args.revision, folder)
            source = f"{args.name}, commit {commit}"
        else:
            raise ValueError(f"{args.name}: a model is OWNER/NAME; data sets are {', '.join(DATA)}")
        print(f"{folder}: {', '.join(files)} ({source})")


if __name__ == "__main__":
    main()
