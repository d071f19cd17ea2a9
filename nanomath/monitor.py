"""What a run of GRPO shows: metrics of its rollouts, whole samples, plots, time by phase."""

import os
import time
from collections.abc import Sequence

import torch

from nanomath.advantages import constant_groups
from nanomath.dist import Dist, all_reduce_sum
from nanomath.log import plot_metrics
from nanomath.rewards import reward_label
from nanomath.sampler import Rollouts
from nanomath.tasks import Problem


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[f"seconds_{phase}"] = now - self._last
        self._last = now


def rollout_metrics(
    rewards_PG: torch.Tensor, parts: dict[str, list], rollouts: Rollouts, dist: Dist
) -> dict[str, float]:
    """Describe a batch of rollouts; sums over sums across ranks."""
    known = rewards_PG[~rewards_PG.isnan()]
    sums = {
        "outputs": rewards_PG.numel(),
        "known": known.numel(),
        "reward": known.sum(),
        "reward_square": known.square().sum(),
        "groups": rewards_PG.shape[0],
        "constant": constant_groups(rewards_PG).sum(),
        "tokens": rollouts.lengths_PG.sum(),
        "truncated": (~rollouts.finished_PG).sum(),
    }
    for name, values in parts.items():
        given = [value for value in values if value is not None]
        sums |= {f"sum_{name}": sum(given), f"count_{name}": len(given)}
    totals = all_reduce_sum({name: float(value) for name, value in sums.items()}, dist)

    def mean(name: str, count: str) -> float:
        return totals[name] / max(totals[count], 1.0)

    reward = mean("reward", "known")
    return {
        "reward": reward,
        "reward_std": max(mean("reward_square", "known") - reward**2, 0.0) ** 0.5,
        **{f"reward_{name}": mean(f"sum_{name}", f"count_{name}") for name in parts},
        "no_reward": totals["outputs"] - totals["known"],
        "constant_groups": mean("constant", "groups"),
        "length": mean("tokens", "outputs"),
        "truncated": mean("truncated", "outputs"),
    }


def sample_lines(
    problem: Problem, texts: list[str], rewards_G: torch.Tensor, advantages_G: torch.Tensor
) -> list[str]:
    """Return the first group of a step as text: prompt, then outputs with reward, advantage."""
    rows = zip(texts[: len(rewards_G)], rewards_G.tolist(), advantages_G.tolist(), strict=True)
    return [f"prompt: {problem.prompt}"] + [
        f"reward {reward:.2f} advantage {advantage:+.2f}: {text}"
        for text, reward, advantage in rows
    ]


def draw_plots(run_dir: str | os.PathLike, rewards: Sequence[str]) -> None:
    """Draw a run's metrics; rewards are the names of its reward functions."""
    plot_metrics(
        run_dir,
        [
            ("reward", ["reward", *(f"reward_{reward_label(name)}" for name in rewards)]),
            ("held-out accuracy, greedy", ["heldout_pass@1"]),
            ("loss: policy term and beta * KL", ["loss_policy", "loss_kl"]),
            ("KL to the reference, entropy (nats per token)", ["kl", "entropy"]),
            ("output length (tokens)", ["length"]),
            ("constant groups, truncated outputs", ["constant_groups", "truncated"]),
        ],
    )
