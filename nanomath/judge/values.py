"""What an answer says: values of several kinds, and inequalities as intervals."""

import re
from fractions import Fraction
from itertools import pairwise
from math import inf
from typing import NamedTuple

from nanomath.judge.exact import (
    Algebra,
    Exact,
    Refused,
    approximate,
    is_formal,
    is_name,
    names,
    number,
    rational,
    symbol,
)
from nanomath.judge.tokens import FUNCTIONS


class Value(NamedTuple):
    """What an answer says. kind, and what goes with it:

    number      exact; label the unit, "%" for percent
    list        items in any order: "1, 2", "{1, 2}", "x = 1 or x = 2", "3 +- 2"
    parts       items in order, the answers of several blanks: "5; 10"
    tuple       items in order; label holds the brackets: "()" may also be an open interval
    union       items in any order
    matrix      rows as tuples
    equation    two sides
    chain       sides; label holds the relations, turned to "<"
    ratio       items: "3:4"
    choice      label: "AC"; items, of one letter: what the option says, if it is given
    text        label: what is not read, without spaces and case
    """

    kind: str
    exact: Exact | None = None
    items: tuple["Value", ...] = ()
    label: str = ""


def scalar(exact: Exact) -> Value:
    return Value("number", exact)


def names_one(value: Value) -> bool:
    return value.exact is not None and is_name(value.exact)


def is_call(value: Value) -> bool:
    """Say whether a value is that of a known function: ln 2, which a decimal may approximate."""
    return any(re.split("[#_]", name)[0] in FUNCTIONS for name in names(value.exact) if "#" in name)


def related(sides: list[Value], relations: list[str], algebra: Algebra) -> Value:
    """Return what "1 < x <= 2", "-x > -1" and "x != 3" say, with relations turned to "<".

    Of one letter, and linear in it, that is an equation of the letter and its set: "x < 3" is
    "x in (-oo, 3)", and is not "y < 3". Other relations stay a chain."""
    algebra.spend(40)  # an answer has few: a hundred are refused
    chain = Value("chain", items=tuple(sides), label=" ".join(relations))
    is_unequal = relations == [r"\ne"]
    if any(side.exact is None for side in sides) or len(sides) > 3:
        return chain
    if r"\ne" in relations and not is_unequal:
        return chain
    found = None if is_unequal else _bare(sides, relations)
    found = found or _linear(sides, relations, algebra)
    if found is None:
        return _one_form(chain, algebra)
    letter, ends, relations = found
    low, high = ends[0] or infinity(-1), ends[1] or infinity(1)
    if is_unequal:
        bound = ends[0] or ends[1]
        rays = (infinity(-1), bound), (bound, infinity(1))
        items = tuple(Value("tuple", items=ray, label="()") for ray in rays)
        return Value("equation", items=(letter, Value("union", items=items)))
    brackets = ("[" if relations[0] == r"\le" else "(") + ("]" if relations[1] == r"\le" else ")")
    return Value("equation", items=(letter, Value("tuple", items=(low, high), label=brackets)))


# A letter, the ends of its interval (None: there is none) and their two relations.
_Found = tuple[Value, list[Value | None], list[str]]


def _bare(sides: list[Value], relations: list[str]) -> _Found | None:
    """Isolate the letter where it is a side itself, whatever the others are: "x > ln 2"."""
    bare = [names_one(side) and not is_formal(side.exact) and not side.label for side in sides]
    if bare == [False, True]:
        sides, relations = [*sides, None], [*relations, r"\lt"]
    elif bare == [True, False]:
        sides, relations = [None, *sides], [r"\lt", *relations]
    elif bare != [False, True, False]:
        return None
    low, letter, high = sides
    held = [names(side.exact) for side in (low, high) if side]
    return None if names(letter.exact) <= set().union(*held) else (letter, [low, high], relations)


