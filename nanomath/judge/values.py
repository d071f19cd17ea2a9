"""What an answer says: values of several kinds, and inequalities as intervals."""

from fractions import Fraction
from typing import NamedTuple

from nanomath.judge.exact import Algebra, Exact, is_formal, is_name, number, symbol


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


def solved(sides: list[Value], relation: str, algebra: Algebra) -> Value | None:
    """Return what "-x > -1" or "2x + 1 < 5" says of its one letter, as an interval; of
    "x \\ne 3" the two; None where it is not linear in one letter."""
    if any(side.exact is None for side in sides):
        return None
    left, right = (side.exact for side in sides)
    difference = algebra.add(left, right, -1)
    terms = dict(difference.top)
    constant = terms.pop((), Fraction(0))
    is_scaled = difference.bottom == number(1).top and len(terms) == 1
    if not is_scaled or not is_name(Exact({next(iter(terms)): Fraction(1)}, number(1).top)):
        return None
    (coefficient,) = terms.values()
    bound, minus, plus = scalar(number(-constant / coefficient)), infinity(-1), infinity(1)
    if relation == r"\ne":
        pairs = (minus, bound), (bound, plus)
        items = [Value("tuple", items=pair, label="()") for pair in pairs]
        return Value("union", items=tuple(items))
    closed = relation == r"\le"
    if coefficient > 0:  # x < bound
        return Value("tuple", items=(minus, bound), label="(]" if closed else "()")
    return Value("tuple", items=(bound, plus), label="[)" if closed else "()")


def interval(sides: list[Value], relations: list[str]) -> Value | None:
    """Return the interval that "x < 3" or "1 < x <= 2" says, with relations turned to "<"."""
    variables = [names_one(side) and not is_formal(side.exact) for side in sides]
    if variables == [True, False]:
        sides, relations = [infinity(-1), *sides], [r"\lt", *relations]
    elif variables == [False, True]:
        sides, relations = [*sides, infinity(1)], [*relations, r"\lt"]
    elif variables != [False, True, False]:
        return None
    if r"\ne" in relations:
        return None
    brackets = ("[" if relations[0] == r"\le" else "(") + ("]" if relations[1] == r"\le" else ")")
    return Value("tuple", items=(sides[0], sides[2]), label=brackets)


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
