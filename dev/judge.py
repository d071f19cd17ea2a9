r"""Measure the judge of answers on the public benchmarks: `python dev/judge.py --data DIR`.

DIR holds the public files as their projects publish them (nanomath/tasks names the sources). For
each gold answer of MATH and GSM8K this makes rewrites that are the same answer and near-misses that
are not, judges them, and prints how many verdicts are right, with every exception; then which golds
are read to an exact value, and how many comparisons a second one core makes. The tests use the same
lists.
"""

import argparse
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from nanomath.judge.answers import extract_answer, is_equivalent
from nanomath.judge.reader import read_value
from nanomath.tasks.benchmarks import BENCHMARKS, read_benchmark

# The forms in which an answer is given; the judge must find it in each.
FORMS = (
    "So it is clear.\nTherefore \\boxed{%s}.",
    "We add the two.\n#### %s",
    "It follows from the first line. The answer is %s.",
    "Final Answer: The final answer is $%s$. I hope it is correct.",
    "**Answer:** %s",
    "<think>It may be 7.</think><answer>%s</answer>",
    "由题意可知,答案是%s。",
    "所以答案为：$%s$",
)


def filled(form: str, gold: str) -> str:
    """Return the completion of this form; a gold that holds dollar signs of its own gets none."""
    form = form.replace("$%s$", "%s") if re.search(r"(?<!\\\\)\$", gold) else form
    return form.replace("%s", " ".join(gold.split()))


def found_again(form: str, gold: str) -> bool:
    """Say whether the gold answer, given in this form, is found and judged right."""
    return is_equivalent(extract_answer(filled(form, gold)).answer or "", gold)


