"""Problems, their prompts and their judges: one file per task, each named in registry.py."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from nanomath.text.chat import prompt_ids


@dataclass(frozen=True)
class Problem:
    """One question: the prompt a model is given, and in payload what its judge needs (JSON)."""

    id: int  # the sampler's randomness is a function of it: unique within a set
    task: str
    prompt: str
    payload: dict[str, Any] = field(hash=False)


@dataclass(frozen=True)
class Verdict:
    """What a task's judge says of one output."""

    correct: bool
    vote: Any = None  # its answer, for Maj@K; None: it does not vote
    marks: dict[str, bool] = field(default_factory=dict)  # further shares to show, "format" for one


class Task(Protocol):
    """What sampling and judging ask of a task: a module, or any object, with these functions."""

    def judge(self, problem: Problem, completion: str, *, reward: bool = False) -> Verdict:
        """Judge one output; reward: a policy is paid by the verdict, so that guesses at what was
        meant are off."""

    def same_answer(self, a: Any, b: Any) -> bool:
        """Say whether two votes are for one answer."""

    def stop_texts(self, problem: Problem) -> tuple[str, ...]:
        """Return what ends a base model's output: it has gone on to another question."""


def encode_prompt(tokenizer: Any, problem: Problem) -> list[int]:
    """Return the prompt's token ids, the same way for training, sampling and evaluation."""
    return prompt_ids(tokenizer, problem.prompt)
