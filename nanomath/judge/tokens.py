r"""The text of an answer in one spelling, and its tokens: the letters and commands of LaTeX, plain
text, English and Chinese. What they mean is reader.py's business.

Every pattern here takes time linear in the text, or nearly: none can backtrack into itself.
"""

import re
from itertools import pairwise
from typing import NamedTuple

from nanomath.judge.exact import Refused

MAX_DIGITS = 500

_CHARACTERS = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full width
    | {"\u3000": " ", "\xa0": " ", "\u2009": " ", "\u202f": " ", "−": "-", "–": "-", "—": "-"}
    | {"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/"}
    | {"√": r"\sqrt ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne "}
    | {"∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "°": r"\degree ", "℃": r"\degree "}
    | {"、": ",", "。": ".", "￥": "$", "¥": "$", "€": "$", "£": "$"}
    | {"⩽": r"\le ", "⩾": r"\ge ", "≦": r"\le ", "≧": r"\ge "}
    | {name: rf"\mathbb{{{letter}}}" for name, letter in zip("ℤℕℚℂ", "ZNQC")}
    | {"≈": r"\approx ", "≃": r"\approx ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}"}
    | dict.fromkeys("\u200b\u200c\u200d\u200e\u2060\u2061\u2062\ufeff\xad", "")  # without a width
    | dict(zip("½⅓⅔¼¾⅕⅛", (" 1/2 ", " 1/3 ", " 2/3 ", " 1/4 ", " 3/4 ", " 1/5 ", " 1/8 ")))
)
_SCRIPTS = [  # x², 10⁻³, a₁
    (mark, re.compile(f"[{signs}]+"), str.maketrans(signs, "0123456789+-n"[: len(signs)]))
    for mark, signs in (("^", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ"), ("_", "₀₁₂₃₄₅₆₇₈₉₊₋"))
]
_STYLES = "(?:display|text|script|scriptscript)style|limits|bf|it|rm|sf|tt|[Ll]arge|LARGE|[Hh]uge"
_STYLES += "|tiny|small|(?:script|footnote|normal)size|hline|strut|mathstrut|hfill"
_REWRITES = [
    (re.compile(pattern.replace("END", "(?![a-zA-Z])")), replacement)
    for pattern, replacement in (
        (r"\\\\(?:\[[^\]]{0,9}\])?", r"\\cr "),
        (r"\\(?:[dtcs]|nice)(frac|binom)END", r"\\\1"),
        (r"\\frac ?(\d)", r"\\frac{\1}"),  # TeX takes one digit: \frac12, \frac1{10}, \frac{1}2
        (r"(\\frac ?\{[^{}]{0,50}\}) ?(\d)", r"\1{\2}"),
        (r"\\(?:left|right|[bB]igg?[lr]?)END\.?", ""),
        (r"\\(?:text)?color(?:box)? ?(?:\[\w{0,9}\] ?)?\{[^{}]{0,30}\}", " "),
        (r"\\[hv]?(?:phantom|space) ?\*?\{[^{}]{0,30}\}", " "),
        (r"\\(?:[lr]vert|vert|mid)END", "|"),
        (r"\\(?:varnothing|empty)END", r"\\emptyset"),
        (r"\\(?:thickapprox|simeq|approxeq)END", r"\\approx"),
        (rf"\\(?:{_STYLES})END", " "),
        (r"\\(?:mathbb|Bbb) ?(?:\{ ?([A-Z]) ?\}|([A-Z])END)|\\([RZNQC])END", r"\\mathbb{\1\2\3}"),
        (r"\\not ?=", r"\\ne "),
        (r"\^ ?(?:\\circ|\{ ?\\circ ?\})END", r"\\degree "),
        (r"\^ ?(?:\\prime|\{ ?\\prime ?\})END", "'"),
        (r"(?<=\d)(?:, ?\\!|\{,\}|\\,)\s?(?=\d{3}(?!\d))", ""),  # thousands
        (r"\\!", ""),
        (r"\\[,;:> ]|~|\\(?:q?quad|en(?:space|skip)|(?:neg)?(?:thin|med|thick)space)END", " "),
        (r"\\([$%])", r"\1"),
        (r"\b([apAP])\.[mM]\b\.?", r"\1m"),
        (r"\\([lgn])e[q]END", r"\\\1e"),
        (r"\\([lg])eq(?:slant|q)END", r"\\\1e"),
    )
]
_ROOT = re.compile(r"√\s?(?:\((\d{1,50})\)|(\d{1,50}))")
_TEXT = (
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|normal|up)?|[mhf]box|math(?:rm|bf|it|bb|cal|sf|tt|normal)|emph"
    r"|operatorname\*?|boldsymbol|bm|pmb|underline|ensuremath)\s?"
)
_TEXT_COMMAND = re.compile(_TEXT + r"\{([^{}]*)\}")


def normalise(text: str) -> str:
    """Return the text in one spelling: what `is_strict` compares, and the reader reads."""
    if not text.isascii():
        text = _ROOT.sub(r"\\sqrt{\1\2}", text).translate(_CHARACTERS)
        for mark, run, plain in _SCRIPTS:
            text = run.sub(lambda m, a=mark, b=plain: f"{a}{{{m[0].translate(b)}}}", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = " ".join(text.split())
    for _ in range(3):  # $...$, \(...\), **...** around, and a full stop
        text = re.sub(r"(?<!\.)\.$", "", text.strip(" *")).strip(" *")
        for start, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            if text.startswith(start) and text.endswith(end) and len(text) >= len(start + end):
                text = text[len(start) : len(text) - len(end)]
    return text.strip()


def inside_text_command(text: str) -> str | None:
    """Return what a \\text{...} around the whole answer holds, else None."""
    match = _TEXT_COMMAND.fullmatch(text)
    return None if match is None or text.startswith(r"\math") else match[1].strip()


def without_text_commands(text: str) -> str:
    return _TEXT_COMMAND.sub(r"\1", text).strip()


_CHOICE = re.compile(r"\(?([A-Z]|[A-J](?:[ ,]{0,2}[A-J]){1,9})\)?\.?")
# An option with its text, "(C) 12"; no other letter may stand in it: "(A) or (B)" names two.
_OPTION = re.compile(
    r"(?:\(([A-J])\)|([A-J])[.):])\s*(?![-+*/^=<>,_\s])(?!.*(?<!\w)[A-J](?!\w)).+", re.DOTALL
)


def choice_letters(text: str) -> str:
    """Return the letters of a choice, as a set; those from A on, all of them, are an order."""
    match = _CHOICE.fullmatch(text)
    if not match:
        return ""
    letters = "".join(dict.fromkeys(re.sub("[ ,]", "", match[1])))
    ordered = "".join(sorted(letters))
    return letters if "ABCDEFGHIJ".startswith(ordered) else ordered


def option_letter(text: str) -> str | None:
    """Return the letter of "(C) 12" and "C. 12"."""
    match = _OPTION.fullmatch(text)
    return (match[1] or match[2]) if match else None


_THOUSANDS = re.compile(
    r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])|(?<![\d. ])\d{1,3}(?: \d{3})+$"
)
_MIXED = re.compile(
    r"(?<![\d.^_}])(\d{1,15})"
    r"(?: ?\\frac ?\{(\d{1,15})\} ?\{(\d{1,15})\}(?!\^)| (\d{1,15})/(\d{1,15})(?![\d.^]))"
)
_REPEATING = re.compile(r"(\d{0,50})\.(\d{0,50})\\(?:overline|bar|dot) ?(?:\{(\d{1,50})\}|(\d))")


