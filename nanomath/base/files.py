r"""Files: whole or not at all when written, with the file and line named when they cannot be read.

A file from the web or from another program may hold anything; what is wrong is said with file and
line, and a file that is mostly wrong is refused. `damaged_latex` finds commands that JSON has read
as control characters: "\frac" with one backslash is a form feed and "rac".
"""

import gzip
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

MAX_LINE_BYTES = 64 << 20  # a longer line counts as bad and is never held in memory
EXAMPLE_KEYS = (("prompt", "solution"), ("question", "answer"), ("problem", "solution"))


def read_jsonl(
    path: str | os.PathLike,
    *,
    required: Sequence[str] = (),
    read: Callable[[dict], Any] | None = None,
    max_bad_fraction: float = 0.01,
) -> Iterator[tuple[int, Any]]:
    """Yield (line number, read(object)) of a JSONL file (.gz too); required fields must be strings.

    A bad line (not UTF-8, not JSON, not an object, a field missing, over 64 MB, or refused by
    `read` with a ValueError) is skipped, counted and named on stderr. Raises FileNotFoundError, or
    ValueError for an empty or truncated file and when more than max_bad_fraction of the lines is
    bad.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or not a file")
    num_lines, bad = 0, []
    for number, line in _lines(path):
        if line is not None and not line.strip():
            continue
        num_lines += 1
        try:
            value = _parse_line(line, required)
            value = value if read is None else read(value)
        except ValueError as error:
            bad.append(f"{path}:{number}: {error}")
        else:
            yield number, value
            continue
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
    """Yield numbered lines, None for one that is too long."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            pieces = iter(partial(file.readline, MAX_LINE_BYTES), b"")
            for number, line in enumerate(pieces, 1):
                if len(line) < MAX_LINE_BYTES:
                    yield number, line
                    continue
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                yield number, None
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from None


def _parse_line(line: bytes | None, required: Sequence[str]) -> dict:
    if line is None:
        raise ValueError(f"longer than {MAX_LINE_BYTES >> 20} MB")
    try:
        value = json.loads(line.decode("utf-8-sig"))  # without a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        nul = "a NUL byte, " if b"\0" in line else ""
        escape = r"; in JSON every backslash of LaTeX is doubled: \\sqrt" * ("escape" in str(error))
        raise ValueError(f"{nul}not JSON ({error}){escape}") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    for key in required:
        if not isinstance(value.get(key), str):
            raise ValueError(f"no text under {key!r}; it has {sorted(value)[:8]}")
    return value


# What is left of LaTeX commands whose backslash and first letter JSON has read as one character.
# The rests of \nu, \not, \nexists and \tan are words too: no sign, or only before an argument.
_RESTS = {
    "\b": r"[a-zA-Z]+",
    "\f": r"rac|orall|box|lat|rown",
    "\t": r"heta|imes|ext[a-z]*|frac|au|ag|anh|binom|herefore|ilde|iny|hinspace|o|op"
    r"|riangle(?:left|right|down|q)?|an(?=\s?(?:[({\\^_]|\w\b))",
    "\r": r"ight|ightarrow|ho|angle|ceil|floor|brace|brack|vert|ule|aisebox",
    "\n": r"eq|abla|otin|geq|leq|subseteq",
}
_DAMAGED = re.compile("|".join(f"{char}(?:{rests})(?![a-zA-Z])" for char, rests in _RESTS.items()))


def damaged_latex(text: str) -> str | None:
    """Return the first LaTeX command that one backslash in JSON has damaged, or None."""
    match = _DAMAGED.search(text)
    return match and "\\" + "bftrn"["\b\f\t\r\n".index(match[0][0])] + match[0][1:]


def text_field(row: dict, key: str, *, number: bool = False, blank: bool = False) -> str:
    """Return the text of a row's field, or with `number` a number as it is written.

    Raises ValueError, which names the cure, for other values, for a blank text and damaged LaTeX.
    """
    value = row.get(key)
    if number and isinstance(value, int | float) and not isinstance(value, bool):
        if value - value != 0:  # NaN, Infinity, 1e999; other fields may hold them
            raise ValueError(f"{key!r} is {value}: give a number or a text, or remove the line")
        value = str(value)
    if not isinstance(value, str):
        kinds = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
        kind = kinds.get(type(value), "a number") if key in row else "missing"
        cure = 'give one text, "3, 5" for two answers' if kind == "a list" else "give a text"
        raise ValueError(f"{key!r} is {kind}: {cure}, or remove the line")
    if not blank and not value.strip():
        raise ValueError(f"{key!r} is an empty text: fill it in, or remove the line")
    if command := damaged_latex(value):
        raise ValueError(
            f"{key!r} holds a control character where {command} was meant: double the backslash of "
            f"LaTeX in JSON, \\{command}"
        )
    return value


def read_examples(
    path: str | os.PathLike, *, max_bad_fraction: float = 0.01
) -> list[tuple[str, str]]:
    """Return (prompt, solution) texts of a JSONL file for supervised training.

    A line has prompt/solution, question/answer or problem/solution.
    """

    def read(row: dict) -> tuple[str, str]:
        keys = next((pair for pair in EXAMPLE_KEYS if all(key in row for key in pair)), None)
        if keys is None:
            wanted = " or ".join("/".join(pair) for pair in EXAMPLE_KEYS)
            raise ValueError(f"it has {sorted(row)[:8]}; wanted {wanted}")
        prompt = text_field(row, keys[0], blank=keys[0] == "prompt")
        return prompt, text_field(row, keys[1], number=True)

    rows = read_jsonl(path, read=read, max_bad_fraction=max_bad_fraction)
    return [pair for _, pair in rows]


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


def content_sha256(items: Iterable[Any]) -> str:
    """Return the sha256 of what a run trains on, as JSON values: the same from another file."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