def _linear(sides: list[Value], relations: list[str], algebra: Algebra) -> _Found | None:
    """Isolate the one letter of "2x + 1 < 5" and "-3 <= 1 - x <= 3"; what has a unit stays."""
    letters = set().union(*(names(side.exact) for side in sides)) - {"", "pi", "e"}
    if len(letters) != 1 or letters & {"infty", "degree"} or any(side.label for side in sides):
        return None
    (name,) = letters
    exacts = [side.exact for side in sides]
    if len(exacts) == 2:
        exacts, relations = [None, algebra.add(*exacts, -1), number(0)], [r"\lt", *relations]
    low, middle, high = exacts
    terms = dict(middle.top)
    scale = terms.pop((((name, 0, 0), 1),), None)
    rest = Exact(terms, middle.bottom)
    if "#" in name or scale is None or rest.bottom != number(1).bottom:
        return None
    if any(name in names(side) for side in (low, rest, high) if side):
        return None
    ends = [
        None if end is None else scalar(algebra.divide(algebra.add(end, rest, -1), number(scale)))
        for end in (low, high)
    ]
    turned = slice(None, None, -1 if scale < 0 else 1)
    return scalar(symbol(name)), ends[turned], relations[turned]


def _one_form(chain: Value, algebra: Algebra) -> Value:
    """Return "x + y <= 3" and "2x + 2y - 6 <= 0" in one form; what has a unit stays."""
    if len(chain.items) > 2 or any(side.label for side in chain.items):
        return chain
    left, right = (side.exact for side in chain.items)
    if "infty" in names(left) | names(right):
        return chain
    difference = algebra.add(left, right, -1)
    if not difference.top.keys() - {()} or difference.bottom != number(1).bottom:
        return chain
    lead = difference.top[max(difference.top)]
    scale = lead if chain.label == r"\ne" else abs(lead)
    form = algebra.divide(difference, number(scale))
    return chain._replace(items=(scalar(form), scalar(number(0))))


def joined(items: tuple[Value, ...]) -> Value | None:
    """Return the union that "x < 1 or x > 3" says; None where two of the intervals meet, as those
    of "x > 1, x < 3" do, which are not joined by "or"."""
    if any(item.kind != "equation" or item.items[1].kind != "tuple" for item in items):
        return None
    sets = [item.items[1] for item in items]
    letter = items[0].items[0]
    if any(item.items[0] != letter or len(item.items[1].items) != 2 for item in items):
        return None
    ends = [(_near(one.items[0]), _near(one.items[1]), one.label) for one in sets]
    if any(end is None for low, high, _ in ends for end in (low, high)):
        return None
    for (_, high, left), (low, _, right) in pairwise(sorted(ends)):
        if high > low or (high == low and left[1] == "]" and right[0] == "["):
            return None
    return Value("equation", items=(letter, Value("union", items=tuple(sets))))


def _near(end: Value) -> float | None:
    for sign in (-1, 1):
        if end == infinity(sign):
            return sign * inf
    return None if end.exact is None else approximate(end.exact)


def close(value: Value, decimal: Value) -> Value:
    """Return the value that a decimal may stand for, with its unit: "2/3 \\approx 0.67" is 2/3.

    The decimal is within 5%, or rounded at its last place. Raises Refused."""
    b = None if decimal.exact is None else rational(decimal.exact)
    if b is None or value.exact is None:
        raise Refused("not close")
    is_percent = decimal.label == "%" != value.label
    unit = value.label if is_percent else value.label or decimal.label
    if not is_percent and decimal.label not in ("", unit):
        raise Refused("several units")
    near = approximate(value.exact)
    if near is None and not any("#" in name for name in names(value.exact)):
        raise Refused("not close")
    if near is not None:
        place = next((k for k in range(20) if 10**k % b.denominator == 0), 20)
        error = abs(Fraction(near) * (100 if is_percent else 1) - b)
        if error > max(abs(b) / 20, Fraction(51, 100 * 10**place)):
            raise Refused("not close")
    return value._replace(label=unit)


def infinity(sign: int) -> Value:
    endless = symbol("infty")
    return scalar(Exact({term: sign * c for term, c in endless.top.items()}, endless.bottom))


REALS = Value("tuple", items=(infinity(-1), infinity(1)), label="()")


EMPTY = Value("list")


SETS_IN_WORDS = {
    **dict.fromkeys(
        ("all real numbers", "all reals", "the real numbers", "any real number"), REALS
    ),
    **dict.fromkeys(("empty set", "the empty set", "null set"), EMPTY),
}
