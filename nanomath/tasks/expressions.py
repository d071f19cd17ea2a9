"""Every arithmetic expression over a handful of numbers, each in one canonical form.

An expression is a number, a sum (terms added, terms taken away) or a product (factors multiplied,
factors divided by). A sum's terms are never sums and a product's factors never products, so
a + b + c, a - (b - c) and a / (b / c) have one form each: 6 forms over 2 different numbers, 68
over 3, 1,260 over 4. Only twins by sign, (a - b) * (c - d) and (b - a) * (d - c), are both kept:
the steps of one go through negative numbers. Values are exact fractions.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_NUMBERS = 5  # 32,594 forms, half a second; a sixth number costs thirty times as much


@dataclass(frozen=True, slots=True)
class Expression:
    """One form: kind is "number", "sum" or "product"; plain and inverse are its operands.

    num / den is the exact value in lowest terms, den > 0. is_natural: every value on the way, step
    by step, is a non-negative whole number.
    """

    kind: str
    text: str
    num: int
    den: int
    is_natural: bool
    plain: tuple["Expression", ...] = ()
    inverse: tuple["Expression", ...] = ()

    @property
    def value(self) -> Fraction:
        return Fraction(self.num, self.den)

    def steps(self) -> list[str]:
        """Return one operation a line, e.g. ["21/3=7", "95-7=88"]; operands before their use."""
        lines: list[str] = []
        self._walk(lines)
        return lines

    def _walk(self, lines: list[str]) -> Fraction:
        if self.kind == "number":
            return Fraction(self.num)
        values = [operand._walk(lines) for operand in (*self.plain, *self.inverse)]
        signs = "+-" if self.kind == "sum" else "*/"
        total = values[0]
        for i, value in enumerate(values[1:], start=1):
            sign = signs[0] if i < len(self.plain) else signs[1]
            before = total
            if self.kind == "sum":
                total = total + value if sign == "+" else total - value
            else:
                total = total * value if sign == "*" else total / value
            lines.append(f"{number_text(before)}{sign}{number_text(value)}={number_text(total)}")
        return total


def number_text(value: Fraction) -> str:
    """Print a value as an operand: what is not a natural number is put in parentheses."""
    return str(value) if value.denominator == 1 and value >= 0 else f"({value})"


def expressions(nums: Sequence[int]) -> list[Expression]:
    """Return every form over all of nums, each text once."""
    return _collect(_Forms(nums).over_all())


def solutions(nums: Sequence[int], target: int) -> list[Expression]:
    """Return every form over all of nums whose value is target exactly, each text once."""
    raw = _Forms(nums).over_all()
    return _collect(form for form in raw if form[3] == target * form[4])


def is_reachable(nums: Sequence[int], target: int) -> bool:
    """Say whether any expression over all of nums has the value target; faster than solving."""
    _check_count(nums)
    return _reaches([(n, 1) for n in nums], target)


def _check_count(nums: Sequence[int]) -> None:
    if not 1 <= len(nums) <= MAX_NUMBERS:
        raise ValueError(f"{len(nums)} numbers: 1 to {MAX_NUMBERS} are supported")


def _reaches(values: list[tuple[int, int]], target: int) -> bool:
    """Join any two values by any operation until two are left; values are (num, den), den != 0."""
    if len(values) == 1:
        return values[0][0] == target * values[0][1]
    if len(values) == 2:
        (a, b), (c, d) = values
        scaled = target * b * d
        sums_match = scaled in (a * d + c * b, a * d - c * b, c * b - a * d, a * c)
        return (
            sums_match
            or (c != 0 and a * d == target * b * c)
            or (a != 0 and c * b == target * a * d)
        )
    for i in range(len(values)):
        a, b = values[i]
        for j in range(i):
            c, d = values[j]
            rest = values[:j] + values[j + 1 : i] + values[i + 1 :]
            joined = [
                (a * d + c * b, b * d),
                (a * d - c * b, b * d),
                (c * b - a * d, b * d),
                (a * c, b * d),
            ]
            if c:
                joined.append((a * d, b * c))
            if a:
                joined.append((c * b, a * d))
            if any(_reaches([*rest, value], target) for value in joined):
                return True
    return False


# (kind, plain, inverse, num, den): a form before its text is made; num / den not yet reduced
_Raw = tuple[str, tuple[Expression, ...], tuple[Expression, ...], int, int]


class _Forms:
    """The forms over each subset of nums, subsets as bit masks; a subset's are made once."""

    def __init__(self, nums: Sequence[int]):
        _check_count(nums)
        self.nums = nums
        self._made: dict[tuple[str, int], list[Expression]] = {}

    def over_all(self) -> Iterator[_Raw]:
        if len(self.nums) == 1:
            yield ("number", (), (), self.nums[0], 1)
            return
        mask = (1 << len(self.nums)) - 1
        for kind in ("sum", "product"):
            yield from self._over(kind, mask, (), (), 0 if kind == "sum" else 1, 1)

    def _operands(self, kind: str, mask: int) -> list[Expression]:
        """Return what may stand inside a `kind`: the number, or the forms of the other kind."""
        if (kind, mask) not in self._made:
            if mask & (mask - 1) == 0:
                raw = [("number", (), (), self.nums[mask.bit_length() - 1], 1)]
            elif kind == "sum":
                raw = self._over("product", mask, (), (), 1, 1)
            else:
                raw = self._over("sum", mask, (), (), 0, 1)
            self._made[kind, mask] = _collect(raw)
        return self._made[kind, mask]

    def _over(
        self,
        kind: str,
        mask: int,
        plain: tuple[Expression, ...],
        inverse: tuple[Expression, ...],
        num: int,
        den: int,
    ) -> Iterator[_Raw]:
        """Yield the forms that have these operands already and use up mask with further ones."""
        if mask == 0:
            if plain:
                yield (kind, plain, inverse, num, den)
            return
        lowest = mask & -mask
        others = rest = mask ^ lowest
        while True:  # every subset `rest` of the others is left for later operands
            # One operand over everything would be no sum and no product.
            if rest or plain or inverse:
                for operand in self._operands(kind, mask ^ rest):
                    a, b = operand.num, operand.den
                    if kind == "sum":
                        more, less = (num * b + a * den, den * b), (num * b - a * den, den * b)
                    else:
                        more, less = (num * a, den * b), (num * b, den * a)
                    yield from self._over(kind, rest, (*plain, operand), inverse, *more)
                    if less[1]:
                        yield from self._over(kind, rest, plain, (*inverse, operand), *less)
            if not rest:
                return
            rest = (rest - 1) & others


