r"""Finds the answer that a completion gives.

`extract_answer` looks, in this order, for

    "answer tag"  the last <answer>...</answer>, or the answer given inside
    "boxed"       the last \boxed{...} whose braces balance, with those that it is joined to:
                  "\boxed{3} and \boxed{5}" is "3, 5"
    "####"        the rest of the last line with ####, unless it is a heading
    "phrase"      after the last "The answer is", "Final Answer", "Ans:", "答案是", "答：", ...
    "choice"      after the last "option (C)", "故选 C", ...
    "last math"   only where it is asked for: the last formula, if the last sentence holds it

What <think>...</think> holds, or a <think> that is not closed, is no answer; neither is a tag or a
box that holds nothing. Whether an answer is right is the business of answers.py.
"""

import re
from typing import NamedTuple

from nanomath.judge.reader import MAX_CHARS, read_value
from nanomath.judge.tokens import option_letter

MAX_COMPLETION = 50_000
MAX_JOINED = 20  # boxes that give one answer together
MAX_LINES = 8  # with #### or a phrase that are looked at, from the last on
MAX_GAP = 80  # characters between two of them


class Extraction(NamedTuple):
    answer: str | None
    rule: str  # which rule matched; "none"


_THINK = re.compile(r"<(/?)(?i:think(?:ing)?)>")
_TAGS = re.compile(r"<(/?)answer>")
_FIRST_BOX = re.compile(r"(?<!\\)\\++(?:boxed|fbox)")  # \\++: no way back, so linear
_BRACES = re.compile(r"\\(?:boxed|fbox)[ \t]{0,9}(?P<open>\{)?|\\.|[{}]", re.DOTALL)
# "\boxed 5" or "\boxed x$", but not the words after "inside \boxed".
_BARE = re.compile(r"\s?((?=[^\s${}\\.,]{0,49}\d)[^\s${}\\.,]{1,50}|[a-zA-Z](?=\s?(?:[$.,;]|$)))")
_EMPTY = re.compile(
    r"(?:[\s~_?.…$*{}-]|\\[,;:!_ ]|\\q?quad|\\[cl]?dots|\\(?:text|mbox|h?phantom)(?=\{)"
    r"|(?i:(?:your |the )?(?:final )?answer(?: here)?)|答案)*"
)
_SPACE = r"(?:[\s$*~]|\\[,;: ()\[\]]|\\q?quad)*"
_JOIN = (
    r"(?:[,，、;；&]|\(?\b(?:and|or)\b|和|或|与|以?及|\\(?:text|mbox)\s?\{\s*,?\s*(?:and|or)\s*\})"
)
_UNIT = r"(?:\\(?:text|mbox|mathrm)\s?\{[^{}]{1,20}\}|[ck]?m|k?g|\\?%|°|\^\\circ|\^\{\\circ\})"
_LABEL = r"(?:\((?:[a-z]|\d|i{1,3})\)|[a-zA-Z](?:_\{?\w{1,3}\}?)?\s*=)"
_BETWEEN = re.compile(rf"{_SPACE}(?:{_UNIT}{_SPACE})?(?:{_JOIN}{_SPACE})+(?:{_LABEL}{_SPACE})?")
_HASHES = re.compile(r"####(?!#)\s*([^\n]*)")
_NUMBERED = re.compile(r"\d{1,3}[.)、]\s*[^\W\d]")  # "2. Conclusion"
_HEADING = r"(?:the |your )?(?:final )?(?:answers?|ans|答案)"
_PHRASE = re.compile(
    r"(?:final (?:answer|result)|the (?:correct |right )?answers?"
    r"(?: to (?:this|the) (?:question|problem))?|最终结果|答案)\s{0,3}"
    r"(?:(?:is|are|(?:would|will|must|should) be|equals|comes out (?:to be|to|as))\b"
    r"|=|[-–—](?=\s)|(?:应该?|就)?[是为]|等于)\s{0,3}[:：]?"
    r"(?:\s{0,3}(?:therefore|thus|simply|just|option|choice)\b)?"
    r"|(?:answers?|答案)(?:\*\*)?\s{0,3}[:：](?:\*\*)?|(?<!解)答[:：]|\bans\.?\s{0,3}[:：=]"
    rf"|[【\[]答案[】\]]|^[#>*_ \t]{{0,9}}{_HEADING}[*_:： \t]{{0,9}}\n",  # a heading
    re.IGNORECASE | re.MULTILINE,
)
_CHOICE = re.compile(
    r"(?:(?i:correct (?:option|choice)|option|choose|choice)(?: is)?|故?选(?:项|择)?)"
    r"\s?[:：]?\s?[(（]?([A-J]{1,4})(?![a-zA-Z])"
    r"(?![)）]?\s?(?:or|and|,|、|或|和)\s?[(（]?[A-J])"  # two are no choice
)
_MATH = re.compile(
    r"(?P<dollars>\$\$?)(?P<a>(?:\\.|[^$\\]){1,1000})(?P=dollars)"
    r"|\\\[(?P<b>(?:\\[^\[\]]|[^\\]){1,1000})\\\]|\\\((?P<c>(?:\\[^()]|[^\\]){1,1000})\\\)",
    re.DOTALL,
)
_GOES_ON = re.compile(r"\s*(?:[;；,，、]|(?:and|or)\b|[和或])|\w")
_SENTENCE_END = re.compile(
    r"\n|。|(?:,? (?:so|because|since|which)|[,;] (?:and )?(?:I|we|this|it|where|as))(?:\s|$)"
    r"|(?<!\b[ap]\.m)(?<!Mrs)(?<!\b[MDS][rst])(?<!\bsq)\.(?=\s|\*|$)"
)
_EMPTY_BOX = re.compile(r"\([^()]{0,60}\\boxed\s?\{\s*\}\)|\\boxed\s?\{\s*\}")
# A sentence says a number by a verb; one that denies, hedges or compares says none.
_SAYS = re.compile(
    r"\b(?:is|are|was|were|be|has|have|had|needs?|gets?|got|makes?|made|takes?|took|costs?|pays?|paid"
    r"|spends?|spent|earns?|earned|sells?|sold|buys?|bought|eats?|ate|left|remains?|contains?|weighs?"
    r"|can|will|should|must)\b|[有是为剩需要买卖花吃用得走跑做看能会应共了]"
)
_DENIES = re.compile(
    r"\b(?:not?|never|neither|nor|or|and|maybe|either|about|around|between|than|least|most|almost"
    r"|nearly|approximately|up to|half|twice|double)\b|n't|[不没非无约或和]|[至最][少多]|超过|左右"
)
_NUMERAL = re.compile(
    r"(?<![a-zA-Z0-9.,/])[-+]?[$￥]?\d{1,50}(?:,\d{3}){0,9}(?:\.\d{1,50})?(?:/\d{1,50})?%?"
    r"(?:[\u4e00-\u9fff]+"  # its unit
    r"| (?!(?:in|left|more|of|for|per|on|at|to|from|each|total|times|altogether)\b)[a-zA-Z]+)?"
)