def spell_out(text: str, *, thousands: bool) -> str:
    """Write repeating decimals and mixed numbers as fractions, and numbers without separators."""
    if thousands and text[:1] not in "([{\\":
        text = _THOUSANDS.sub(lambda match: re.sub("[, ]", "", match[0]), text)
    return _MIXED.sub(_mixed, _REPEATING.sub(_repeating, text))


def _mixed(match: re.Match) -> str:
    """Spell out "3 1/2" and "3\\frac12", where the fraction is proper."""
    whole, top, bottom = match[1], match[2] or match[4], match[3] or match[5]
    return f"({whole}+{top}/{bottom})" if 0 < int(top) < int(bottom) else match[0]


def _repeating(match: re.Match) -> str:
    """Write 0.1\\overline{6} as (16 - 1)/90."""
    whole, start, period = match[1], match[2], match[3] or match[4]
    top = int(whole + start + period) - int(whole + start or 0)
    return f"({top}/{(10 ** len(period) - 1) * 10 ** len(start)})"


# Commands that only change how the braces after them look.
WRAPPERS = frozenset(
    (r"\text", r"\textbf", r"\textit", r"\textrm", r"\textnormal", r"\mbox", r"\fbox", r"\emph")
    + (r"\mathrm", r"\mathbf", r"\mathit", r"\mathsf", r"\mathtt", r"\mathnormal", r"\pmb", r"\bm")
    + (r"\boldsymbol", r"\underline", r"\ensuremath")
)


