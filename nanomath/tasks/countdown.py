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
from nanomath.base.files import write_text
from nanomath.base.log import progress
from nanomath.judge.equation import Reading, read_equation
from nanomath.tasks import Problem, Verdict
from nanomath.tasks.expressions import (
    MAX_NUMBERS,
    Expression,
    expressions,
    is_reachable,
    number_text,
    solutions,
)

HELDOUT_ONE_IN = 10  # share of all problems that are never trained on
_MAX_DRAWS = 20_000  # per problem; a range without reachable targets ends with an error
# Worked solutions: the share without a search, and how many wrong forms a search passes at most.
# SFT imitates both kinds; which of them is right more often is for GRPO to find out.
DIRECT_SHARE, NUM_NEAR = 0.7, 8

SHORT_PROMPT = "{numbers} -> {target}\n"
FULL_PROMPT = (
    "Use each of the numbers [{numbers}] exactly once, with + - * / and parentheses, to make an "
    "expression whose value is {target}. Reason inside <think> </think>, then give only the "
    "expression inside <answer> </answer>, without an equals sign, "
    "for example <answer>(1 + 2) / 3</answer>.\n"
)
STYLES = ("short", "full")


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Which problems there are: how many numbers (drawn evenly), from 1 to what; targets to what.

    Raises ValueError where no problem can be of them.
    """

    num_numbers: Sequence[int] = (3,)
    max_number: int = 99
    max_target: int = 100

    def __post_init__(self) -> None:
        if not self.num_numbers or not all(2 <= n <= MAX_NUMBERS for n in self.num_numbers):
            raise ValueError(
                f"num_numbers {tuple(self.num_numbers)}: give counts from 2 to {MAX_NUMBERS}"
            )
        if self.max_number < 1 or self.max_target < 1:
            raise ValueError(
                f"max_number {self.max_number} and max_target {self.max_target} must be at least 1"
            )

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
    """Return the problem with its prompt; style "short" is for models trained here from scratch,
    "full" (instructions and an example) for pretrained ones."""
    if style not in STYLES:
        raise ValueError(f"prompt style {style!r}: choose from {', '.join(STYLES)}")
    if style == "short":
        prompt = SHORT_PROMPT.format(numbers=" ".join(map(str, nums)), target=target)
    else:
        prompt = FULL_PROMPT.format(numbers=", ".join(map(str, nums)), target=target)
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
    if split not in ("train", "heldout"):
        raise ValueError(f"split {split!r}: choose train or heldout")
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
    problems: list[Problem] = []
    seen: set[tuple] = set()
    index, misses = 0, 0
    while len(problems) < num:
        problem = problem_at(index, ranges, split=split, seed=seed, style=style)
        index += 1
        key = _key(problem)
        if key in seen:
            misses += 1
            # Even with one problem in a hundred left unseen, this many repeats are unheard of.
            if misses > 2000:
                raise ValueError(
                    f"only {len(problems)} different {split} problems found of {num} with numbers "
                    f"up to {ranges.max_number} and targets up to {ranges.max_target}: widen "
                    "the ranges"
                )
            continue
        misses = 0
        seen.add(key)
        problems.append(problem)
    return problems


def read_jsonl(
    path: str | os.PathLike,
    *,
    split: str | None = None,
    limit: int | None = None,
    style: str = "short",
) -> tuple[list[Problem], list[str]]:
    """Read rows {"nums": [..], "target": n}; return the problems and a line for each bad row.

    A bad row is not such JSON, has numbers that are not positive whole numbers, or a target that
    cannot be reached; a repeated problem is dropped silently. With split, only rows of that split
    are kept. Ids are line numbers from 0. Raises FileNotFoundError and, for a file without one
    good row, ValueError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; give a JSONL file of rows "
            '{"nums": [95, 21, 3], "target": 88}, such as Countdown-Tasks-3to4'
        )
    problems, bad, seen, num_good = [], [], set(), 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line_number, line in enumerate(file):
            if limit is not None and len(problems) >= limit:
                break
            if not line.strip():
                continue
            row = _read_row(line)
            if isinstance(row, str):
                bad.append(f"{path}:{line_number + 1}: {row}")
                continue
            num_good += 1
            problem = make_problem(line_number, *row, style=style)
            if _key(problem) in seen or (split is not None and split_of(*row) != split):
                continue
            seen.add(_key(problem))
            problems.append(problem)
    if not num_good:
        first = f"; first: {bad[0]}" if bad else ""
        raise ValueError(f"{path}: no Countdown problem in it ({len(bad)} bad rows{first})")
    return problems, bad


def _read_row(line: str) -> tuple[list[int], int] | str:
    """Return (nums, target), or what is wrong with the row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({type(error).__name__})"
    if not isinstance(row, dict) or "nums" not in row or "target" not in row:
        return 'not a row {"nums": [..], "target": n}'
    nums, target = row["nums"], row["target"]
    if not isinstance(nums, list) or not all(type(n) is int and 0 < n < 10**6 for n in nums):
        return "nums must be a list of whole numbers from 1 to 999999"
    if not 2 <= len(nums) <= MAX_NUMBERS:
        return f"{len(nums)} numbers; 2 to {MAX_NUMBERS} are supported"
    if type(target) is not int or not 0 < target < 10**6:
        return "target must be a whole number from 1 to 999999"
    if not is_reachable(nums, target):
        return f"{target} cannot be reached from {nums}"
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
    order = sorted(forms[: len(right) + NUM_NEAR], key=Expression.steps)
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
    for step in form.steps():
        value = text.rpartition("=")[2]
        goes_on = text and step.startswith(value) and step[len(value)] in "+-*/"
        text += step[len(value) :] if goes_on else " " * bool(text) + step
    return text


def solve(nums: Sequence[int], target: int) -> list[str]:
    """Return every different solution once, as text with the fewest parentheses, sorted.

    Two that differ only by the order or grouping of sums and products are the same solution.
    """
    return sorted(expression.text for expression in solutions(nums, target))


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
    split: str = opt("train", "train or heldout", choices=("train", "heldout"))
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
    problems = generate(cfg.num, Ranges.of(cfg), split=cfg.split, seed=cfg.seed, style=cfg.style)
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
