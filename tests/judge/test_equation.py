"""The equation reader: exact values, a stated result for every hostile case, bounded time.

Time is the thread's own CPU time: other work on the machine does not count.
"""

import ast
import operator
import random
import re
import time
import warnings
from fractions import Fraction

import pytest

from nanomath.judge.equation import MAX_CHARS, MAX_DEPTH, MAX_DIGITS, read_equation


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("95 - 21/3", 88, (95, 21, 3)),
        ("(1 + 2) / 3", 1, (1, 2, 3)),
        ("8/(3-8/3)", 24, (8, 3, 8, 3)),
        ("1/3+1/3+1/3", 1, (1, 3, 1, 3, 1, 3)),
        ("10-4-3", 3, (10, 4, 3)),
        ("100/5/2", 10, (100, 5, 2)),
        ("2+3*4", 14, (2, 3, 4)),
        ("7/2*2", 7, (7, 2, 2)),
        ("((((7))))", 7, (7,)),
        ("0*5", 0, (0, 5)),
        (" \n95-21/3\t\r\n", 88, (95, 21, 3)),
    ],
)
def test_reads_exact_values(text, value, numbers):
    """Values are exact fractions with the usual precedence, operators grouping to the left."""
    reading = read_equation(text)
    assert (reading.value, reading.numbers, reading.error) == (Fraction(value), numbers, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [("-3+5", 2), ("--3", 3), ("5 - -3", 8), ("2*-3", -6), ("+4", 4), ("-(1+2)", -3)],
)
def test_reads_signs(text, value):
    """A sign before a number or a parenthesis is read; the number itself has none."""
    reading = read_equation(text)
    assert reading.value == value
    assert all(number >= 0 for number in reading.numbers)


REFUSED = [
    ("", "empty"),
    ("  \n ", "empty"),
    ("95-21/3=88", "character"),
    ("88 = 95-21/3", "character"),
    ("95-21/3.", "character"),
    ("1.5+2", "character"),
    ("1,000", "character"),
    ("5!", "character"),
    ("2^3", "character"),
    ("2 x 3", "character"),
    ("1e3", "character"),
    ("0x10", "character"),
    ("1_000", "character"),
    ("1+\n2", "character"),
    ("1+\t2", "character"),
    ("1+\u00a02", "character"),
    ("\u0661+\u0662", "character"),  # Arabic-Indic digits
    ("\uff11+\uff12", "character"),  # full-width digits
    ("\u00b2+3", "character"),  # superscript two: str.isdigit, not a number
    ("3\u22121", "character"),  # the minus sign of typesetting
    ("3\u00d74", "character"),
    ("\x00", "character"),
    ("\ud800", "character"),
    ("__import__('os').system('true')", "character"),
    ("03+5", "leading zero"),
    ("00", "leading zero"),
    ("2**3", "syntax"),
    ("7//2", "syntax"),
    ("2(3)", "syntax"),
    ("(1)(2)", "syntax"),
    ("(2)3", "syntax"),
    ("1 2", "syntax"),
    ("1+", "syntax"),
    ("*3", "syntax"),
    ("()", "syntax"),
    ("(1+2", "syntax"),
    ("1+2)", "syntax"),
    (")1(", "syntax"),
    ("-", "syntax"),
    ("1/0", "division by zero"),
    ("1/(2-2)", "division by zero"),
    ("0/0", "division by zero"),
    ("9" * (MAX_DIGITS + 1), "number too long"),
    ("9" * 100_000, "too long"),
    ("(" * 1000 + "1" + ")" * 1000, "too long"),
    ("(" * 400 + "1" + ")" * 400, "too deep"),
    (" " * 10_000_000, "too long"),
]


@pytest.mark.parametrize(("text", "error"), REFUSED, ids=range(len(REFUSED)))
def test_refuses_with_the_stated_reason(text, error):
    """Every text that is no plain expression is refused for the reason the module states."""
    start = time.thread_time()
    reading = read_equation(text)
    assert time.thread_time() - start < 0.05
    assert (reading.value, reading.numbers, reading.error) == (None, (), error)


def test_caps_are_inclusive():
    """A text exactly at each cap is read, one beyond is not."""
    assert read_equation("9" * MAX_DIGITS).value == 10**MAX_DIGITS - 1
    assert read_equation("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH).value == 1
    assert read_equation("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1)).error == "too deep"
    full = "1" + "+1" * 499 + " "
    assert len(full) == MAX_CHARS
    assert read_equation(full).value == 500
    assert read_equation(full + " ").error == "too long"
    assert read_equation("-" * 999 + "1").value == -1


def test_slowest_texts_stay_quick():
    """Fractions whose denominators grow with every term end within 50 ms."""
    rng = random.Random(0)
    for sign in ("+1/", "/", "*", "-1/"):
        text = "1"
        while len(text) < MAX_CHARS - 16:
            text += sign + str(rng.randrange(10**9, 10**10))
        start = time.thread_time()
        assert read_equation(text).value is not None
        assert time.thread_time() - start < 0.05


def _oracle(text: str) -> Fraction | None:
    """The value by Python's own grammar, from its syntax tree; None where it is no arithmetic."""
    if re.search(r"\b0\d", text):  # Python itself refuses "07" but reads "00"
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "2(3)" parses as a call, with a warning
            return _walk(ast.parse(text.strip(" "), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, LookupError):
        return None


def _walk(node: ast.AST) -> Fraction:
    operations = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.UAdd: operator.pos,
        ast.USub: operator.neg,
    }
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
        return operations[type(node.op)](_walk(node.operand))
    if isinstance(node, ast.BinOp):
        return operations[type(node.op)](_walk(node.left), _walk(node.right))
    raise LookupError(type(node))


@pytest.mark.parametrize(
    "count", [20_000, pytest.param(100_000, marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_fuzz(count):
    """Random strings never raise and never take 50 ms; the short ones equal Python's value."""
    rng = random.Random(count)
    readable = 0
    worst = 0.0
    for i in range(count):
        if i % 2:
            alphabet, longest = "0123579+-*/() ", MAX_DIGITS + 1
        else:
            alphabet, longest = "0123456789+-*/()  =.^xe\u0663\uff15\n\t\x00\ud800", 1200
        text = "".join(rng.choices(alphabet, k=rng.randrange(longest)))
        start = time.thread_time()
        reading = read_equation(text)
        worst = max(worst, time.thread_time() - start)
        assert (reading.value is None) == (reading.error is not None)
        if i % 2:
            assert reading.value == _oracle(text), text
            readable += reading.value is not None
    assert readable > count / 100  # the comparison was not empty
    assert worst < 0.05


def test_fuzz_grammatical():
    """Random well-formed expressions, spaced and parenthesised at will, have Python's value."""
    rng = random.Random(1)

    def make(depth: int) -> str:
        space = " " * rng.randrange(2)
        if depth == 0 or rng.random() < 0.2:
            return f"{space}{rng.randrange(100)}"
        kind = rng.randrange(6)
        if kind < 4:
            return f"{make(depth - 1)}{space}{'+-*/'[kind]}{make(depth - 1)}"
        return f"{space}({make(depth - 1)}{space})" if kind == 4 else f"{'+-'[depth % 2]}{make(0)}"

    readable = 0
    for _ in range(2000):
        text = make(4)
        reading = read_equation(text)
        assert reading.value == _oracle(text), text
        readable += reading.value is not None
    assert readable > 1500
