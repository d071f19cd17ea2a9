"""Reward functions, and how they are summed into one reward per completion.

A reward function takes (problem, completion text) and returns a number, or None where it cannot
judge. Built in, each worth 1.0 or 0.0:

    format      the completion is <think>...</think>, then <answer>...</answer>, and nothing else
    equation    Countdown's answer is right
    answer      the answer equals the reference, as a value (judge/answers.py)

Your own: `--rewards my_file.py:my_function`. A function that raises, or returns no finite number,
has no reward for that completion: None, which is not 0. The failures of a call are counted and
named in one warning, and a completion without a reward is left out of its group's mean and std
(grpo.py). Functions run in this process, one completion at a time; `score_one` is all that a pool
of worker processes with a time limit would have to call.
"""

import functools
import importlib.util
import logging
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from nanomath.judge.answers import is_readable
from nanomath.tasks import Problem, benchmarks, countdown

RewardFunction = Callable[[Problem, str], float | None]

_logger = logging.getLogger(__name__)

_SPACE = r"[ \t\r\n]*"
_FORMAT = re.compile(
    rf"{_SPACE}<think>(?P<think>.*)</think>{_SPACE}<answer>(?P<answer>.*)</answer>{_SPACE}",
    re.DOTALL,
)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(problem: Problem, completion: str) -> float:
    """Return 1.0 for <think>...</think><answer>...</answer>, each tag once, white space around."""
    if any(completion.count(tag) != 1 for tag in _TAGS):
        return 0.0  # also keeps the pattern's search short
    return 1.0 if _FORMAT.fullmatch(completion) else 0.0


def equation_reward(problem: Problem, completion: str) -> float | None:
    """Return 1.0 if the completion's equation is right, else 0.0; None for another task."""
    if problem.task != "countdown":
        return None
    return float(countdown.is_correct(problem, completion))


def answer_reward(problem: Problem, completion: str) -> float | None:
    """Return 1.0 if the completion's answer equals the reference (judge/answers.py), else 0.0;
    None where there is no reference, or none that is read."""
    gold = problem.payload.get("answer")
    if not isinstance(gold, str) or not is_readable(gold):
        return None
    return float(benchmarks.is_correct(problem, completion))


BUILT_IN: dict[str, RewardFunction] = {
    "format": format_reward,
    "equation": equation_reward,
    "answer": answer_reward,
}


def compute_rewards(
    problems: Sequence[Problem],
    completions: Sequence[str],
    names: Sequence[str] = ("format", "equation"),
    weights: Sequence[float] = (1.0, 1.0),
) -> tuple[list[float | None], dict[str, list[float | None]]]:
    """Return each completion's weighted sum of rewards, and every function's own rewards by label.

    problems[i] is the question of completions[i]; names are built in or "file.py:function". The
    sum is None where a function of weight other than 0 gave None. Raises ValueError for lengths
    that differ, an unknown name, two of one reward_label or a weight that is not finite.
    """
    if len(problems) != len(completions):
        raise ValueError(f"{len(problems)} problems, but {len(completions)} completions")
    labels = [reward_label(name) for name in names]
    if len(names) != len(weights) or not names or len(set(labels)) != len(names):
        raise ValueError(
            f"rewards {tuple(names)} with weights {tuple(weights)}: give different rewards, of "
            "different function names, and one weight for each"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"reward weights {tuple(weights)} must be finite")
    by_label = {
        label: _score_all(name, load_reward(name), problems, completions)
        for label, name in zip(labels, names, strict=True)
    }
    totals: list[float | None] = []
    for parts in zip(*by_label.values(), strict=True):
        used = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
        known = all(part is not None for part, _ in used)
        totals.append(sum(part * weight for part, weight in used) if known else None)
    return totals, by_label


def _score_all(
    name: str,
    function: RewardFunction,
    problems: Sequence[Problem],
    completions: Sequence[str],
) -> list[float | None]:
    """Score every completion with one function and warn once of all its failures."""
    rewards, failures = [], []
    for problem, completion in zip(problems, completions, strict=True):
        reward, failure = score_one(function, problem, completion)
        rewards.append(reward)
        if failure:
            failures.append(failure)
    if failures:
        _logger.warning(
            "reward %s gave no reward for %d of %d completions; the first: %s",
            name,
            len(failures),
            len(completions),
            failures[0],
        )
    return rewards


def score_one(
    function: RewardFunction, problem: Problem, completion: str
) -> tuple[float | None, str | None]:
    """Return (reward, None), (None, None) where the function declines, or (None, what failed)."""
    try:
        reward = function(problem, completion)
        if reward is None:
            return None, None
        if isinstance(reward, str | bytes):  # float() would read them
            raise TypeError(f"a reward must be a number, not {type(reward).__name__}")
        value = float(reward)
    except Exception as error:  # whatever a user's function does must not end a run of hours
        # The message may quote the model's text, which must not drive a terminal.
        text = ascii(f"{type(error).__name__}: {error}")[1:-1]
        return None, f"problem {problem.id}: {text[:300]}"
    if not math.isfinite(value):
        return None, f"problem {problem.id}: returned {value}, not a finite number"
    return value, None


def reward_label(spec: str) -> str:
    """Return a reward's short name, for metrics: "my_reward.py:score" -> "score"."""
    return spec.rpartition(":")[2]


@functools.cache  # a user's file is run once per process
def load_reward(spec: str) -> RewardFunction:
    """Return the built-in reward of that name, or the function of "path/to/file.py:function".

    Raises ValueError or FileNotFoundError that names the reward and the fix.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise ValueError(
            f"unknown reward {spec!r}: choose from {', '.join(BUILT_IN)}, "
            "or give your own as my_file.py:my_function"
        )
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"reward {spec}: there is no file {file}")
    module_spec = importlib.util.spec_from_file_location(f"nanomath_reward_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # user code: any error in it is reported as that file's
        raise ValueError(
            f"reward {spec}: {file} does not load: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise ValueError(
            f"reward {spec}: {file} has no function {name!r}; it has {', '.join(functions)}"
        )
    return function
