r"""Reads an answer, LaTeX or plain text, English or Chinese, to an exact value.

    answer  := part (";" part)*
    part    := item (("," | "and" | "or") item)*
    item    := side (("=" | "<" | ... | "\in" | ":") side)*
    side    := sum ("\cup" sum)* [unit]
    sum     := product (("+" | "-" | "\pm") product)*
    product := factor (["*" | "/"] factor)*
    factor  := signs primary ["!" | "%" | "\degree"] ["^" exponent]
    primary := number | letter | command | "|" sum "|" | a bracket of items: (a), (a, b], \{a, b\}

`read_value` never raises: a text that is not read has kind "text" and is compared as a string.
Nothing is evaluated by Python; the caps, and the work limit of exact.py, bound the time.
"""

import re
from fractions import Fraction
from math import comb, factorial

from nanomath.judge.exact import (
    Algebra,
    Exact,
    Refused,
    formal,
    number,
    rational,
    symbol,
)
from nanomath.judge.tokens import (
    FUNCTIONS,
    MAX_DIGITS,
    WRAPPERS,
    Token,
    choice_letters,
    inside_text_command,
    is_applied,
    is_words,
    normalise,
    option_letter,
    spell_out,
    tokenize,
    unit_of,
    without_text_commands,
    words_ahead,
)
from nanomath.judge.values import (
    EMPTY,
    REALS,
    SETS_IN_WORDS,
    Value,
    close,
    is_call,
    joined,
    names_one,
    related,
    scalar,
)

MAX_CHARS = 1000
MAX_DEPTH = 30

_PLAIN = re.compile(r"[-+]?\d{1,100}(?:\.\d{1,100})?")
_LEADING_ZERO = re.compile(r"(?<![\d.,])\d+,0\d")  # "0,001" is no number, and no list
_WORD = re.compile(r"[A-Z]{2,}|[A-Z][a-z]+|yes|no|true|false")


def read_value(text: str, *, thousands: bool = True) -> Value:
    """Read an answer; with thousands=False "1,234" is a list of two numbers."""
    if len(text) > MAX_CHARS:
        return Value("text", label=text.strip())
    if _PLAIN.fullmatch(text):
        return scalar(number(Fraction(text)))
    text = normalise(text)
    text = inside_text_command(text) or text
    shown = without_text_commands(text)
    is_set = r"\mathbb" in text
    if not is_set and (letters := choice_letters(shown)):
        return Value("choice", label=letters)
    if letter := option_letter(shown):
        option = shown.partition(letter)[2].lstrip(").: ")
        return Value("choice", label=letter, items=(read_value(option, thousands=thousands),))
    if shown.casefold() in SETS_IN_WORDS:
        return SETS_IN_WORDS[shown.casefold()]
    try:
        if _WORD.fullmatch(shown) or is_words(shown):
            raise Refused("a word")
        spelled = spell_out(text, thousands=thousands)
        if "," in spelled and _LEADING_ZERO.search(spelled):
            raise Refused("a number wrong in its commas")
        tokens = tokenize(spelled)
        value = Reader(tokens, 1).answer()
        if any(token.text in (r"\pm", r"\mp") for token in tokens):
            value = _both_signs(value, Reader(tokens, -1).answer())
        return value
    except Refused:
        label = re.sub(r"[\s$\"']|\.(?!\d)", "", shown.casefold().removeprefix("the "))
        return Value("text", label=label)


def _both_signs(plus: Value, minus: Value) -> Value:
    if plus.kind == minus.kind == "list" and len(plus.items) == len(minus.items):
        new = [b for a, b in zip(plus.items, minus.items) if a != b]
        return plus._replace(items=(*plus.items, *new))
    return Value("list", items=(plus, minus))


def _exact(value: Value) -> Exact:
    if value.exact is None:
        raise Refused(f"a {value.kind} in a sum")
    if value.label:
        raise Refused("a unit in a product")
    return value.exact


def _finite(value: Value) -> Exact:
    exact = _exact(value)
    if any(name == "infty" for side in exact for term in side for (name, _, _), _ in term):
        raise Refused("infinity in a sum or product")
    return exact


