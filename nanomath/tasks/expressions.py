"""Every arithmetic expression over a handful of numbers, each in one canonical form.

An expression is a number, a sum (terms added, terms taken away) or a product (factors multiplied,
factors divided by). A sum's terms are never sums and a product's factors never products, so
a + b + c, a - (b - c) and a / (b / c) have one form each: 6 forms over 2 different numbers, 68
over 3, 1,260 over 4. Only twins by sign, (a - b) * (c - d) and (b - a) * (d - c), are both kept:
the steps of one go through negative numbers. Values are exact fractions.
"""

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_NUMBERS = 5  # 32,594 forms, a second; a sixth number costs thirty times as much
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@dataclass(frozen=True, slots=True)
class Expression:
    """One form, its exact value, and its steps, e.g. ("21/3=7", "95-7=88").

    is_natural: every value on the way, step by step, is a non-negative whole number.
    """

    text: str
    value: Fraction
    steps: tuple[str, ...] = ()
    is_natural: bool = True


def number_text(value: Fraction) -> str:
    """Print a value as an operand: what is not a natural number is put in parentheses."""
    return str(value) if _is_natural(value) else f"({value})"


def _is_natural(value: Fraction) -> bool:
    return value.denominator == 1 and value.numerator >= 0


def expressions(nums: Sequence[int]) -> list[Expression]:
    """Return every form over all of nums, each text once.

    Their order never changes: the solutions drawn for a seed follow from it.
    """
    _check_count(nums)
    # From few numbers to many: the forms over some are the operands of those over more.
    sums = {(n,): [Expression(str(n), Fraction(n))] for n in nums}
    products = dict(sums)
    for count in range(2, len(nums) + 1):
        for chosen in itertools.combinations(nums, count):
            found = _joined("+-", chosen, products), _joined("*/", chosen, sums)
            sums[chosen], products[chosen] = map(_unique, found)
    return _unique([*sums[tuple(nums)], *products[tuple(nums)]])


def _unique(forms: Iterable[Expression]) -> list[Expression]:
    """Keep one of each text: equal numbers make equal forms."""
    return list({form.text: form for form in forms}.values())


# An operand with the sign before it: "-" where it is taken away, "*" where it is multiplied.
_Term = tuple[str, Expression]


def _joined(
    signs: str,
    nums: tuple[int, ...],
    operands: dict[tuple[int, ...], list[Expression]],
    terms: tuple[_Term, ...] = (),
) -> Iterator[Expression]:
    """Yield the sums ("+-") or products ("*/") that have these terms already, and further ones that
    use up nums."""
    if not nums:
        if any(sign == signs[0] for sign, _ in terms):  # something to take away or divide from
            yield _join(terms)
        return
    first, *others = nums
    for bits in range(2 ** len(others)):  # which others are in one operand with the first
        inside = (first, *(n for i, n in enumerate(others) if bits >> i & 1))
        rest = tuple(n for i, n in enumerate(others) if not bits >> i & 1)
        if not (terms or rest):
            return  # one operand over everything would be no sum and no product
        for operand, sign in itertools.product(operands[inside], signs):
            if sign != "/" or operand.value != 0:
                yield from _joined(signs, rest, operands, (*terms, (sign, operand)))


def _join(terms: Sequence[_Term]) -> Expression:
    """Return one sum or product: what is added or multiplied comes first, large before small."""
    terms = sorted(terms, key=_rank)
    steps = [step for _, operand in terms for step in operand.steps]
    is_natural = all(operand.is_natural for _, operand in terms)
    text, value = _operand_text(*terms[0]), terms[0][1].value
    for sign, operand in terms[1:]:
        total = _OPERATIONS[sign](value, operand.value)
        steps.append(f"{number_text(value)}{sign}{number_text(operand.value)}={number_text(total)}")
        is_natural = is_natural and _is_natural(total)
        text, value = text + sign + _operand_text(sign, operand), total
    return Expression(text, value, tuple(steps), is_natural)


def _rank(term: _Term) -> tuple[bool, float, str]:
    sign, operand = term
    return sign in "-/", -float(operand.value), operand.text


def _operand_text(sign: str, operand: Expression) -> str:
    is_sum_in_product = sign in "*/" and operand.steps
    return f"({operand.text})" if is_sum_in_product else operand.text


def is_reachable(nums: Sequence[int], target: int) -> bool:
    """Say whether any expression over all of nums has the value target; faster than solving."""
    _check_count(nums)
    return _reaches([(n, 1) for n in nums], target)


def _check_count(nums: Sequence[int]) -> None:
    if not 2 <= len(nums) <= MAX_NUMBERS:
        raise ValueError(f"{len(nums)} numbers: 2 to {MAX_NUMBERS} are supported")


def _reaches(values: list[tuple[int, int]], target: int) -> bool:
    """Join any two values, (numerator, denominator), by any operation until two are left."""
    if len(values) == 2:
        (a, b), (c, d) = values
        if target * b * d in (a * d + c * b, a * d - c * b, c * b - a * d, a * c):
            return True
        return (c != 0 and a * d == target * b * c) or (a != 0 and c * b == target * a * d)
    for i, j in itertools.combinations(range(len(values)), 2):
        (a, b), (c, d) = values[i], values[j]
        rest = values[:i] + values[i + 1 : j] + values[j + 1 :]
        sums = (a * d + c * b, b * d), (a * d - c * b, b * d), (c * b - a * d, b * d)
        products = (a * c, b * d), (a * d, b * c), (c * b, a * d)  # a quotient by zero is x / 0
        if any(_reaches([*rest, value], target) for value in (*sums, *products) if value[1] != 0):
            return True
    return False
