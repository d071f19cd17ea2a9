"""Countdown: reach a target with + - * /, using each given number exactly once.

Problems, prompts, worked solutions and the judge. Problem i of a seed is a pure function of
(seed, i): nothing is downloaded and any rank can make any problem. A stable hash of the sorted
numbers and the target splits all problems into train and heldout, so that no held-out problem is
ever trained on, whatever the seed, the ranges or the source.

The judge, in full:
- The answer is the text between <answer> and </answer>. The completion must hold exactly one of
  each, in this order, after the reasoning: not inside <think>, and with no think tag after it.
  Two answers, or one inside the reasoning, count as none. Tags in the prompt do not count,
  because the judge never sees the prompt.
- It is right when judge/equation.py reads it (no "=", no full stop), its numbers are the given ones
  with the same multiplicity, and its exact value is the target.

Left to others: the format reward (rewards.py), Pass@K and Maj@K (evaluation.py).

    python -m nanomath.tasks.countdown --out sft.jsonl --num 10000 --preset cpu
"""

import dataclasses
import hashlib
import json
import multiprocessing
import operator
import os
import random
import signal
import struct
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from nanomath.base.config import one_line_errors, opt, parse
from nanomath.base.files import read_jsonl, write_text
from nanomath.base.log import progress
from nanomath.judge.equation import Reading, read_equation
from nanomath.tasks import Problem, Verdict
from nanomath.tasks.expressions import (
    MAX_NUMBERS,
    Expression,
    expressions,
    is_reachable,
    number_text,
)

HELDOUT_ONE_IN = 10  # share of all problems that are never trained on
_MAX_DRAWS = 20_000  # per problem; a range without reachable targets ends with an error
# Worked solutions: the share without a search, and how many wrong forms a search passes at most.
# SFT imitates both kinds; which of them is right more often is for GRPO to find out.
DIRECT_SHARE, NUM_NEAR = 0.7, 8

# What stands between the numbers, and the prompt: "short" is for models trained here from scratch,
# "full" (instructions and an example) for pretrained ones.
_PROMPTS = {
    "short": (" ", "{numbers} -> {target}\n"),
    "full": (
        ", ",
        "Use each of the numbers [{numbers}] exactly once, with + - * / and parentheses, to make "
        "an expression whose value is {target}. Reason inside <think> </think>, then give only the "
        "expression inside <answer> </answer>, without an equals sign, "
        "for example <answer>(1 + 2) / 3</answer>.\n",
    ),
}
STYLES = tuple(_PROMPTS)


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Which problems: how many numbers (drawn evenly), from 1 to what; targets from 1 to what."""

    num_numbers: Sequence[int] = (3,)
    max_number: int = 99
    max_target: int = 100

    @classmethod
    def of(cls, settings: Any) -> "Ranges":
        """Return those of a command's settings, whose fields have these names."""
        return cls(settings.num_numbers, settings.max_number, settings.max_target)


# The problems of each preset, for all scripts: what SFT shows is what GRPO and evaluation ask.
RANGES = {
    "smoke": Ranges((3,), 10, 20),
    "cpu": Ranges((3,), 20, 50),
    "gpu": Ranges((3, 4), 99, 100),
}


# ------------------------------------------------------------------------------------- problems


def make_problem(id: int, nums: Sequence[int], target: int, *, style: str = "short") -> Problem:
    """Return the problem with its prompt."""
    separator, layout = _PROMPTS[style]
    prompt = layout.format(numbers=separator.join(map(str, nums)), target=target)
    return Problem(id, "countdown", prompt, {"nums": list(nums), "target": target})


def split_of(nums: Sequence[int], target: int) -> str:
    """Return "heldout" for one problem in HELDOUT_ONE_IN, else "train"; the same for all time."""
    text = f"countdown {' '.join(map(str, sorted(nums)))} {target}"
    return "train" if _hash(text)[0] % HELDOUT_ONE_IN else "heldout"


def problem_at(
    index: int,
    ranges: Ranges = Ranges(),
    *,
    split: str = "train",
    seed: int = 0,
    style: str = "short",
) -> Problem:
    """Return problem `index` of a seed: uniform over all reachable (numbers, target) of the split.

    How many numbers is drawn first, evenly. Raises ValueError where the ranges hold no problem.
    """
    for draw in range(_MAX_DRAWS):
        words = _hash(f"countdown problem {seed} {index} {draw}")
        if draw == 0:
            count = ranges.num_numbers[words[0] % len(ranges.num_numbers)]
        target = 1 + words[1] % ranges.max_target
        nums = [1 + word % ranges.max_number for word in words[2 : 2 + count]]
        # The cheap test first: solving is what costs.
        if split_of(nums, target) == split and is_reachable(nums, target):
            return make_problem(index, nums, target, style=style)
    raise ValueError(
        f"no {split} problem found with {count} numbers up to {ranges.max_number} and targets up "
        f"to {ranges.max_target}: widen the ranges"
    )


