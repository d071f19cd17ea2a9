"""Reward functions, and how they are summed into one reward per completion.

A reward function takes (problem, completion text) and returns a number, or None where it cannot
judge. Built in, each worth 1.0 or 0.0:

    format      the completion is <think>...</think>, then <answer>...</answer>, neither without a
                letter or digit in it, and nothing else
    equation    Countdown's answer is right
    answer      the answer equals the reference as a value (judge/answers.py), and is not a copy
                of the question (judge/copying.py)

Your own: `--reward my_file.py:my_function`. It runs in worker processes (workers.py), with a
time limit per completion. One that raises, takes too long, ends its process or returns no finite
number has no reward for that completion: None, which is not 0. The failures of a call are counted
and named in one warning, and a completion without a reward is left out of its group's mean and std
(advantages.py). The built-in functions run in the trainer's process: they are bounded whatever the
text (tests hold them to it), and quicker than a message to a worker.
"""

import itertools
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from nanomath.tasks import Problem, benchmarks, countdown
from nanomath.tasks.workers import (
    LARGEST,
    RewardFunction,
    Scored,
    Workers,
    default_num_workers,
    score_one,
)

SHOWN_FAILURES = 3  # different ones, of one function in one call: all are counted

_logger = logging.getLogger(__name__)

_SPACE = r"[ \t\r\n]*"
_FORMAT = re.compile(
    rf"{_SPACE}<think>(?P<think>.*)</think>{_SPACE}<answer>(?P<answer>.*)</answer>{_SPACE}",
    re.DOTALL,
)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(problem: Problem, completion: str) -> float:
    """Return 1.0 for <think>...</think><answer>...</answer>, each tag once, with something in both
    and white space around."""
    if any(completion.count(tag) != 1 for tag in _TAGS):
        return 0.0  # also keeps the pattern's search short
    match = _FORMAT.fullmatch(completion)
    return float(match is not None and all(re.search(r"\w", inside) for inside in match.groups()))


def equation_reward(problem: Problem, completion: str) -> float | None:
    """Return 1.0 if the completion's equation is right, else 0.0; None for another task."""
    if problem.task != "countdown":
        return None
    return float(countdown.judge(problem, completion).correct)


def answer_reward(problem: Problem, completion: str) -> float | None:
    """Return 1.0 if the completion's answer equals the reference, else 0.0; None where there is no
    reference, or none that is read."""
    if not benchmarks.can_judge(problem):
        return None
    return float(benchmarks.judge(problem, completion, reward=True).correct)


BUILT_IN: dict[str, RewardFunction] = {
    "format": format_reward,
    "equation": equation_reward,
    "answer": answer_reward,
}


class Rewards:
    """Several reward functions and their weights; close it, or use `with`, to end its workers.

    names are built in or "file.py:function"; no weights: 1 each; seconds: the limit per completion;
    num_workers 0: default_num_workers(). Raises ValueError or FileNotFoundError that names the
    reward and the fix.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float] = (),
        *,
        seconds: float = 10.0,
        num_workers: int = 0,
    ):
        self._names, self._labels = tuple(names), [reward_label(name) for name in names]
        self._weights = tuple(weights) or (1.0,) * len(self._names)
        self.missing: dict[str, str] = {}  # of the last call: who gave None, and why the last time
        if len({"std", *self._labels}) <= len(names) or not names:  # reward_std is a metric
            raise ValueError(
                f"--reward {' '.join(names)}: give different function names, other than std"
            )
        if len(self._weights) != len(names) or not all(
            abs(weight) <= LARGEST for weight in self._weights
        ):
            raise ValueError(
                f"--reward_weights {' '.join(map(str, weights))}: give one number for each of "
                f"--reward {' '.join(names)}"
            )
        own = [_resolve(name) for name in names if name not in BUILT_IN]
        self._workers = None
        if own:
            num_workers = num_workers or default_num_workers()
            self._workers = Workers(own, num_workers=num_workers, seconds=seconds)

    def score(
        self, problems: Sequence[Problem], completions: Sequence[str]
    ) -> tuple[list[float | None], dict[str, list[float | None]]]:
        """Return each completion's weighted sum of rewards, and each function's rewards by label.

        problems[i] is the question of completions[i]. The sum is None where a function of weight
        other than 0 gave None.
        """
        # All tasks of all custom functions go to the workers at once, so that a slow function does
        # not hold up the others; results come back in the order of the tasks.
        pairs = list(zip(problems, completions, strict=True))
        own = [name for name in self._names if name not in BUILT_IN]
        tasks = [(number, *pair) for number in range(len(own)) for pair in pairs]
        scored = iter(self._workers.score(tasks) if own else ())
        parts, self.missing = {}, {}
        for name, label, weight in zip(self._names, self._labels, self._weights, strict=True):
            if name in BUILT_IN:
                results = [score_one(BUILT_IN[name], *pair) for pair in pairs]
            else:
                results = list(itertools.islice(scored, len(pairs)))
            _warn(name, problems, results)
            for problem, (reward, failure) in zip(problems, results, strict=True):
                if reward is None and weight:
                    self.missing[name] = f"problem {problem.id}: {failure or 'it returned None'}"
            parts[label] = [reward for reward, _ in results]
        totals: list[float | None] = []
        # A sum with an unknown term is unknown. Counted as 0 it would teach the policy that what
        # broke the judge was a bad answer. A term of weight 0 is only shown, so it may be missing.
        for rewards in zip(*parts.values(), strict=True):
            used = [(reward, w) for reward, w in zip(rewards, self._weights, strict=True) if w]
            known = all(reward is not None for reward, _ in used)
            totals.append(sum(reward * w for reward, w in used) if known else None)
        return totals, parts

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _warn(name: str, problems: Sequence[Problem], results: Sequence[Scored]) -> None:
    """Warn once of all failures of a function in one call."""
    failures = [
        f"problem {problem.id}: {failure}"
        for problem, (_, failure) in zip(problems, results, strict=True)
        if failure
    ]
    shown = [*dict.fromkeys(failures)]  # a broken function fails alike for a whole group
    if failures:
        _logger.warning(
            "reward %s gave no reward for %d of %d completions: %s%s",
            name,
            len(failures),
            len(results),
            "; ".join(shown[:SHOWN_FAILURES]),
            "; ..." if len(shown) > SHOWN_FAILURES else "",
        )


def reward_label(name: str) -> str:
    """Return a reward's short name, for metrics: "my_reward.py:score" -> "score"."""
    return name.rpartition(":")[2]


def _resolve(name: str) -> str:
    """Return "file.py:function" with the file's whole path."""
    file, colon, function = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise ValueError(
            f"unknown reward {name!r}: choose from {', '.join(BUILT_IN)}, "
            "or give your own as my_file.py:my_function"
        )
    if not Path(file).is_file():
        raise FileNotFoundError(f"reward {name}: there is no file {file}")
    return f"{Path(file).resolve()}:{function}"
