r"""The judge of answers: finds a completion's answer, and says whether two answers are equal.

`extract_answer` looks, in this order, for

    "answer tag"  the last <answer>...</answer>, or the answer given inside
    "boxed"       the last \boxed{...} whose braces balance
    "####"        the rest of the last line with ####
    "phrase"      after the last "The answer is", "Answer:", "答案是", ...
    "choice"      after the last "option (C)", "故选 C", ...

(what comes before a </think> is no answer, save in a tag)
and `is_equivalent` compares two answers as exact values (reader.py): symmetric, and never by
evaluating a text. What is not read is compared as a string.

    python -m nanomath.judge.answers --data DIR      how many gold answers are read, by file
"""

import re
from typing import NamedTuple

from nanomath.judge.exact import Algebra, Refused, is_name, number
from nanomath.judge.reader import MAX_CHARS, Value, option_letter, read_value
from nanomath.judge.tokens import normalise, without_text_commands

# ----------------------------------------------------------------------------------- extraction


MAX_COMPLETION = 50_000


class Extraction(NamedTuple):
    answer: str | None
    rule: str  # which rule matched; "none"


_BRACES = re.compile(r"\\(?:boxed|fbox)[ \t]{0,9}(?P<open>\{)?|\\.|[{}]", re.DOTALL)
_TAGS = re.compile(r"<(/?)answer>")
_PHRASE = re.compile(
    r"(?:final answer|the (?:correct )?answer|答案)\s{0,3}"
    r"(?:(?:is|are|(?:would|will|must) be|equals)\b|=|是|为)\s{0,3}[:：]?"
    r"(?:\s{0,3}(?:therefore|thus|simply|just|option|choice)\b)?"
    r"|(?:answer|答案)(?:\*\*)?\s{0,3}[:：](?:\*\*)?|答：",
    re.IGNORECASE,
)
_CHOICE = re.compile(
    r"(?:(?i:correct (?:option|choice)|option|choose|choice)(?: is)?|故?选(?:项|择)?)"
    r"\s?[:：]?\s?[(（]?([A-J]{1,4})(?![a-zA-Z])"
    r"(?![)）]?\s?(?:or|and|,|、|或|和)\s?[(（]?[A-J])"  # two are no choice
)
_MATH = re.compile(r"(\$\$?)((?:\\.|[^$\\]){1,1000})\1\s*(?![;；,，、\w])")
_SENTENCE_END = re.compile(
    r"\n|。|,? (?:so|because|since) |(?<!\b[ap]\.m)(?<!Mrs)(?<!\b[MDS][rst])(?<!\bsq)\.(?=\s|\*|$)"
)


def extract_answer(text: str) -> Extraction:
    """Return the answer a completion gives, and the rule that found it.

    Only the last MAX_COMPLETION characters are looked at: the cost must not grow with the text.
    """
    text = text[-MAX_COMPLETION:]
    if (inside := _last_tag(text)) is not None:
        return Extraction(extract_answer(inside).answer or inside.strip(), "answer tag")
    text = text.rpartition("</think>")[2]
    if (answer := _last_boxed(text)) is not None:
        return Extraction(answer.strip(), "boxed")
    _, mark, rest = text.rpartition("####")
    if mark:
        return Extraction(rest.strip().partition("\n")[0].strip(), "####")
    phrases = list(_PHRASE.finditer(text))
    if phrases and (answer := _phrase_answer(text[phrases[-1].end() :])):
        return Extraction(answer, "phrase")
    choices = list(_CHOICE.finditer(text))
    if choices:
        return Extraction(choices[-1][1], "choice")
    return Extraction(None, "none")


def _last_tag(text: str) -> str | None:
    end = start = None
    for match in _TAGS.finditer(text):
        if not match[1]:
            start = match.end()
        elif start is not None:
            end, begin, start = match.start(), start, None
    return None if end is None else text[begin:end]


def _last_boxed(text: str) -> str | None:
    """Return what the last balanced \\boxed{...} holds, in one pass over the braces."""
    opened: list[int | None] = []  # where the content of each open brace's box begins; None: no box
    last: tuple[int, int] | None = None
    bare = None  # "\boxed 5"
    for match in _BRACES.finditer(text):
        if match["open"]:
            opened.append(match.end())
        elif match[0] == "{":
            opened.append(None)
        elif match[0] == "}":
            begin = opened.pop() if opened else None
            if begin is not None and (last is None or begin > last[0]):
                last = (begin, match.start())
        elif match[0].startswith((r"\boxed", r"\fbox")):
            bare = match.end()
    if bare is not None and (last is None or bare > last[0]):
        token = re.match(r"\s?([^\s${}\\.,]{1,50})", text[bare : bare + 60])
        if token:
            return token[1]
    return None if last is None else text[slice(*last)]