def extract_answer(text: str, *, last_math: bool = False) -> Extraction:
    """Return the answer a completion gives, and the rule that found it.

    Only the last MAX_COMPLETION characters are looked at: the cost must not grow with the text.
    """
    text = _outside_thinking(text)[-MAX_COMPLETION:]
    if (inside := _last_tag(text)) is not None:
        return Extraction(extract_answer(inside).answer or inside.strip(), "answer tag")
    if (answer := _last_boxes(text)) is not None:
        return Extraction(answer, "boxed")
    if (answer := _after_hashes(text)) is not None:
        return Extraction(answer, "####")
    for phrase in reversed([*_PHRASE.finditer(text)][-MAX_LINES:]):  # the last may be cut
        if answer := _phrase_answer(text[phrase.end() :][: MAX_CHARS + 10]):
            return Extraction(answer, "phrase")
    choices = list(_CHOICE.finditer(text))
    if choices:
        return Extraction(choices[-1][1], "choice")
    if last_math and (answer := _last_formula(text[-2 * MAX_CHARS :])):
        return Extraction(answer, "last math")
    return Extraction(None, "none")


def _outside_thinking(text: str) -> str:
    """Return what follows the last </think>, up to a <think> that is not closed."""
    begin, end = 0, len(text)
    for match in _THINK.finditer(text):
        if match[1]:
            begin, end = match.end(), len(text)
        else:
            end = min(end, match.start())
    return text[begin:end]


