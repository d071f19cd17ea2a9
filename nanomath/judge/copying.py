r"""Tells an answer that was worked out from one that was copied from the question.

"2x + 3x" equals 5x, yet as an answer to "Simplify $2x + 3x$" it is worth nothing: what stands in
the question counts only if it is the reference as a string. Strings are compared as symbols, in
one spelling: \frac12, \dfrac{1}{2} and 1/2 are the same three, and units are left out. A whole
number counts as it stands, because there is nothing to simplify in it; a decimal, a fraction or a
percentage does not, because a question may ask for another form of just that ("Write 0.5 as a
fraction"). Answers that are words or options are always compared as strings, by answers.py.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

from nanomath.judge.reader import read_value
from nanomath.judge.tokens import normalise, without_text_commands

Symbols = tuple[str, ...]

_SIMPLE_FRACTION = re.compile(r"\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SYMBOL = re.compile(r"\\[a-zA-Z]+|\d+(?:\.\d+)?|\.\d+|[a-zA-Z]+|[\u4e00-\u9fff]+|[^\s{}$\\]")
_SPELLINGS = {r"\times": "*", r"\cdot": "*", r"\ast": "*", r"\div": "/", r"\lt": "<", r"\gt": ">"}
_SPELLINGS |= {"and": ",", "or": ",", ";": ","}
_BEFORE = r"(?:^ |(?<=[a-zA-Z]{2} )|(?<=[\u4e00-\u9fff,.;:?(\[] ))"
_AFTER = r"(?= (?:$|[a-zA-Z]{2}|[\u4e00-\u9fff,.;:?)\]]))"
_FIGURE = re.compile(r"\[asy\].*?(?:\[/asy\]|$)", re.DOTALL)
_MARKS = {",", "<", ">", r"\le", r"\ge", r"\ne", r"\in", r"\cup"}  # between items
_NUMBER_AND_UNIT = re.compile(  # of symbols with blanks between
    r"((?:[-+] )?[\d.]+)(?: (?:[a-zA-Z]+|[\u4e00-\u9fff]+|%|\\degree))+(?: \^ [23])?"
    r"(?: / [a-zA-Z]+(?: \^ [23])?)?"
)
_NUMBER = re.compile(r"[\s$]*-?\d+[\s$.]*")
_SIMPLE = re.compile(r"(?:[-+] )?(?:\d+|[a-zA-Z]|\\[a-zA-Z]+)")
_UNKNOWN = re.compile(r"[a-zA-Z](?: _ \w+)?(?: \( \w \))?")


def is_copied(answer: str, question: str, reference: str) -> bool:
    """Say whether an answer stands in the question and is not, as a string, the reference.

    An equation counts as copied where no side of it but the bare unknown is new.
    """
    if answer.strip() == reference.strip() or _NUMBER.fullmatch(answer):  # most, and quickly
        return False
    given = symbols(answer)
    whole = given if _MARKS.intersection(given) else _unwrapped(given)  # (1, 3) is not 1, 3
    if _SIMPLE.fullmatch(" ".join(whole)) or read_value(answer).kind in ("text", "choice"):
        return False
    asked, wanted = _asked(question), symbols(reference)
    references = {side for item in _split(wanted, _MARKS) for side in _split(item, {"="})}
    stands = f" {' '.join(whole)} " in asked
    if "=" in whole:  # "x = 8" does not stand in "3x = 8y"
        stands = bool(re.search(_BEFORE + re.escape(" ".join(whole)) + _AFTER, asked))
    if stands:
        items = sorted(_split(given, _MARKS))
        return items != sorted(_split(wanted, _MARKS)) and not references.issuperset(items)

    def is_new(side: Symbols) -> bool:
        text = " ".join(side)
        return side in references or bool(_SIMPLE.fullmatch(text)) or f" {text} " not in asked

    for item in _split(given, _MARKS):
        sides = [*_split(item, {"="})]
        known = [side for side in sides if not _UNKNOWN.fullmatch(" ".join(side))]
        if known and not any(map(is_new, known)):
            return True
    return False


@lru_cache(maxsize=8)  # the outputs of one question follow one another
def _asked(question: str) -> str:
    return f" {' '.join(symbols(_FIGURE.sub(' ', question)))} "


def symbols(text: str) -> Symbols:
    """Return the symbols of a text, without its spaces, braces and dollar signs."""
    text = _THOUSANDS.sub("", without_text_commands(normalise(text)))
    text = _SIMPLE_FRACTION.sub(lambda m: f"{_bracketed(m[1])}/{_bracketed(m[2])}", text)
    found = [_SPELLINGS.get(symbol, symbol) for symbol in _SYMBOL.findall(text)]
    return tuple(_number(symbol) if "." in symbol else symbol for symbol in found)


def _bracketed(text: str) -> str:
    return text if re.fullmatch(r"\s*\w+\s*", text) else f"({text})"


def _number(symbol: str) -> str:
    """Write .50 as 0.5."""
    whole, _, decimals = symbol.partition(".")
    return f"{whole or '0'}.{decimals}".rstrip("0").rstrip(".") if decimals else symbol


def _unwrapped(run: Symbols) -> Symbols:
    """Return a run without pairs of brackets around all of it, and without unpaired ones."""
    opened: list[int] = []
    pairs = {}
    for i, symbol in enumerate(run):
        if symbol in ("(", "["):
            opened.append(i)
        elif symbol in (")", "]") and opened:
            pairs[opened.pop()] = i
    begin, end = 0, len(run)
    while begin < end:
        if pairs.get(begin) == end - 1 and run[begin] + run[end - 1] == "()":
            begin, end = begin + 1, end - 1
        elif run[begin] in ("(", "[") and begin not in pairs:
            begin += 1
        elif run[end - 1] in (")", "]") and end - 1 not in pairs.values():
            end -= 1
        else:
            break
    return run[begin:end]


def _split(run: Symbols, marks: set[str]) -> Iterator[Symbols]:
    """Yield the runs between the marks, without units."""
    places = [i for i, symbol in enumerate(run) if symbol in marks]
    for begin, end in zip([-1, *places], [*places, len(run)], strict=True):
        item = _unwrapped(run[begin + 1 : end])
        if match := _NUMBER_AND_UNIT.fullmatch(" ".join(item)):
            item = tuple(match[1].split())
        if item:
            yield item