def _collect(raw: Iterator[_Raw] | list[_Raw]) -> list[Expression]:
    """Give each form its text and reduced value; equal numbers make equal forms, kept once."""
    return list({form.text: form for form in (_expression(*item) for item in raw)}.values())


def _expression(
    kind: str,
    plain: tuple[Expression, ...],
    inverse: tuple[Expression, ...],
    num: int,
    den: int,
) -> Expression:
    if kind == "number":
        return Expression(kind, str(num), num, 1, True)
    if den < 0:
        num, den = -num, -den
    common = math.gcd(num, den)
    num, den = num // common, den // common
    plain, inverse = tuple(sorted(plain, key=_rank)), tuple(sorted(inverse, key=_rank))
    signs = "+-" if kind == "sum" else "*/"
    text = signs[0].join(_operand_text(kind, operand) for operand in plain)
    text += "".join(signs[1] + _operand_text(kind, operand) for operand in inverse)
    # Added terms and multiplied factors come first, so if operands and result are natural numbers,
    # the values between are too.
    is_natural = den == 1 and num >= 0 and all(part.is_natural for part in (*plain, *inverse))
    return Expression(kind, text, num, den, is_natural, plain, inverse)


def _rank(operand: Expression) -> tuple[float, str]:
    return -operand.num / operand.den, operand.text  # the largest first


def _operand_text(kind: str, operand: Expression) -> str:
    return f"({operand.text})" if kind == "product" and operand.kind == "sum" else operand.text
