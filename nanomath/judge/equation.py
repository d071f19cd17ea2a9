"""Reads an arithmetic expression a model wrote, to its exact value and the numbers it uses.

    sum     := product (("+" | "-") product)*
    product := factor (("*" | "/") factor)*
    factor  := ("+" | "-")* (digits | "(" sum ")")

Nothing is ever evaluated by Python. Only the ASCII digits, + - * / ( ) and spaces are read, white
space around the whole is dropped. What is refused, with the reason given in Reading.error:

    "empty"              nothing but white space
    "too long"           more than MAX_CHARS characters
    "character"          anything else: letters, "=", ".", ",", unicode digits, inner line breaks
    "number too long"    more than MAX_DIGITS digits
    "leading zero"       "03": not a number as it was given ("0" itself is read)
    "too deep"           more than MAX_DEPTH parentheses inside each other
    "syntax"             "**", "//", "2(3)", "(1)(2)", "1 2", a missing operand or parenthesis
    "division by zero"

Signs are read as anyone would: "-3 + 5" is 2, "5 - -3" is 8. The caps bound the work: the slowest
text of MAX_CHARS characters takes a few milliseconds.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARS = 1000
MAX_DIGITS = 10
MAX_DEPTH = 32

_SPACE = " \t\r\n"
_TOKEN = re.compile(r"[0-9]+|[-+*/()]| +|(?P<bad>.)", re.DOTALL)


@dataclass(frozen=True)
class Reading:
    """What a text says: an exact value and its numbers in order, or the reason it is refused."""

    value: Fraction | None = None
    numbers: tuple[int, ...] = ()
    error: str | None = None


class _Refused(Exception):
    """Carries the reason out of the recursion; never leaves this file."""


def read_equation(text: str) -> Reading:
    """Read one expression exactly. Never raises: a text that is not one has its error set."""
    try:
        tokens = _tokens(text)
        reader = _Reader(tokens)
        value = reader.sum(depth=0)
        if reader.position != len(tokens):
            raise _Refused("syntax")
    except _Refused as refused:
        return Reading(error=str(refused))
    return Reading(value, tuple(reader.numbers))


def _tokens(text: str) -> list[str]:
    # Before strip: its cost, too, must not grow with what a model wrote.
    if len(text) > MAX_CHARS:
        raise _Refused("too long")
    tokens = []
    for match in _TOKEN.finditer(text.strip(_SPACE)):
        token = match[0]
        if match["bad"]:
            raise _Refused("character")
        if token[0].isdigit():
            if len(token) > MAX_DIGITS:
                raise _Refused("number too long")
            if len(token) > 1 and token[0] == "0":
                raise _Refused("leading zero")
        if token[0] != " ":
            tokens.append(token)
    if not tokens:
        raise _Refused("empty")
    return tokens


class _Reader:
    def __init__(self, tokens: list[str]):
        self.tokens = tokens
        self.position = 0
        self.numbers: list[int] = []

    def _next_in(self, symbols: str) -> str | None:
        """Take the next token if it is one of the symbols."""
        if self.position < len(self.tokens) and self.tokens[self.position] in symbols:
            self.position += 1
            return self.tokens[self.position - 1]
        return None

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while sign := self._next_in("+-"):
            operand = self.product(depth)
            value = value + operand if sign == "+" else value - operand
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while sign := self._next_in("*/"):
            operand = self.factor(depth)
            if sign == "/" and operand == 0:
                raise _Refused("division by zero")
            value = value * operand if sign == "*" else value / operand
        return value

    def factor(self, depth: int) -> Fraction:
        negative = False
        while sign := self._next_in("+-"):  # a loop: a row of signs costs no depth
            negative ^= sign == "-"
        if self._next_in("("):
            if depth == MAX_DEPTH:
                raise _Refused("too deep")
            value = self.sum(depth + 1)
            if not self._next_in(")"):
                raise _Refused("syntax")
        elif self.position < len(self.tokens) and self.tokens[self.position].isdigit():
            self.numbers.append(int(self.tokens[self.position]))
            self.position += 1
            value = Fraction(self.numbers[-1])
        else:
            raise _Refused("syntax")
        return -value if negative else value