def generate(
    num: int,
    ranges: Ranges = Ranges(),
    *,
    split: str = "train",
    seed: int = 0,
    style: str = "short",
) -> list[Problem]:
    """Return the first `num` different problems of a seed (same numbers in another order and same
    target: the same problem). A problem's id is its index in the seed's stream.

    Raises ValueError where the ranges hold fewer.
    """
    problems: dict[tuple, Problem] = {}
    index = newest = 0
    while len(problems) < num:
        problem = problem_at(index, ranges, split=split, seed=seed, style=style)
        if _key(problem) not in problems:
            problems[_key(problem)], newest = problem, index
        # Even with one problem in a hundred left unseen, this many repeats are unheard of.
        elif index - newest > 2000:
            raise ValueError(
                f"only {len(problems)} different {split} problems found of {num} with numbers up "
                f"to {ranges.max_number} and targets up to {ranges.max_target}: widen the ranges"
            )
        index += 1
    return list(problems.values())


def read_problems(path: str | os.PathLike, *, style: str = "short") -> list[Problem]:
    """Read the problems of a JSONL of rows {"nums": [..], "target": n} (Countdown-Tasks-3to4).

    A row is bad, and named on stderr, if its numbers are not positive whole numbers or its target
    cannot be reached; a repeated problem is dropped silently. Ids are line numbers from 0. Raises
    FileNotFoundError and, for a file without one good row, ValueError.
    """
    problems: dict[tuple, Problem] = {}
    for number, row in read_jsonl(path, read=_read_row, max_bad_fraction=1.0):
        problem = make_problem(number - 1, *row, style=style)
        problems.setdefault(_key(problem), problem)
    if not problems:
        raise ValueError(f"{path}: no Countdown problem in it")
    return list(problems.values())


def _read_row(row: dict) -> tuple[list[int], int]:
    """Return (nums, target). Raises ValueError that says what is wrong with the row."""
    nums, target = row.get("nums"), row.get("target")
    if not isinstance(nums, list) or not all(
        type(number) is int and 0 < number < 10**6 for number in (*nums, target)
    ):
        raise ValueError('wanted {"nums": [..], "target": n}, whole numbers from 1 to 999999')
    if not is_reachable(nums, target):
        raise ValueError(f"{target} cannot be reached from {nums}")
    return nums, target


def _key(problem: Problem) -> tuple:
    return (*sorted(problem.payload["nums"]), problem.payload["target"])


def _hash(text: str) -> tuple[int, ...]:
    """Return eight uint64 that depend on the text alone, on every machine and version."""
    return struct.unpack("<8Q", hashlib.blake2b(text.encode()).digest())


# ------------------------------------------------------------------------------ worked solutions


def worked_solution(problem: Problem, seed: int = 0, *, direct_share: float = DIRECT_SHARE) -> str:
    """Return a right solution as text: reasoning inside <think>, the equation in <answer>.

    With chance direct_share the reasoning is the solution's own steps, as of one who sees it. Else
    it is a search: attempts line by line, through the NUM_NEAR wrong forms nearest to the target in
    the order of their texts, up to the first right one. Each ends with its distance from the
    target, 0 for the last. Where a solution has only non-negative whole intermediate values, all
    attempts do. Raises ValueError where there is none.
    """
    nums, target = problem.payload["nums"], problem.payload["target"]
    forms = expressions(nums)
    natural = [form for form in forms if form.is_natural]
    if any(form.value == target for form in natural):
        forms = natural
    rng = random.Random(f"countdown solution {seed} {problem.id} {nums} {target}")
    rng.shuffle(forms)
    forms.sort(key=lambda form: abs(form.value - target))  # stable: equally near ones stay shuffled
    right = [form for form in forms if form.value == target]
    if not right:
        raise ValueError(f"problem {problem.id}: {target} cannot be reached from {nums}")
    if rng.random() < direct_share:
        return f"<think>{_steps(right[0])}</think><answer>{right[0].text}</answer>"
    # In one order, or the likeliest next attempt is often one that was made before.
    order = sorted(forms[: len(right) + NUM_NEAR], key=operator.attrgetter("steps"))
    found = next(i for i, form in enumerate(order) if form.value == target)
    # Two forms may have the same steps, 8/2-4 and 4-8/2: those are one attempt.
    lines = dict.fromkeys(
        f"{_steps(form)}:{number_text(abs(form.value - target))}" for form in order[: found + 1]
    )
    return "<think>\n" + "\n".join(lines) + f"</think><answer>{order[found].text}</answer>"


