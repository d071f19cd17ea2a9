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

import operator
import re
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARS = 1000
MAX_DIGITS = 10
MAX_DEPTH = 32

_SPACE = " \t\r\n"
_TOKEN = re.compile(r"[0-9]+|[-+*/()]| +|(?P<bad>.)", re.DOTALL)
# How tightly each operation binds, and what it does.
_OPERATIONS = {
    "+": (1, operator.add),
    "-": (1, operator.sub),
    "*": (2, operator.mul),
    "/": (2, operator.truediv),
}


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
        rest = ["end", *reversed(tokens)]  # a stack: the next token is the last
        value = _expression(rest, binding=0, depth=0)
        if rest != ["end"]:
            raise _Refused("syntax")
    except _Refused as refused:
        return Reading(error=str(refused))
    except ZeroDivisionError:
        return Reading(error="division by zero")
    return Reading(value, tuple(int(token) for token in tokens if token.isdigit()))


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


def _expression(rest: list[str], binding: int, depth: int) -> Fraction:
    """Take an operand, and more while the operations between them bind more tightly."""
    value = _operand(rest, depth)
    while (operation := _OPERATIONS.get(rest[-1])) and operation[0] > binding:
        rest.pop()
        value = operation[1](value, _expression(rest, operation[0], depth))
    return value


def _operand(rest: list[str], depth: int) -> Fraction:
    negative = False
    while rest[-1] in ("+", "-"):  # a loop: a row of signs costs no depth
        negative ^= rest.pop() == "-"
    token = rest.pop()
    if token == "(":
        if depth == MAX_DEPTH:
            raise _Refused("too deep")
        value = _expression(rest, 0, depth + 1)
        if rest.pop() != ")":
            raise _Refused("syntax")
    elif token.isdigit():
        value = Fraction(int(token))
    else:
        raise _Refused("syntax")
    return -value if negative else value