def _phrase_answer(rest: str) -> str | None:
    rest = rest[: MAX_CHARS + 10].strip(" \t\n*:：")
    line = rest.partition("\n")[0]
    if match := _MATH.match(line):
        return match[2].strip()
    line = _SENTENCE_END.split(line, maxsplit=1)[0].strip(" *")
    return option_letter(line) or line or None


# ---------------------------------------------------------------------------------- equivalence

_HUNDRED = number(100)


def is_equivalent(prediction: str, reference: str) -> bool:
    """Say whether two answers are equal: as the same text, or as exact values. Symmetric."""
    if prediction.strip() == reference.strip():
        return bool(prediction.strip())
    if max(len(prediction), len(reference)) > MAX_CHARS:
        return False
    if same_value(read_value(prediction), read_value(reference)):
        return True
    if "," not in prediction + reference:
        return False
    # "70,110" is a number, or a list of two.
    lists = [read_value(text, thousands=False) for text in (prediction, reference)]
    return all(value.kind == "list" for value in lists) and same_value(*lists)


def is_strict(prediction: str, reference: str) -> bool:
    """Say whether two answers are the same string, spacing and LaTeX spelling apart."""
    if max(len(prediction), len(reference)) > MAX_CHARS:
        return prediction.strip() == reference.strip()
    a, b = (re.sub(r"\s", "", normalise(text)) for text in (prediction, reference))
    return a == b != ""


def is_readable(reference: str) -> bool:
    """Say whether a reference can be judged by: it has a value, or is made of words alone."""
    words = without_text_commands(reference)
    is_words = re.fullmatch(r"[A-Za-z\u4e00-\u9fff .,'-]{1,100}", words) is not None
    return is_words or read_value(reference).kind != "text"


def same_value(a: Value, b: Value) -> bool:
    """Say whether two readings are equal; of different kinds only where both say the same thing."""
    try:
        return _same(a, b, Algebra())
    except Refused:
        return False


def _same(a: Value, b: Value, algebra: Algebra) -> bool:
    algebra.spend(2)
    if a.kind != b.kind:
        return _same_across(a, b, algebra) or _same_across(b, a, algebra)
    if a.kind == "number":
        return _same_number(a, b, algebra)
    if a.kind in ("text", "choice"):
        return a.label == b.label != ""
    if len(a.items) != len(b.items) or a.label != b.label:
        return False
    if a.kind in ("list", "union"):
        # "x = 3, y = 4" says more than "3, 4".
        names = [_unknowns(value) for value in (a, b)]
        alike = names[0] == names[1] or max(map(len, names)) < 2
        return alike and _same_items(a.items, b.items, algebra)
    if a.kind == "equation" and all(side.exact for side in (*a.items, *b.items)):
        differences = [algebra.add(*(side.exact for side in v.items), -1) for v in (a, b)]
        return algebra.proportional(*differences)
    return all(_same(x, y, algebra) for x, y in zip(a.items, b.items))


def _unknowns(value: Value) -> set[str]:
    """Return the letters a list solves for: x of "x_1 = 3, x_2 = 4"."""
    sides = [side.exact for item in value.items if item.kind == "equation" for side in item.items]
    names = [next(iter(side.top))[0][0][0] for side in sides if side and is_name(side)]
    return {name.partition("_")[0] for name in names}


def _same_items(left: tuple[Value, ...], right: tuple[Value, ...], algebra: Algebra) -> bool:
    """Compare without order: each item takes one that equals it."""
    rest = list(right)
    for item in left:
        found = next((i for i, other in enumerate(rest) if _same(item, other, algebra)), None)
        if found is None:
            return False
        del rest[found]
    return True


def _same_number(a: Value, b: Value, algebra: Algebra) -> bool:
    if "%" in (a.label, b.label) and a.label != b.label:  # 25% is 25, as MATH writes it, and 0.25
        percent, other = (a, b) if a.label == "%" else (b, a)
        hundredth = algebra.divide(percent.exact, _HUNDRED)
        return algebra.equal(a.exact, b.exact) or algebra.equal(hundredth, other.exact)
    if a.label and b.label and a.label != b.label:  # 5 cm and 5 km
        return False
    return algebra.equal(a.exact, b.exact)


def _is_unknown(side: Value) -> bool:
    """Say whether a side is x, f(x), or (x, y) in the order of the alphabet."""
    if side.kind == "tuple" and all(map(_is_unknown, side.items)):
        return list(side.items) == sorted(side.items, key=lambda item: str(item.exact))
    return side.exact is not None and is_name(side.exact)


def _same_across(a: Value, b: Value, algebra: Algebra) -> bool:
    """Compare kinds that may say the same: x = 5 and 5, "5; 10" and "5, 10"."""
    if a.kind == "equation" and b.kind not in ("list", "text"):
        return any(
            _is_unknown(side) and _same(other, b, algebra)
            for side, other in (a.items, a.items[::-1])
        )
    if a.kind == "parts" and b.kind == "list" and len(a.items) == len(b.items):
        return all(_same(x, y, algebra) for x, y in zip(a.items, b.items))
    return False