def _whole(value: Value, low: int, high: int) -> int:
    found = rational(_exact(value))
    if found is None or found.denominator > 1 or not low <= found <= high:
        raise Refused(f"not a whole number from {low} to {high}")
    return int(found)


_RELATIONS = ("=", r"\lt", r"\gt", r"\le", r"\ge", r"\ne", r"\in", ":", r"\approx")
_TURNED = {r"\gt": r"\lt", r"\ge": r"\le"}
_ENDS = {*_RELATIONS, ")", "]", "}", r"\}", ",", ";", "&", r"\cr", r"\end", r"\cup", ""}
# Commands that begin no factor of an implicit product.
_NO_FACTOR = _ENDS | {r"\pm", r"\mp", r"\degree", r"\cdot", r"\times", r"\div", r"\|"}
_ACCENTS = {rf"\{name}" for name in ("overline", "bar", "vec", "hat", "dot", "ddot", "tilde")}


class Reader:
    """One reading of the tokens; sign is what a \\pm means in it. Raises Refused."""

    def __init__(self, tokens: list[Token], sign: int):
        self.tokens = [*tokens, Token("end", "")]
        self.position = 0
        self.depth = 0
        self.in_bars = False
        self.signs = {"+": 1, "-": -1, r"\pm": sign, r"\mp": -sign}
        self.algebra = Algebra()

    @property
    def here(self) -> Token:
        return self.tokens[self.position]

    def ahead(self, count: int) -> str:
        """Return the text of a token further on, "" behind the last one."""
        return self.tokens[min(self.position + count, len(self.tokens) - 1)].text

    def take(self, *texts: str) -> str | None:
        """Take the next token if it is one of the texts, and not a word."""
        token = self.here
        if token.text in texts and token.kind not in ("word", "end"):
            self.position += 1
            return token.text
        return None

    def expect(self, *texts: str) -> str:
        found = self.take(*texts)
        if found is None:
            raise Refused("syntax")
        return found

    def answer(self) -> Value:
        parts = [self.part()]
        while self.take(";"):
            parts.append(self.part())
        if self.here.kind != "end":
            raise Refused("syntax")
        return parts[0] if len(parts) == 1 else Value("parts", items=tuple(parts))

    def part(self) -> Value:
        items = self.items()
        return items[0] if len(items) == 1 else joined(items) or Value("list", items=items)

    def items(self) -> tuple[Value, ...]:
        items = [self.item()]
        while self.take(","):
            self.take(",")  # "7, -2, and -5"
            items.append(self.item())
        return tuple(items)

    # Relations

    def item(self) -> Value:
        self.take(r"\approx")  # "about 0.67", alone
        sides, relations = [self.side()], []
        while relation := self.take(*_RELATIONS):
            side = self.side()
            if relation == r"\approx" and (not names_one(sides[-1]) or is_call(sides[-1])):
                sides[-1] = close(sides[-1], side)
                continue
            relations.append(relation.replace(r"\approx", "="))  # of a letter it gives the value
            sides.append(side)
        kinds = set(relations)
        if not relations:
            return sides[0]
        if kinds == {":"}:
            return Value("ratio", items=tuple(sides))
        if kinds <= {"=", r"\in"}:
            return self.equation(sides)
        if kinds <= _TURNED.keys():
            sides, relations = sides[::-1], [_TURNED[relation] for relation in relations[::-1]]
        if not set(relations) <= {r"\lt", r"\le"} and kinds != {r"\ne"}:
            raise Refused("relations")
        return related(sides, relations, self.algebra)

    def equation(self, sides: list[Value]) -> Value:
        """Read "x = 5"; the steps of "x = 10/2 = 5" and of "2 + 3 = 5" are dropped if right."""
        named = names_one(sides[0])
        last = sides[-1].exact
        steps = [side.exact for side in sides[named:]]
        if last and all(step and self.algebra.equal(step, last) for step in steps):
            if len({side.label for side in sides[named:] if side.label}) > 1:
                raise Refused("several units")  # 5 km = 5 cm
            sides = [*sides[:named], sides[-1]]
        if len(sides) == 1:
            return sides[0]
        if len(sides) > 2 or all(side.exact and rational(side.exact) is not None for side in sides):
            raise Refused("several equations, or a wrong one")
        return Value("equation", items=tuple(sides))

    def side(self) -> Value:
        currency = self.take("$") or ""
        value = self.sum()
        if self.here.text == r"\cup":
            items = [value]
            while self.take(r"\cup"):
                items.append(self.sum())
            return Value("union", items=tuple(items))
        unit = self.unit()
        if unit and not value.exact:
            raise Refused("the unit of what is no number")
        return value._replace(label=unit or currency or value.label) if value.exact else value

    def unit(self) -> str:
        """Take %, a degree sign and words with their powers, up to the end of the item."""
        sign = self.take("%", r"\degree")
        if not words_ahead(self.tokens, self.position):
            return (sign or "").replace(r"\degree", "degree")
        in_product = [token.kind for token in self.tokens[: self.position][-2:]] == ["letter"] * 2
        bracketed = self.take("(") is not None
        words, power = [], ""
        while self.here.kind == "word" or self.here.text not in _ENDS - {"}"}:
            token, before = self.here, self.tokens[self.position - 1].text
            if token.kind == "number":
                if before not in ("^", "{", "-") or len(token.text) > 1:
                    raise Refused("another number after the unit")  # "5 feet 3 inches"
                power = f"^{token.text}"
            if token.kind == "word" and re.search(r"\d|\b(?:or|and)\b", token.text):
                raise Refused("more than a unit")  # "5 \\text{ or 6}"
            if token.kind in ("word", "letter"):
                words += re.split(r"[\s*^(),.;:!?-]+", token.text.lower().replace("/", " per "))
            words += ["per"] if token.text in ("/", r"\div") else []
            self.position += 1
        self.take(")")
        if len(words) > 12:
            raise Refused("a sentence")
        unit = unit_of(words, power, bracketed=bracketed)
        if in_product and not unit and words[:1] != ["units"]:
            raise Refused("a sentence")  # x = no solution
        return "%" if sign == "%" else unit_of(["degree", *words], power) if sign else unit

    # Arithmetic. What is no number (a set, a matrix) passes through where it stands alone.

    def sum(self) -> Value:
        value = self.product()
        while sign := self.take(*self.signs):
            left, right = _finite(value), _finite(self.product())
            value = scalar(self.algebra.add(left, right, self.signs[sign]))
        return value

    def product(self) -> Value:
        value = self.factor()
        while True:
            if self.take("*", r"\cdot", r"\times") or self.starts_factor():
                value = self.scaled(_finite(value), self.factor())
            elif self.take("/", r"\div"):
                value = self.scaled(self.algebra.divide(number(1), _finite(self.factor())), value)
            else:
                return value

    def scaled(self, scale: Exact, value: Value) -> Value:
        if value.kind in ("matrix", "tuple") and value.label in ("", "&"):
            cells = tuple(self.scaled(scale, cell) for cell in value.items)
            return value._replace(items=cells)
        is_sign = scale == number(-1)
        return scalar(self.algebra.multiply(scale, (_exact if is_sign else _finite)(value)))

    def starts_factor(self) -> bool:
        """Say whether a factor follows without a sign: 2x, 2(3), 2\\sqrt 3; never "2 3"."""
        token, before = self.here, self.tokens[self.position - 1].text
        if token.kind == "number":  # (n + 1)2^n, 2^n 3^n
            follows = self.tokens[self.position - 1].kind == "letter" or before == "}"
            return before == ")" or (follows and self.ahead(1) == "^")
        if token.text == "|" and token.kind == "symbol":  # 2|x|, where this bar closes nothing
            return not self.in_bars
        if token.text == "[":
            return self.ahead(1) == r"\begin"
        if token.kind == "letter" or token.text in ("(", "{"):
            return not words_ahead(self.tokens, self.position)
        return token.kind == "command" and token.text not in _NO_FACTOR

    def factor(self) -> Value:
        sign = 1
        while taken := self.take(*self.signs):  # a loop: a row of signs costs no depth
            sign *= self.signs[taken]
        value = self.postfix(self.primary())
        if self.take("^"):
            inverse = self.take("-")
            exponent = _exact(self.postfix(self.primary()))
            if inverse:
                exponent = self.algebra.multiply(number(-1), exponent)
            value = self.postfix(scalar(self.algebra.power(_finite(value), exponent)))
        return value if sign == 1 else self.scaled(number(-1), value)

    def postfix(self, value: Value) -> Value:
        while self.here.text in ("!", "%", r"\degree") and self.here.kind != "word":
            following = self.tokens[self.position + 1]
            if self.take("!"):
                if following.text == "!":
                    raise Refused("a double factorial")
                inside = _exact(value)
                n = rational(inside)
                exact = n is not None and 0 <= n <= 100 and n.denominator == 1
                value = scalar(number(factorial(int(n))) if exact else formal("!", inside))
            elif following.text in _ENDS or following.kind == "word":
                break  # the unit of the whole
            else:
                unit = number(Fraction(1, 100)) if self.here.text == "%" else symbol("degree")
                self.position += 1
                value = self.scaled(unit, value)
        return value

    def primary(self) -> Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Refused("too deep")
        token = self.here
        self.position += 1
        if token.kind == "number":
            value = self.number(token.text)
        elif token.kind == "letter":
            value = self.letter(token.text)
        elif token.kind == "command":
            value = self.command(token.text)
        elif token.text in ("(", "[", "{") and token.kind == "symbol":
            value = self.group(token.text)
        elif token.text == "|" and not self.in_bars:
            self.in_bars = True
            value = scalar(self.algebra.absolute(_exact(self.sum())))
            self.in_bars = False
            self.expect("|")
        else:
            raise Refused("syntax")
        self.depth -= 1
        return value

    def number(self, text: str) -> Value:
        mantissa, _, power = text.lower().partition("e")
        if power and abs(int(power)) > MAX_DIGITS:
            raise Refused("exponent too large")
        value = number(Fraction(mantissa.rstrip(".")) * Fraction(10) ** int(power or 0))
        if self.take("_") and (base := rational(_exact(self.primary()))) != 10:
            value = formal(f"base {base}", symbol(text))
        return scalar(value)

    def letter(self, name: str) -> Value:
        if self.take("_"):
            name += "_" + self.index()
        while self.take("'"):
            name += "'"
        power = self.position
        if name in ("f", "g", "h") and self.take("^"):  # f^{-1}(0); but f^2 is a power
            self.primary()
            index = "".join(token.text for token in self.tokens[power : self.position])
            if self.here.text == "(":
                name += index
            else:
                self.position = power
        following = self.tokens[self.position : self.position + 25]
        named = name[:2] in ("f", "g", "h", "f^", "g^", "h^")
        if (named or is_applied(name, following)) and self.take("("):
            arguments = self.items()
            self.expect(")")
            return scalar(formal(name, *map(_exact, arguments)))
        return scalar(symbol(name))

    def index(self) -> str:
        """Take a subscript as it stands: 1, {max}, {i,j}."""
        if not self.take("{"):
            self.position += self.here.kind != "end"
            return self.tokens[self.position - 1].text
        start = self.position
        while self.here.text not in ("}", "{", ""):
            self.position += 1
        inside = "".join(token.text for token in self.tokens[start : self.position])
        self.expect("}")
        return inside.replace("\\", "")  # v_{\max} is v_{\mathrm{max}}

    def group(self, opening: str) -> Value:
        """Read up to the closing bracket: a value in brackets, a tuple, an interval or a set."""
        if opening == r"\{":
            if self.take(r"\}"):
                return EMPTY
            if condition := self.condition():
                return condition
        items = self.items()
        if len(items) == 1 and opening != "{":  # (0; 0; 0); but (0,5; 1) may hold a decimal comma
            while len(items) < MAX_DEPTH and self.take(";"):
                items += (self.item(),)
        closing = self.expect(*{"{": "}", r"\{": [r"\}"]}.get(opening, ")]"))
        if len(items) == 1 and items[0].kind == "matrix" and opening != r"\{":
            return items[0]
        if opening == r"\{" or (opening == "{" and len(items) > 1):
            return Value("list", items=items)
        if len(items) == 1 and opening + closing in ("()", "{}"):
            degrees = items[0].kind == "number" and items[0].label == "degree"
            return self.scaled(symbol("degree"), items[0]) if degrees else items[0]
        return Value("tuple", items=items, label=opening + closing)

    def condition(self) -> Value | None:
        """Read "x : x > 2" and "x \\in \\mathbb{R} | x > 2" of a set, up to its end."""
        bar = 3 if (self.ahead(1), self.ahead(2)) == (r"\in", r"\mathbbR") else 1
        if self.here.kind != "letter" or self.ahead(bar) not in (":", "|"):
            return None
        letter = scalar(symbol(self.here.text))
        self.position += bar + 1
        value = self.part()
        self.expect(r"\}")
        if value.kind != "equation" or value.items[0] != letter or not value.items[1].items:
            raise Refused("a condition")
        return value.items[1]

    def command(self, name: str) -> Value:
        if name == r"\mathbbR":
            return REALS
        if name == r"\emptyset":
            return EMPTY
        if name == r"\frac":
            top = _exact(self.primary())
            return scalar(self.algebra.divide(top, _exact(self.primary())))
        if name == r"\sqrt":
            degree = 2
            if self.take("["):
                degree = _whole(self.sum(), 2, 64)
                self.expect("]")
            return scalar(self.algebra.root(_exact(self.primary()), degree))
        if name == r"\binom":
            n = _whole(self.primary(), 0, 1000)
            return scalar(number(comb(n, _whole(self.primary(), 0, n))))
        if name == r"\{":
            return self.group(name)
        if name == r"\begin":
            return self.matrix()
        if name[1:] in FUNCTIONS:
            return self.function(name[1:])
        if name == r"\abs":
            return scalar(self.algebra.absolute(_exact(self.primary())))
        if name in WRAPPERS and self.here.text == "{":
            return self.primary()
        if name in _ACCENTS:
            return scalar(formal(name, _exact(self.primary())))
        if name in _NO_FACTOR:
            raise Refused("syntax")
        return self.letter(name[1:])  # a Greek letter, or a name that is not known

    def function(self, name: str) -> Value:
        if self.take("_"):
            name += f"_{_exact(self.primary())}"
        exponent = _exact(self.primary()) if self.take("^") else None
        if exponent and rational(exponent) == -1:  # the inverse function, of those that have one
            if name in ("ln", "log", "lg", "exp", "max", "min") or "_" in name:
                raise Refused("an inverse")
            name, exponent = "arc" + name, None
        bracketed = self.here.text in ("(", "{")
        value = self.postfix(self.primary())
        while not bracketed and self.starts_factor() and self.here.text[1:] not in FUNCTIONS:
            value = self.scaled(_exact(value), self.factor())  # sin 2x cos x: up to the cos
        if not bracketed and self.here.text.lower() in (r"\degree", "degree", "degrees"):
            self.position += 1
            value = self.scaled(symbol("degree"), value)
        inside = [_exact(item) for item in (value.items or (value,))]
        if name == "exp":
            result = self.algebra.power(symbol("e"), inside[0])
        else:
            result = formal(name, *inside)
        return scalar(self.algebra.power(result, exponent) if exponent else result)

    def matrix(self) -> Value:
        rows, cells = [], []
        while True:
            if self.here.text != r"\end":  # a last line break may be followed by nothing
                cells.append(self.side())
            if self.take("&"):
                continue
            rows.append(Value("tuple", items=tuple(cells), label="&"))
            cells = []
            if not self.take(r"\cr"):
                self.expect(r"\end")
                return Value("matrix", items=tuple(row for row in rows if row.items))
