"""Exact arithmetic for the values of answers, with a limit on its work.

A value is a fraction of two polynomials with rational coefficients. The atoms of a polynomial are
variables, pi, e, roots of primes (sqrt(12) is 2 * 3^(1/2), i is (-1)^(1/2)) and whatever stays
formal: sin(...), 2004!, x^n. Powers of a root are reduced, so that a + b sqrt(c) has one form, and
two values are equal when their cross products are. What is equal here is equal; what differs here
may still be equal where a formal atom is in it (sin(x)^2 + cos(x)^2 is not 1 here).
"""

import hashlib
import re
from fractions import Fraction
from math import e, fsum, gcd, isfinite, isqrt, pi, prod
from typing import NamedTuple

MAX_BITS = 4096  # of a numerator or denominator: 3^2007 is a gold answer of MATH
MAX_WORK = 4000  # steps per answer: some milliseconds
_PRIMES = [n for n in range(2, 1000) if all(n % d for d in range(2, isqrt(n) + 1))]

# The k-th root of n is ("", k, n); any other atom is (name, 0, 0).
Atom = tuple[str, int, int]
Term = tuple[tuple[Atom, int], ...]  # atoms with their powers, sorted
Polynomial = dict[Term, Fraction]  # without zeros


class Refused(Exception):
    """A text is no answer that is read, or costs too much; never leaves the judge."""


class Exact(NamedTuple):
    top: Polynomial
    bottom: Polynomial


_ONE: Polynomial = {(): Fraction(1)}


def number(value: Fraction | int) -> Exact:
    return Exact({(): Fraction(value)} if value else {}, _ONE)


def symbol(name: str) -> Exact:
    return Exact({((("", 2, -1) if name == "i" else (name, 0, 0), 1),): Fraction(1)}, _ONE)


def formal(name: str, *arguments: Exact) -> Exact:
    """Return name(arguments) as an atom; its name has a fixed length, however deep it nests."""
    forms = [[sorted(side.items()) for side in argument] for argument in arguments]
    return symbol(name + "#" + hashlib.blake2b(repr(forms).encode(), digest_size=16).hexdigest())


def rational(value: Exact) -> Fraction | None:
    """Return the value if it is a rational number, else None."""
    if value.bottom != _ONE or value.top.keys() - {()}:
        return None
    return value.top.get((), Fraction(0))


# Constants, and atoms that an operation made: "pi = 3" and "2^n = 8" give no value a name.
_NOT_NAMED = re.compile(r"pi|infty|degree|(?:power|root .*|!|base .*)#.*", re.DOTALL)


def is_name(value: Exact) -> bool:
    """Say whether the value is one variable, or one f(x), |x| or sin x."""
    if value.bottom != _ONE or list(value.top.values()) != [1]:
        return False
    (term,) = value.top
    if not term or (len(term) > 1 and any(name[:4] != "abs#" for (name, _, _), _ in term)):
        return False  # of products, |AB| is one
    return all(p == 1 and not k and not _NOT_NAMED.fullmatch(name) for (name, k, _), p in term)


def names(value: Exact) -> set[str]:
    """Return the names in a value: letters, constants, formal atoms; "" of a root."""
    return {name for side in value for term in side for (name, _, _), _ in term}


def approximate(value: Exact) -> float | None:
    """Return a real number near the value; None where a letter is in it, or too much cancels."""
    sides = []
    try:
        for side in value:
            terms = [float(c) * prod(_real(*factor) for factor in term) for term, c in side.items()]
            sides.append(fsum(terms))
            if terms and not abs(sides[-1]) > 1e-9 * max(map(abs, terms)):  # nan: a letter
                return None
        near = sides[0] / sides[1]
        return near if isfinite(near) else None
    except (ArithmeticError, ValueError):
        return None


def _real(atom: Atom, power: int) -> float:
    name, k, n = atom
    if k and n > 0:
        return n ** (power / k)
    return {"pi": pi, "e": e}.get(name, float("nan")) ** power


def is_formal(name: Exact) -> bool:
    return any("#" in text for text in names(name))