def _last_tag(text: str) -> str | None:
    found = start = None
    for match in _TAGS.finditer(text):
        if not match[1]:
            start = match.end()
        elif start is not None:
            inside, start = text[start : match.start()], None
            found = inside if inside.strip() else found
    return found


def _last_boxes(text: str) -> str | None:
    """Return what the last balanced \\boxed{...} holds, and those joined to it, as a list."""
    answers: list[str] = []
    later = 0  # where the box after this one begins
    for begin, start, end in reversed(_boxes(text)):
        inside = text[start:end].strip()
        if _EMPTY.fullmatch(inside):
            continue
        if answers:
            gap = text[end:later].removeprefix("}") if later - end <= MAX_GAP else ""
            if not _BETWEEN.fullmatch(gap) or len(answers) == MAX_JOINED:
                break
        answers.append(inside)
        later = begin
    answers = [*dict.fromkeys(reversed(answers))]
    if len(answers) == 2 and read_value(answers[0]) == read_value(answers[1]):
        del answers[0]  # one answer in two spellings
    return ", ".join(answers) or None


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """Return where each box and its content begin and where the content ends, the innermost of
    nested ones, in one pass over the braces."""
    opened: list[tuple[int, int] | None] = []  # of each open brace, the box's; None: no box
    boxes: list[tuple[int, int, int]] = []
    first = _FIRST_BOX.search(text)
    for match in _BRACES.finditer(text, first.start()) if first else ():
        if match["open"]:
            opened.append((match.start(), match.end()))
        elif match[0] == "{":
            opened.append(None)
        elif match[0] == "}":
            box = opened.pop() if opened else None
            if box is not None and (not boxes or box[0] > boxes[-1][0]):
                boxes.append((*box, match.start()))
        elif match[0].startswith((r"\boxed", r"\fbox")) and (
            token := _BARE.match(text, match.end())
        ):
            boxes.append((match.start(), *token.span(1)))
    return boxes


def _after_hashes(text: str) -> str | None:
    """Return the rest of the last line with #### that is no heading of what follows."""
    matches = [*_HASHES.finditer(text)][-MAX_LINES:]
    for match in reversed(matches):
        line = match[1].rpartition("####")[2].strip(" \t*")
        phrases = [*_PHRASE.finditer(line)]
        if phrases and (answer := _phrase_answer(line[phrases[-1].end() :])):
            return answer
        is_title = _NUMBERED.match(line) or read_value(line).kind == "text"
        if not line or (is_title and text[match.end() :].strip()):
            continue
        if match is not matches[-1] and _PHRASE.search(text, match.end()):
            return None  # "#### 1. ...", "#### Conclusion", "The answer is"
        return line
    return None


def _phrase_answer(rest: str) -> str | None:
    rest = _EMPTY_BOX.sub("", rest).strip(" \t\n*:：`>")
    if (match := _MATH.match(rest)) and not _GOES_ON.match(rest, match.end()):
        return _content(match)
    line = _SENTENCE_END.split(rest.partition("\n")[0], maxsplit=1)[0].strip(" *`")
    return option_letter(line) or _number_said(line) or line or None


def _number_said(line: str) -> str | None:
    """Return the one number that a sentence says: 12 apples of "She has 12 apples left"."""
    formulas, words = [*_MATH.finditer(line)], _MATH.sub("", line)
    if not _SAYS.search(words) or _DENIES.search(words) or re.search(r"\\[^$%]", words):
        return None
    numerals = [*_NUMERAL.finditer(words)]
    if len(formulas) + len(numerals) != 1:
        return None
    return _content(formulas[0]) if formulas else numerals[0][0]


def _last_formula(text: str) -> str | None:
    formulas = [*_MATH.finditer(text)]
    if not formulas or re.search(r"[.!?]\s+\S|[。！？\n]\s*\S", text[formulas[-1].end() :]):
        return None
    return _content(formulas[-1])


def _content(match: re.Match) -> str:
    return next(filter(None, match.group("a", "b", "c"))).strip()
