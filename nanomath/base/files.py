"""Files: whole or not at all when written, with the file and line named when they cannot be read.

A file from the web or from another program may hold anything; what is wrong is said with file and
line, and a file that is mostly wrong is refused.
"""

import gzip
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

MAX_LINE_BYTES = 64 << 20  # a longer line counts as bad and is never held in memory
EXAMPLE_KEYS = (("prompt", "solution"), ("question", "answer"), ("problem", "solution"))


def read_jsonl(
    path: str | os.PathLike,
    *,
    required: Sequence[str] = (),
    max_bad_fraction: float = 0.01,
) -> Iterator[tuple[int, dict]]:
    """Yield (line number, object) of a JSONL file (.gz too); required fields must be strings.

    A bad line (not UTF-8, not JSON, not an object, a field missing, over 64 MB) is skipped, counted
    and named on stderr. Raises FileNotFoundError, or ValueError for an empty or truncated file and
    when more than max_bad_fraction of the lines is bad.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or not a file")
    num_lines, bad = 0, []
    for number, line in _lines(path):
        if line is not None and not line.strip():
            continue
        num_lines += 1
        value, problem = _parse_line(line, required)
        if problem is None:
            yield number, value
            continue
        bad.append(f"{path}:{number}: {problem}")
        if num_lines >= 1000 and len(bad) > max_bad_fraction * num_lines:
            break  # no need to read on
    if not num_lines:
        raise ValueError(f"{path} is empty")
    if len(bad) > max_bad_fraction * num_lines:
        raise ValueError(
            f"{len(bad)} of {num_lines} lines are bad, more than {max_bad_fraction:.1%}; "
            f"first: {bad[0]}"
        )
    if bad:
        named = "\n  ".join(bad[:5] + ["..."] * (len(bad) > 5))
        print(f"skipped {len(bad)} of {num_lines} lines:\n  {named}", file=sys.stderr)


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield numbered lines, None for one that is too long; a byte-order mark is dropped."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise ValueError(f"{path} is UTF-16; convert it to UTF-8")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if len(line) < MAX_LINE_BYTES:
                    yield number, line
                    continue
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                yield number, None
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from None


def _parse_line(line: bytes | None, required: Sequence[str]) -> tuple[dict, str | None]:
    if line is None:
        return {}, f"longer than {MAX_LINE_BYTES >> 20} MB"
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8 (byte {error.start})"
    except (ValueError, RecursionError) as error:
        nul = "a NUL byte, " if b"\0" in line else ""
        return {}, f"{nul}not JSON ({error})"
    if not isinstance(value, dict):
        return {}, "not a JSON object"
    for key in required:
        if not isinstance(value.get(key), str):
            return {}, f"no text under {key!r}; it has {sorted(value)[:8]}"
    return value, None


def read_examples(
    path: str | os.PathLike, *, max_bad_fraction: float = 0.01
) -> list[tuple[str, str]]:
    """Return (prompt, solution) texts of a JSONL file for supervised training.

    The first line decides which of prompt/solution, question/answer, problem/solution is read.
    """
    keys = None
    for _, first in read_jsonl(path, max_bad_fraction=1.0):
        keys = next((keys for keys in EXAMPLE_KEYS if all(key in first for key in keys)), None)
        if keys is None:
            wanted = " or ".join("/".join(pair) for pair in EXAMPLE_KEYS)
            raise ValueError(f"{path}: the first line has {sorted(first)}; wanted {wanted}")
        break
    if keys is None:
        raise ValueError(f"{path}: no line is a JSON object")
    rows = read_jsonl(path, required=keys, max_bad_fraction=max_bad_fraction)
    return [(row[keys[0]], row[keys[1]]) for _, row in rows]


def fsync(path: str | os.PathLike) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: str | os.PathLike) -> str:
    """Return the sha256 of a file's bytes; reads about 1.5 GB a second."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def open_atomically(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside path, which becomes path at the end of the block.

    A reader, or the next run after a kill, sees the whole file or the one before it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # Half a surrogate pair, from a user's file, is written as its escape, which is also JSON's.
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
    with open(temporary, mode, **text) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, whole or not at all."""
    with open_atomically(path) as file:
        file.write(text)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike, cure: str = "the file is damaged or cut short") -> dict:
    """Return the object in a JSON file. Raises ValueError that names the file and the cure."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); {cure}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object; {cure}")
    return value