def rows(data: str | os.PathLike, name: str) -> list[dict]:
    text = (Path(data) / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def math_golds(data: str | os.PathLike) -> list[str]:
    return [extract_answer(row["solution"]).answer or "" for row in rows(data, "math_test.jsonl")]


def gsm8k_golds(data: str | os.PathLike) -> list[str]:
    names = ("gsm8k_test.jsonl", "gsm8k_train.jsonl")
    return [row["answer"].split("####")[1].strip() for name in names for row in rows(data, name)]


def other_golds(data: str | os.PathLike) -> dict[str, list[str]]:
    """Return the golds of the other benchmarks, by name."""
    names = [name for name in BENCHMARKS if name not in ("math", "gsm8k")]
    return {name: [p.payload["answer"] for p in read_benchmark(name, data)] for name in names}


# ------------------------------------------------------------------------- rewrites, near-misses

_INTEGER = re.compile(r"-?\d+")
_FRACTION = re.compile(r"\\[dtc]?frac\{(-?\d+)\}\{(\d+)\}")
_NUMBER = re.compile(r"-?(?:\d+|\d+\.\d+|\.\d+)")


def elements(gold: str) -> list[str] | None:
    """Return the elements of a list without brackets, or None."""
    if re.search(r"[(\[{]", re.sub(r"\{[^{}]*\}|\\left|\\right", "", gold)) or "," not in gold:
        return None
    if re.search(r"\d(?:,|\{,\}|, ?\\!\s*)\d{3}", gold) or "text" in gold:
        return None
    return [piece.strip() for piece in gold.split(",")]


def rewrites(gold: str) -> Iterator[str]:
    """Yield other spellings of the same answer."""
    yield f"${gold}$"
    yield f" {gold} ."
    yield f"\\[ {gold} \\]"
    yield re.sub(r"(?<=[^\s,])([+=])(?=\S)", r" \1 ", gold) + r" \,"
    yield gold.replace("\\frac", "\\dfrac") if "\\frac" in gold else f"\\!{gold}"
    yield f"\\displaystyle {gold}"
    if "\\frac" in gold:
        yield gold.replace("\\frac", "\\tfrac")
    if re.search(r"[(\[]", gold) and "\\left" not in gold and "text" not in gold:
        yield re.sub(r"([)\]])", r"\\right\1", re.sub(r"([(\[])", r"\\left\1", gold))
    if "\\left" in gold:
        yield gold.replace("\\left", "").replace("\\right", "")
    if _INTEGER.fullmatch(gold):
        yield from (f"{gold}.0", f"x = {gold}", f"{2 * int(gold)}/2", f"{gold} \\text{{ units}}")
        if len(gold.lstrip("-")) > 3:
            yield from (f"{int(gold):,}", f"{int(gold):,}".replace(",", "{,}"))
        yield f"\\${gold}" if not gold.startswith("-") else f"{gold}.00"
    if _NUMBER.fullmatch(gold) and "." in gold:
        value = Fraction(gold)
        yield f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
        yield gold + "0"
    if match := _FRACTION.fullmatch(gold.removeprefix("-")):
        sign = "-" if gold.startswith("-") else ""
        yield from (f"{sign}{match[1]}/{match[2]}", f"{sign}({match[1]})/({match[2]})")
        value = Fraction(int(match[1]), int(match[2]))
        yield f"{sign}\\frac{{{3 * int(match[1])}}}{{{3 * int(match[2])}}}"
        if not 10**9 % value.denominator and value > 0:
            digits = f"{value * 10**9 // 1:010d}"
            yield f"{sign}{digits[:-9]}.{digits[-9:]}".rstrip("0")
    if (parts := elements(gold)) is not None:
        yield ", ".join(reversed(parts))
        yield "\\{" + ",".join(parts[1:] + parts[:1]) + "\\}"
    if "\\pi" in gold and "text" not in gold:
        yield gold.replace("\\pi", "π")
    if re.search(r"\\sqrt\{\d+\}", gold):
        yield re.sub(r"\\sqrt\{(\d+)\}", r"√(\1)", gold)
        yield re.sub(r"\\sqrt\{(\d+)\}", r"\\sqrt{\1 }", gold)
    if gold.endswith("^\\circ"):
        yield from (gold[:-6] + "°", gold[:-6] + "^{\\circ}", gold[:-6] + "\\text{ degrees}")
    if "\\text" in gold and "," not in gold:
        yield re.sub(r"\\text\s?\{([^{}]*)\}", r"\\mbox{\1}", gold)
    if "\\cup" in gold and gold.count("\\cup") == 1:
        yield " \\cup ".join(reversed(gold.split("\\cup")))


def near_misses(gold: str) -> Iterator[str]:
    """Yield answers that look like the gold one and are another."""
    zero = _NUMBER.fullmatch(gold) is not None and Fraction(gold) == 0
    if not zero and not gold.startswith(("0,", "\\begin{pmatrix} 0 \\\\ 0")) and "=" not in gold:
        yield gold[1:] if gold.startswith("-") else f"-{gold}"
    digits = [match.start() for match in re.finditer(r"\d", gold)]
    for place in dict.fromkeys(digits[:2] + digits[-1:]):
        yield gold[:place] + str((int(gold[place]) + 1) % 10) + gold[place + 1 :]
    if (match := re.search(r"\\[dt]?frac\{(\w+)\}\{(\w+)\}", gold)) and match[1] != match[2]:
        yield gold.replace(match[0], f"\\frac{{{match[2]}}}{{{match[1]}}}")
    plain = re.sub(r"\\left|\\right", "", gold)
    if plain[:1] in "([" and plain[-1:] in ")]" and "," in plain:
        other = {"(": "[", "[": "("}[plain[0]]
        yield other + plain[1:]
        yield plain[:-1] + {")": "]", "]": ")"}[plain[-1]]
        yield plain.rpartition(",")[0] + plain[-1]
        yield plain[1:-1]
    if (parts := elements(gold)) is not None:
        yield ", ".join(parts[1:])
        yield ", ".join([*parts, "1234567"])
        yield "(" + ", ".join(parts) + ")"
    if "\\pi" in gold:
        yield gold.replace("\\pi", "")
        yield gold.replace("\\pi", "\\pi^2")
    if "\\sqrt" in gold:
        yield gold.replace("\\sqrt", "", 1)
    if re.search(r"(?<![a-zA-Z\\])[xyabnrt](?![a-zA-Z])", gold):
        yield re.sub(r"(?<![a-zA-Z\\])[xyabnrt](?![a-zA-Z])", "w", gold)
    if "\\cup" in gold:
        yield gold.split("\\cup")[0]
    if _NUMBER.fullmatch(gold):
        yield from (
            f"{gold}.001" if "." not in gold else f"{gold}1",
            f"{gold}\\pi" if not zero else "1",
        )
        yield from (f"\\sqrt{{{gold}}}" if abs(Fraction(gold)) > 1 else f"{gold},5", f"1{gold}")
    yield from (f"not {gold}", f"{gold}, 98765", f"({gold}, 4)", f"[{gold}, \\infty)", "")


def pairs(golds: list[str]) -> Iterator[tuple[str, str, bool]]:
    """Yield (gold, answer, whether they are the same answer) for each different gold."""
    for gold in dict.fromkeys(golds):
        for answer in rewrites(gold):
            yield gold, answer, True
        for answer in near_misses(gold):
            yield gold, answer, False


# ---------------------------------------------------------------------------------- the figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default=os.environ.get("NANOMATH_DATA"), help="folder of files")
    data = parser.parse_args().data
    if not data:
        parser.error("--data DIR (or NANOMATH_DATA) names the folder of benchmark files")
    named = {"MATH": math_golds(data), "GSM8K": gsm8k_golds(data)}
    for name, golds in named.items():
        counts = {True: [0, 0], False: [0, 0]}
        wrong = []
        start = time.process_time()
        for gold, answer, same in pairs(golds):
            verdict = is_equivalent(answer, gold)
            counts[same][0] += verdict
            counts[same][1] += 1
            if verdict is not same:
                wrong.append(f"  {'rewrite' if same else 'near-miss'} of {gold!r}: {answer!r}")
        seconds = time.process_time() - start
        print(f"{name}: {counts[True][0]} of {counts[True][1]} rewrites judged equal, "
              f"{counts[False][0]} of {counts[False][1]} near-misses")  # fmt: skip
        print("\n".join(wrong))
        start = time.process_time()
        for gold in golds:
            is_equivalent(f"{gold} ", f"${gold}$")
        alike = len(golds) / (time.process_time() - start)
        total = sum(count for _, count in counts.values())
        print(f"{name}: {total / seconds:.0f} of these comparisons a second, {alike:.0f} of golds")
    for name, golds in (named | other_golds(data)).items():
        kinds = Counter(read_value(gold).kind for gold in golds)
        print(f"{name}: {len(golds)} golds: {dict(kinds.most_common())}")
        unread = dict.fromkeys(gold for gold in golds if read_value(gold).kind == "text")
        print("  as strings:", "; ".join(unread) or "none")
        lost = [(form, gold) for gold in dict.fromkeys(golds) for form in FORMS
                if not found_again(form, gold)]  # fmt: skip
        for form, gold in lost:
            print(f"  not found again: {filled(form, gold)!r}")


if __name__ == "__main__":
    main()
