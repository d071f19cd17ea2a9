r"""The judge of answers: says whether two answers are equal.

`is_equivalent` compares two answers as exact values (reader.py): symmetric, and never by
evaluating a text. What is not read is compared as a string. extraction.py finds a completion's
answer; copying.py tells one that was only copied from the question.
"""

import re
from typing import NamedTuple

from nanomath.judge.exact import Algebra, Refused, is_name, names, number
from nanomath.judge.extraction import MAX_COMPLETION as MAX_COMPLETION
from nanomath.judge.extraction import extract_answer as extract_answer
from nanomath.judge.reader import MAX_CHARS, read_value
from nanomath.judge.tokens import normalise, without_text_commands
from nanomath.judge.values import Value

_HUNDRED = number(100)


def is_equivalent(prediction: str, reference: str) -> bool:
    """Say whether two answers are equal: as the same text, or as exact values. Symmetric."""
    if prediction.strip() == reference.strip():
        return bool(prediction.strip())
    if max(len(prediction), len(reference)) > MAX_CHARS:
        return False
    a, b = read_value(prediction), read_value(reference)
    if same_value(a, b):
        return True
    if "," not in prediction or "," not in reference:
        return False
    lists = [read_value(text, thousands=False) for text in (prediction, reference)]
    return same_answer(Answer(a, lists[0]), Answer(b, lists[1]))


class Answer(NamedTuple):
    """An answer as a value and, where its commas may part a list, as one: "70,110"."""

    value: Value
    listed: Value | None


def read_answer(text: str) -> Answer:
    return Answer(read_value(text), read_value(text, thousands=False) if "," in text else None)


def same_answer(a: Answer, b: Answer) -> bool:
    """Say whether two answers are equal: what verdict and vote ask. "70,110" is a number; it
    is a list, in its order, only beside what is no number."""
    if same_value(a.value, b.value):
        return True
    if not a.listed or not b.listed or a.value.kind == b.value.kind:
        return False
    lists = [Value("parts", items=x.listed.items) for x in (a, b) if x.listed.kind == "list"]
    return len(lists) == 2 and same_value(*lists)


def is_strict(prediction: str, reference: str) -> bool:
    """Say whether two answers are the same string, spacing and LaTeX spelling apart."""
    if max(len(prediction), len(reference)) > MAX_CHARS:
        return prediction.strip() == reference.strip()
    a, b = (re.sub(r"\s", "", normalise(text)) for text in (prediction, reference))
    return a == b != ""


def is_readable(reference: str) -> bool:
    """Say whether a reference can be judged by: it has a value, or is made of words alone, other
    than those that programs write for a missing value."""
    words = without_text_commands(reference)
    if words.lower() in ("nan", "null", "n/a", "na"):
        return False
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
        stated = bool(a.items and b.items)  # of two options with their texts, the texts count too
        return a.label == b.label != "" and not (stated and not _same(*a.items, *b.items, algebra))
    if len(a.items) != len(b.items) or a.label != b.label:
        return False
    if a.kind in ("list", "union"):
        # "x = 3, y = 4" says more than "3, 4".
        unknowns = [_unknowns(value) for value in (a, b)]
        alike = unknowns[0] == unknowns[1] or max(map(len, unknowns)) < 2
        return alike and _same_items(a.items, b.items, algebra)
    if a.kind == "equation" and all(side.exact for side in (*a.items, *b.items)):
        if _solves(a) != _solves(b):  # 2x = 10 is the question to which x = 5 is the answer
            return False
        units = [next((side.label for side in v.items if side.label), "") for v in (a, b)]
        if not _agree(*units):
            return False
        differences = [algebra.add(*(side.exact for side in v.items), -1) for v in (a, b)]
        return algebra.proportional(*differences)
    return all(_same(x, y, algebra) for x, y in zip(a.items, b.items))


def _unknowns(value: Value) -> set[str]:
    """Return the letters a list solves for: x of "x_1 = 3, x_2 = 4"."""
    sides = [side.exact for item in value.items if item.kind == "equation" for side in item.items]
    found = [next(iter(side.top))[0][0][0] for side in sides if side and is_name(side)]
    return {name.partition("_")[0] for name in found}


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
        if other.label:
            return False
        hundredth = algebra.divide(percent.exact, _HUNDRED)
        return algebra.equal(a.exact, b.exact) or algebra.equal(hundredth, other.exact)
    return _agree(a.label, b.label) and algebra.equal(a.exact, b.exact)


def _agree(a: str, b: str) -> bool:
    """Say whether two units agree: 5 cm is 5 and not 5 km; 20 degrees is 20 degrees Celsius."""
    return not a or not b or a == b or a.startswith(b + " ") or b.startswith(a + " ")


def _is_unknown(side: Value) -> bool:
    """Say whether a side is x, f(x), or (x, y) in the order of the alphabet."""
    if side.kind == "tuple" and all(map(_is_unknown, side.items)):
        return list(side.items) == sorted(side.items, key=lambda item: str(item.exact))
    return side.exact is not None and is_name(side.exact)


def _is_ray(value: Value) -> bool:
    """Say whether a value is an interval without an end, as "x < 2" is and the point (1, 2) not."""
    ends = [end.exact for end in value.items] if value.kind == "tuple" else []
    return any(end is not None and "infty" in names(end) for end in ends)


_CONSTANTS = {"", "pi", "e"}  # "": a root


def _solves(equation: Value) -> bool:
    """Say whether an equation is a solution: a bare unknown on one side, no letter on the other."""
    left, right = (side.exact for side in equation.items)
    return any(
        is_name(side) and _CONSTANTS.issuperset(names(other))
        for side, other in ((left, right), (right, left))
    )


def _same_across(a: Value, b: Value, algebra: Algebra) -> bool:
    """Compare kinds that may say the same: x = 5 and 5, "5; 10" and "5, 10"."""
    if a.kind == "equation" and b.kind not in ("list", "text"):
        return any(
            _is_unknown(side) and _same(other, b, algebra)
            for side, other in (a.items, a.items[::-1])
        )
    if a.kind == "list" and len(a.items) == 1:  # {5}
        return _same(a.items[0], b, algebra)
    if a.kind == "list" and b.kind == "union" and all(map(_is_ray, a.items)):
        return len(a.items) == len(b.items) and _same_items(a.items, b.items, algebra)
    if a.kind == "parts" and b.kind == "list" and len(a.items) == len(b.items):
        return all(_same(x, y, algebra) for x, y in zip(a.items, b.items))
    return False