class Algebra:
    """Arithmetic on Exact values; raises Refused when the work or a number grows too large."""

    def __init__(self):
        self.work_left = MAX_WORK

    def spend(self, steps: int) -> None:
        self.work_left -= steps
        if self.work_left < 0:
            raise Refused("too much work")

    def _checked(self, coefficient: Fraction) -> Fraction:
        bits = max(coefficient.numerator.bit_length(), coefficient.denominator.bit_length())
        if bits > MAX_BITS:
            raise Refused("number too large")
        self.spend(1 + bits // 256)
        return coefficient

    def _collect(self, terms: list[tuple[Term, Fraction]]) -> Polynomial:
        total: Polynomial = {}
        for term, coefficient in terms:
            total[term] = self._checked(total.get(term, 0) + coefficient)
        return {term: coefficient for term, coefficient in total.items() if coefficient}

    def _term(self, powers: dict[Atom, int]) -> tuple[Term, Fraction]:
        """Reduce the powers of roots: the term that is left, and its rational factor."""
        factor, kept = Fraction(1), []
        for atom, power in sorted(powers.items()):
            _, k, n = atom
            if k:
                whole, power = divmod(power, k)
                factor *= self._raise(Fraction(n), whole)
            if power:
                kept.append((atom, power))
        return tuple(kept), factor

    def _raise(self, base: Fraction, power: int) -> Fraction:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(base) != 1 and bits * abs(power) > 2 * MAX_BITS:
            raise Refused("number too large")
        # Of 1 and -1 any power is cheap, and only its parity counts.
        return self._checked(base ** (power % 2 if abs(base) == 1 else power))

    def _times(self, a: Polynomial, b: Polynomial) -> Polynomial:
        if a == _ONE or b == _ONE:
            return b if a == _ONE else a
        products = []
        for term_a, coefficient_a in a.items():
            for term_b, coefficient_b in b.items():
                self.spend(1 + len(term_a) + len(term_b))
                powers = dict(term_a)
                for atom, power in term_b:
                    powers[atom] = powers.get(atom, 0) + power
                term, factor = self._term(powers)
                products.append((term, coefficient_a * coefficient_b * factor))
        return self._collect(products)

    def add(self, a: Exact, b: Exact, sign: int = 1) -> Exact:
        if a.bottom == b.bottom:
            terms = [*a.top.items(), *((term, sign * c) for term, c in b.top.items())]
            return Exact(self._collect(terms), a.bottom)
        left, right = self._times(a.top, b.bottom), self._times(b.top, a.bottom)
        terms = [*left.items(), *((term, sign * c) for term, c in right.items())]
        return Exact(self._collect(terms), self._times(a.bottom, b.bottom))

    def multiply(self, a: Exact, b: Exact) -> Exact:
        return Exact(self._times(a.top, b.top), self._times(a.bottom, b.bottom))

    def divide(self, a: Exact, b: Exact) -> Exact:
        if not b.top:
            raise Refused("division by zero")
        if len(b.top) > 1:
            return Exact(self._times(a.top, b.bottom), self._times(a.bottom, b.top))
        # One term has an inverse of one term: 1/sqrt(2) is sqrt(2)/2, 1/x is x^-1.
        ((term, coefficient),) = b.top.items()
        inverse_term, factor = self._term({atom: -power for atom, power in term})
        inverse = Exact({inverse_term: factor / coefficient}, _ONE)
        return self.multiply(Exact(self._times(a.top, b.bottom), a.bottom), inverse)

    def power(self, base: Exact, exponent: Exact) -> Exact:
        power = rational(exponent)
        if power is None:
            return self._symbolic_power(base, exponent)
        if power.denominator > 1:
            if power.denominator > 64:
                raise Refused("root too high")
            return self.root(self.power(base, number(power.numerator)), power.denominator)
        if power < 0:
            return self.divide(number(1), self.power(base, number(-power)))
        if not power and not base.top:
            raise Refused("0^0")
        count = int(power)
        if base.bottom == _ONE and len(base.top) == 1:
            ((term, coefficient),) = base.top.items()
            if count.bit_length() > 64:
                raise Refused("power too high")
            raised, factor = self._term({atom: n * count for atom, n in term})
            return Exact({raised: self._checked(self._raise(coefficient, count) * factor)}, _ONE)
        if count > 64:
            raise Refused("power too high")
        result = number(1)
        for _ in range(count):
            result = self.multiply(result, base)
        return result

    def _symbolic_power(self, base: Exact, exponent: Exact) -> Exact:
        """Return base^exponent in one form: 2^{n+1} is 2 * 2^n, 4^n is 2^{2n}, a^m a^n is a^{m+n}.

        A sum in the exponent becomes a product, a positive factor of the base its primes; others
        stay: (ab)^n is not a^n b^n where n is 1/2 and both are negative.
        """
        parts = [(base, Fraction(1))]
        (term, factor), *more = base.top.items() or [((), Fraction(0))]
        if not more and base.bottom == _ONE and factor > 0:
            primes = _prime_powers(factor.numerator, 1)
            primes += [(p, -count) for p, count in _prime_powers(factor.denominator, 1)]
            self.spend(sum(abs(count) for _, count in primes))
            primes += [(n, Fraction(power, k)) for (_, k, n), power in term if k and n > 0]
            rest = tuple((atom, power) for atom, power in term if not atom[1] or atom[2] < 0)
            parts = [(number(prime), Fraction(count)) for prime, count in primes]
            parts += [(Exact({rest: Fraction(1)}, _ONE), Fraction(1))] if rest else []
        result = number(1)
        for part, count in parts:
            if exponent.bottom != _ONE:
                whole = self.multiply(exponent, number(count))
                result = self.multiply(result, formal("power", part, whole))
                continue
            for term, coefficient in exponent.top.items():
                times = coefficient * count
                if not term:
                    factor = self.power(part, number(times))
                elif times.denominator == 1 and abs(times) <= 64:
                    atom = formal("power", part, Exact({term: Fraction(1)}, _ONE))
                    factor = self.power(atom, number(times))
                else:
                    factor = formal("power", part, Exact({term: times}, _ONE))
                result = self.multiply(result, factor)
        return result

    def root(self, value: Exact, k: int) -> Exact:
        """Return the k-th root: the real one, or for sqrt of a negative number i times it."""
        inside = rational(value)
        if inside is None or not 2 <= k <= 64:
            return formal(f"root {k}", value)
        # (a/b)^(1/k) = (a b^(k-1))^(1/k) / b
        whole = inside.numerator * self._raise(Fraction(inside.denominator), k - 1).numerator
        if whole < 0 and k > 2 and k % 2 == 0:
            raise Refused("root of a negative number")
        powers: dict[Atom, int] = {}
        factor = Fraction(1, inside.denominator)
        if whole < 0:
            factor, powers = (-factor, {}) if k > 2 else (factor, {("", 2, -1): 1})
        if not whole:
            return number(0)
        for prime, count in _prime_powers(abs(whole), k):
            outside, left = divmod(count, k)
            factor *= prime**outside
            if left:
                shared = gcd(left, k)
                powers[("", k // shared, prime)] = left // shared
        self.spend(100)
        return Exact({tuple(sorted(powers.items())): self._checked(factor)}, _ONE)

    def absolute(self, value: Exact) -> Exact:
        """Return |value|, of which |1 - x| and |x - 1|, |2x| and 2|x|, |xy| and |x||y| are one
        form, and |1 - sqrt(2)| is sqrt(2) - 1."""
        if not value.top:
            return value
        lead = value.top[max(value.top)]
        form = Exact({term: c / lead for term, c in value.top.items()}, value.bottom)
        near = approximate(form)
        if near:
            return self.multiply(number(abs(lead) if near > 0 else -abs(lead)), form)
        result = number(abs(lead))
        if len(form.top) > 1 or form.bottom != _ONE:
            return self.multiply(result, formal("abs", form))
        for atom, power in next(iter(form.top)):
            one = Exact({((atom, 1),): Fraction(1)}, _ONE)
            if atom == ("", 2, -1):
                continue  # |i| is 1
            positive = (atom[1] and atom[2] > 0) or atom[0] in ("pi", "e") or atom[0][:4] == "abs#"
            one = one if positive else formal("abs", one)
            result = self.multiply(result, self.power(one, number(power)))
        return result

    def equal(self, a: Exact, b: Exact) -> bool:
        return a == b or self._times(a.top, b.bottom) == self._times(b.top, a.bottom)

    def proportional(self, a: Exact, b: Exact) -> bool:
        """Say whether a = 0 and b = 0 are one equation: a is b times a rational number."""
        if not a.top or not b.top or a.top.keys() != b.top.keys():
            return False
        term = next(iter(a.top))
        ratio = self._checked(a.top[term] / b.top[term])
        return all(c == ratio * b.top[term] for term, c in a.top.items())


def _prime_powers(n: int, k: int) -> list[tuple[int, int]]:
    """Factor n by small primes. What is left counts as a prime, or as its k-th root's k-th power:
    another factoring of it would only miss an equality."""
    found = []
    for prime in _PRIMES:
        if prime * prime > n:
            break
        count = 0
        while n % prime == 0:
            n, count = n // prime, count + 1
        if count:
            found.append((prime, count))
    if n == 1:
        return found
    square = isqrt(n)
    if k == 2 and square * square == n:
        return [*found, (square, 2)]
    return [*found, (n, 1)]