def _steps(form: Expression) -> str:
    """Return a form's steps; one that goes on from the value before continues its text, 1+2=3*4=12,
    else a space is between."""
    text = ""
    for step in form.steps:
        value = text.rpartition("=")[2]
        goes_on = text and step.startswith(value) and step[len(value)] in "+-*/"
        text += step[len(value) :] if goes_on else " " * bool(text) + step
    return text


# ----------------------------------------------------------------------------------------- judge


def extract_answer(completion: str) -> str | None:
    """Return the text of the one <answer> pair after the reasoning, or None (module docstring)."""
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    before, _, rest = completion.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    if not closed:  # the closing tag came first
        return None
    if before.rfind("<think>") > before.rfind("</think>"):  # still inside the reasoning
        return None
    if any(tag in after for tag in ("<think>", "</think>")):
        return None
    return answer


def read_answer(completion: str) -> Reading:
    """Read the completion's equation; Reading.error is "no answer" where there is none."""
    answer = extract_answer(completion)
    return Reading(error="no answer") if answer is None else read_equation(answer)


def judge(problem: Problem, completion: str, *, reward: bool = False) -> Verdict:
    """Judge one output: right is an equation that uses every number exactly once and equals the
    target exactly. Its vote is (exact value, every number used exactly once), None where it is not
    readable. There is nothing to guess: reward changes nothing."""
    reading = read_answer(completion)
    if reading.value is None:
        return Verdict(False)
    vote = (reading.value, sorted(reading.numbers) == sorted(problem.payload["nums"]))
    return Verdict(vote == (Fraction(problem.payload["target"]), True), vote)


same_answer = operator.eq


def stop_texts(problem: Problem) -> tuple[str, ...]:
    return ()


# --------------------------------------------------------------------------------- command line


@dataclasses.dataclass(frozen=True)
class CountdownConfig:
    """Writes worked solutions of training problems as JSONL."""

    out: str = opt("runs/sft.jsonl", "file to write: rows of prompt, solution, nums, target")
    num: int = opt(10_000, "different problems", low=1)
    seed: int = opt(0, "seed of problems and of the choice among solutions", low=0)
    num_numbers: tuple[int, ...] = opt(
        (3,), "how many numbers, drawn evenly", low=2, high=MAX_NUMBERS
    )
    max_number: int = opt(99, "numbers are from 1 to this", low=1)
    max_target: int = opt(100, "targets are from 1 to this", low=1)
    style: str = opt("short", "prompt: short (from scratch) or full (pretrained)", choices=STYLES)
    direct_share: float = opt(
        DIRECT_SHARE,
        "share of solutions that show the right steps alone; the others search, attempt by attempt",
        low=0.0,
        high=1.0,
    )
    num_workers: int = opt(2, "processes that solve", low=1)


PRESETS = {
    "smoke": {"num": 500, **vars(RANGES["smoke"])},
    "cpu": {"num": 10_000, **vars(RANGES["cpu"])},
    "gpu": {"num": 100_000, "num_workers": 8, **vars(RANGES["gpu"])},
}


def main(cfg: CountdownConfig) -> None:
    out = Path(cfg.out)
    problems = generate(cfg.num, Ranges.of(cfg), seed=cfg.seed, style=cfg.style)
    solve_one = partial(worked_solution, seed=cfg.seed, direct_share=cfg.direct_share)
    lines = []
    # Ctrl-C goes to all processes of a terminal: the workers leave it to this one, which ends them.
    ignore = (signal.signal, (signal.SIGINT, signal.SIG_IGN))
    with multiprocessing.get_context("spawn").Pool(cfg.num_workers, *ignore) as pool:
        solved = zip(problems, pool.imap(solve_one, problems, chunksize=64))
        for problem, solution in progress(
            solved, total=len(problems), desc="solving", unit="problem"
        ):
            row = {"prompt": problem.prompt, "solution": solution, **problem.payload}
            lines.append(json.dumps(row) + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(lines))
    print(f"{out}: {len(problems)} worked solutions")


if __name__ == "__main__":
    with one_line_errors():
        main(parse(CountdownConfig, PRESETS, description=__doc__))