class Token(NamedTuple):
    kind: str  # number, letter, word, command, symbol, or end
    text: str


_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?(?![eE]?\d))"
    rf"|(?P<text>{_TEXT}\{{(?P<inner>[^{{}}]*)\}})"
    r"|(?P<matrix>\\(?:begin|end)\s?\{(?:(?:[pbB]|small)?matrix\*?|array)\}"
    r"(?:\[[lcrtb]\])?(?:\{(?:[lcr| ]|@\{\})*\})?)"
    r"|(?P<command>\\(?:[a-zA-Z]+|[{}|]))|(?P<letters>[a-zA-Z]+)|(?P<cjk>[\u4e00-\u9fff]+)"
    r"|(?P<symbol>\*\*|<=|>=|!=|[-+*/^_=<>()\[\]{},;:|!'%$&.])|(?P<bad>.)",
    re.DOTALL,
)
_SPELLINGS = {"**": "^", "<=": r"\le", ">=": r"\ge", "!=": r"\ne", "<": r"\lt", ">": r"\gt"}
FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh")
    + ("tanh", "ln", "log", "lg", "exp", "max", "min")
)
_PLAIN_COMMANDS = {name: name for name in (*FUNCTIONS, "sqrt", "pi", "infty")} | {
    "infinity": "infty", "inf": "infty", "oo": "infty", "U": "cup", "union": "cup",
}  # fmt: skip
_JOINING = dict.fromkeys(("and", "or", "和", "或", "与"), ",") | {"percent": "%"}
# Common words of two letters, but "am", "as" and "at", which are products in physics.
_SHORT_WORDS = frozenset(
    ("an", "be", "by", "do", "go", "he", "hi", "if", "in", "is", "it", "me", "my", "no")
    + ("of", "ok", "on", "or", "so", "to", "up", "us", "we")
)
# After a number these words change it or speak of it; "3 squared" does, "3 cm squared" does not.
_NO_UNITS = re.compile(
    "plus|minus|negative|divided|multiplied|added|subtracted|raised|mod|modulo|factorial|than|not|no"
    "|never|none|nor|neither|cannot|without|except|unless|if|but|wrong|false|incorrect|invalid|maybe"
    "|untrue|perhaps|is|are|was|were|be|permille|least|most|on|so|[a-z]{1,20}n['’]t"
)
_ORDINALS = "third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|twelfth|twentieth|hundredth"
_ORDINALS += r"|thousandth|[a-z]{1,12}illionth|quarter"
_NUMBER_WORD = re.compile(
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|half|halves|twice|hundreds?"
    "|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|dozens?"
    rf"|thousands?|[a-z]{{1,12}}illions?|(?:{_ORDINALS})s|.*[不没错非无半一二三四五六七八九十].*"
)
_POWERS = {"square": "^2", "sq": "^2", "squared": "^2", "cubic": "^3", "cubed": "^3"}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_SCALES |= {"trillion": 10**12}
_SCALES |= {"百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_SCALE = re.compile(rf"({'|'.join(_SCALES)})(?![a-zA-Z克米瓦分])\s*")
# Units that must agree where both answers give one; other words after a number are ignored.
_UNITS = {
    name: names.split()[0]
    for names in (
        "cm centimeter centimetre 厘米", "mm millimeter millimetre 毫米", "m meter metre 米",
        "km kilometer kilometre 千米", "ft foot feet", "inch in inche", "mile mi", "yard yd",
        "g gram gm 克", "kg kilogram 千克", "lb pound", "$ dollar usd 元", "cent",
        "second sec s 秒", "minute min 分钟", "hour hr h 小时", "day 天", "week", "year 年",
        "am a.m.", "pm p.m.", "liter litre l 升", "ml milliliter millilitre 毫升", "degree",
    )
    for name in names.split()
}  # fmt: skip
_UNITS |= {"mph": "mile/hour", "kph": "km/hour"}
_GLUED = frozenset(_UNITS)  # "3cm"; but "3mg" is a product
_UNITS |= {
    name: names.split()[0]
    for names in (
        "mg milligram 毫克", "ton tonne 吨", "oz ounce", "cl centiliter centilitre", "pint pt",
        "dl deciliter decilitre", "kl kiloliter kilolitre", "quart qt", "gallon gal", "acre",
        "dm decimeter decimetre 分米", "nm nanometer nanometre", "hectare ha 公顷",
        "month", "ms millisecond", "decade", "century centurie", "euro", "nickel", "dime",
        "w watt", "kw kilowatt", "hz hertz", "j joule", "n newton", "v volt", "pa pascal", "kpa",
        "ohm", "mol mole", "角", "rad radian", "celsius c", "fahrenheit f", "ampere amp",
        "khz kilohertz", "mhz megahertz", "kj kilojoule", "kwh", "kv kilovolt", "mw megawatt",
        "um micrometer micrometre micron", "kn kilonewton",
    )
    for name in names.split()
}  # fmt: skip


def is_word(run: str) -> bool:
    """Say whether a run of letters is a word. A product has two letters or three: without a vowel
    ("zyx"), or in the order of the alphabet, in which no other run has the same ("abx")."""
    if len(run) == 1 or run in _PLAIN_COMMANDS:
        return False
    lower = run.lower()
    if len(run) == 2:
        return lower in _SHORT_WORDS
    ordered = all(a < b for a, b in pairwise(lower)) or set(lower) <= set("abcd")
    return len(run) > 3 or (not ordered and not set(lower).isdisjoint("aeiou"))


_PLAIN_TEXT = re.compile(r"[A-Za-z][A-Za-z .,'?!-]*")
_JOINING_WORD = re.compile(r"\b(?:and|or|percent)\b")


def is_words(text: str) -> bool:
    """Say whether an answer is plain words: no digit, no mark of math, and a word among the runs of
    letters, or a blank between them; "x and y" and "sin x" are none, "x cm" is an amount."""
    if not _PLAIN_TEXT.fullmatch(text):
        return False
    for phrase in re.split(r"[.,?!-]", _JOINING_WORD.sub(",", text)):
        runs = re.findall("[A-Za-z]+", phrase)
        amount = bool(runs) and _unit(runs[-1].lower()) and len(runs[-1]) > 1 < len(runs)
        if amount and all(len(run) == 1 and run not in "aAI" for run in runs[:-1]):
            continue
        long = [run for run in runs if len(run) > 1 and run not in _PLAIN_COMMANDS]
        if any(map(is_word, runs)) or (long and len(runs) > 1):
            return True
    return False


def tokenize(text: str) -> list[Token]:
    """Return the tokens of a normalised text, without spaces. Raises Refused."""
    tokens: list[Token] = []
    spaced = False
    for match in _TOKEN.finditer(text):
        kind, piece = match.lastgroup, match[0]
        if kind == "bad" or (kind == "number" and len(piece) > MAX_DIGITS):
            raise Refused("character" if kind == "bad" else "number too long")
        after_number = bool(tokens) and tokens[-1].kind == "number"
        if piece == "$":  # "18$"; elsewhere it only marks math or an amount
            tokens += [Token("word", "$")] if after_number and not spaced else []
        elif kind in ("text", "inner"):
            tokens += _text_tokens(piece, (match["inner"] or "").strip())
        elif kind in ("letters", "cjk"):
            tokens += _letter_tokens(piece, spaced, tokens)
        elif kind == "matrix":
            tokens.append(Token("command", piece[:4] if piece.startswith(r"\end") else r"\begin"))
        elif kind != "space":
            tokens.append(Token(kind, _SPELLINGS.get(piece, piece)))
        spaced = kind == "space"
    return tokens


def _text_tokens(command: str, inner: str) -> list[Token]:
    if inner in _JOINING:
        return [Token("symbol", _JOINING[inner])]
    if re.fullmatch(r"[-+]?[\d.,/:]{1,50}( ?[apAP][mM])?", inner):
        return tokenize(inner)
    # \mathbf{x} and \mathrm{e} are letters; \mathrm{m} and \text{m} are words, and may be units.
    roman = command.startswith((r"\text", r"\mbox", r"\mathrm", r"\op"))
    if not roman and re.search(r"[\d^_+=<>/()|,-]", inner):
        return [Token("symbol", "{"), *tokenize(inner), Token("symbol", "}")]  # \mathbf{x + 1}
    if command.startswith(r"\mathbb"):
        return [Token("command", rf"\mathbb{inner}")]
    if len(inner) == 1 and (not roman or (inner in "ied" and command.startswith(r"\mathrm"))):
        return [Token("letter", inner)]
    return _word_tokens(inner) if inner else []


def _word_tokens(words: str) -> list[Token]:
    """Return words as one token; those that scale the number before them, as a factor."""
    tokens = []
    while match := _SCALE.match(words):
        tokens += [Token("symbol", "*"), Token("number", str(_SCALES[match[1]]))]
        words = words[match.end() :]
    return [*tokens, Token("word", words)] if words else tokens


# Where a word may begin, which no number, root or power is before: "(ten)", "on/off".
_BEFORE_WORDS = ("(", r"\{", ",", ";", "=", ":", "/")


def _letter_tokens(piece: str, spaced: bool, tokens: list[Token]) -> list[Token]:
    if piece in _JOINING:
        return [Token("symbol", _JOINING[piece])]
    if piece in _PLAIN_COMMANDS:
        return [Token("command", "\\" + _PLAIN_COMMANDS[piece])]
    # Words stand apart or are long; "3qr" and "xy" are products.
    lower, after_number = piece.lower(), bool(tokens) and tokens[-1].kind == "number"
    is_unit = lower.removesuffix("s") in _GLUED or (spaced and after_number and _unit(lower))
    apart = len(piece) > 3 or (len(piece) == 3 and (spaced or piece.istitle() or piece == "not"))
    if spaced and len(piece) == 2:
        apart = is_word(piece) or (after_number and lower in _SHORT_WORDS)
    if not tokens or tokens[-1].text in _BEFORE_WORDS:
        apart = apart or is_word(piece)
    if apart or piece[0] > "\x7f" or (len(piece) > 1 and is_unit and (spaced or after_number)):
        return _word_tokens(piece)
    return [Token("letter", letter) for letter in piece]


def _unit(word: str) -> str:
    return _UNITS.get(word) or _UNITS.get(word.removesuffix("s")) or ""


def unit_of(words: list[str], power: str, *, bracketed: bool = False) -> str:
    """Return the unit that words after a number name, as "cm^2", "m/second" or, where less may be
    said as well, "degree celsius" and "$ /hour"; "" for none that is known.

    Raises Refused where the words say another number, or that it is wrong. In brackets a quarter is
    a coin."""
    words = [word for word in words if word]
    if words[:1] and (words[0] in ("squared", "cubed") or re.fullmatch(_ORDINALS, words[-1])):
        raise Refused("more than a unit")
    for word in words:
        number = _NUMBER_WORD.fullmatch(word) and not (bracketed and word == "quarters")
        variable = not bracketed and len(word) == 1 and "b" <= word <= "z" and not _unit(word)
        if number or variable or _NO_UNITS.fullmatch(word):
            raise Refused("more than a unit")
    power = power or "".join(_POWERS.get(word, "") for word in words)
    if words and (match := re.match("(平方|立方)(.+)", words[0])):
        words, power = [match[2], *words[1:]], "^2" if match[1] == "平方" else "^3"
    place = words.index("per") if "per" in words else len(words)
    top, bottom = (
        next((unit for unit in map(_unit, part) if unit), "")
        for part in (words[:place], words[place + 1 :])
    )
    if top == "degree":
        scale = {"celsius", "fahrenheit"} & set(map(_unit, words))
        top = " ".join([top, *scale])
    if bottom:
        top += (" /" if top in ("$", "cent") else "/") + bottom
    return top + power


def words_ahead(tokens: list[Token], position: int) -> bool:
    """Say whether words follow, as they are or in brackets: "9 apples", "9 (red apples)"."""
    here = tokens[position]
    if here.text != "(" or here.kind == "word":
        return here.kind == "word"
    kinds = []
    for token in tokens[position + 1 : position + 12]:
        if token.text == ")":
            break
        kinds.append(token.kind)
    return "word" in kinds and "number" not in kinds


_GREEK = ("Gamma", "Phi", "Psi", "phi", "psi", "varphi", "zeta")  # functions, before a bracket


def is_applied(name: str, following: list[Token]) -> bool:
    """Say whether a letter is a function of what follows: H(0), P(x); k(k + 1) is a product."""
    base = name.partition("_")[0].rstrip("'")
    if following[0].text != "(" or base in ("e", "i") or (len(base) > 1 and base not in _GREEK):
        return False
    inside = []
    for token in following[1:]:
        if token.text == ")":
            break
        inside.append(token)
    is_sum = any(token.text in ("+", "-", r"\pm", r"\mp") for token in inside[1:])
    return not (is_sum and any(token.kind in ("letter", "command") for token in inside))
