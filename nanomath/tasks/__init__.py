"""Problems, their prompts and their judges: one file per task."""

from dataclasses import dataclass, field
from typing import Any

from nanomath.text.chat import prompt_ids


@dataclass(frozen=True)
class Problem:
    """One question: the prompt a model is given, and in payload what its judge needs (JSON)."""

    id: int  # the sampler's randomness is a function of it: unique within a set
    task: str
    prompt: str
    payload: dict[str, Any] = field(hash=False)


def encode_prompt(tokenizer: Any, problem: Problem) -> list[int]:
    """Return the prompt's token ids, the same way for training, sampling and evaluation."""
    return prompt_ids(tokenizer, problem.prompt)
