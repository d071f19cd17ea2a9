"""What a run of GRPO shows: metrics of a step, held-out accuracy, whole samples, plots.

Metrics are sums over sums across ranks, so they do not depend on how many there are; times and
memory are those of the rank that took the most. docs/metrics.md has a line for each.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from nanomath.advantages import centred_rewards
from nanomath.base.log import plot_metrics
from nanomath.dist import Dist, all_reduce_sum, gather_json
from nanomath.rollouts import RolloutBatch, Rollouts
from nanomath.tasks import Problem

# What differs from one run of the same command to the next; all else is the same to the last bit.
MEASURED = ("seconds_*", "*_tokens_per_s", "memory_gb")
SHOWN = ("reward", "heldout_pass@1", "sampling_tokens_per_s")  # beside the progress bar
WHY_LOSS_IS_0 = (
    "the loss starts at 0 and then is beta * KL: with one update per batch every ratio is 1 and "
    "the advantages of a group sum to 0. Its gradient is not 0: watch reward and grad_norm"
)
PLOT_INTERVAL_S = 60
PANELS = (
    ("reward, its spread over all and in a group", ("reward*", "group_std", "heldout_reward")),
    ("held-out problems: pass@1 greedy, pass@K, maj@K", ("heldout_pass@*", "heldout_maj@*")),
    ("constant groups, truncated outputs (share)", ("constant_groups", "truncated")),
    ("output length (tokens)", ("length",)),
    ("loss: policy term and beta * KL", ("loss_policy", "loss_kl")),
    ("KL to reference and to old (nats per token)", ("kl", "kl_old")),
    ("entropy (nats per token)", ("entropy",)),
    ("clipped tokens (share)", ("clip_low", "clip_high")),
    ("largest ratio", ("ratio_max",)),
    ("gap between sampler and trainer (nats)", ("sampler_gap", "sampler_gap_max")),
    ("gradient norm before clipping", ("grad_norm",)),
    ("learning rate", ("lr",)),
    ("seconds of each phase", ("seconds_*",)),
    ("tokens per second", ("*_tokens_per_s",)),
    ("peak memory of a process (GB)", ("memory_gb",)),
)


class Clock:
    """Seconds of each phase of a step on this rank; a GPU's work counts where it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End a phase, which began where the one before ended; the times of one phase add up."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def rollout_metrics(
    rewards_PG: torch.Tensor, parts: dict[str, list], rollouts: Rollouts, dist: Dist
) -> dict[str, float]:
    """Describe a batch of rollouts: rewards [P, G] (NaN: none), each function's, and lengths."""
    missing_PG = rewards_PG.isnan()
    known = rewards_PG[~missing_PG]
    _, std_P, unit_P = centred_rewards(rewards_PG)
    sums = {
        "outputs": rewards_PG.numel(),
        "known": known.numel(),
        "reward": known.sum(),
        "groups": rewards_PG.shape[0],
        "group_std": (std_P * unit_P).sum(),
        "constant": (std_P == 0.0).sum(),
        "tokens": rollouts.lengths_PG.sum(),
        "truncated": (~rollouts.finished_PG).sum(),
    }
    for name, values in parts.items():
        given = [value for value in values if value is not None]
        sums |= {f"sum_{name}": sum(given), f"count_{name}": len(given)}
    totals = all_reduce_sum({name: float(value) for name, value in sums.items()}, dist)
    # Around the mean: a mean of squares less the mean's square is nothing but rounding where
    # rewards are large and near each other.
    squares = (known - totals["reward"] / max(totals["known"], 1.0)).square().sum()
    totals |= all_reduce_sum({"squares": float(squares)}, dist)

    def mean(name: str, count: str) -> float:
        return totals[name] / max(totals[count], 1.0)

    return {
        "reward": mean("reward", "known"),
        "reward_std": mean("squares", "known") ** 0.5,
        "group_std": mean("group_std", "groups"),
        **{f"reward_{name}": mean(f"sum_{name}", f"count_{name}") for name in parts},
        "no_reward": totals["outputs"] - totals["known"],
        "constant_groups": mean("constant", "groups"),
        "length": mean("tokens", "outputs"),
        "truncated": mean("truncated", "outputs"),
    }


def cost_metrics(
    seconds: Mapping[str, float], batch: RolloutBatch, num_updates: int, dist: Dist
) -> dict[str, float]:
    """Return the seconds of each phase, tokens per second of sampling and training, peak memory.

    Sampled tokens are those of the responses; trained ones, of outputs that are in the loss, count
    prompts too, once per pass. The ranks wait for the slowest, so it gives the seconds; the fullest
    one gives the memory.
    """
    values = {**{f"seconds_{phase}": s for phase, s in seconds.items()}, "memory_gb": peak_gb(dist)}
    ranks = gather_json(values, dist)
    values = {name: max(rank[name] for rank in ranks) for name in values}
    trained = num_updates * sum(len(batch.sequences[row]) for row in batch.rows_in_loss())
    tokens = all_reduce_sum({"sampling": sum(batch.response_lengths), "update": trained}, dist)
    return values | {
        "sampling_tokens_per_s": tokens["sampling"] / values["seconds_sampling"],
        "training_tokens_per_s": tokens["update"] / values["seconds_update"],
    }


def peak_gb(dist: Dist) -> float:
    """Return the most memory held so far, in 10^9 bytes: on its GPU, or by this process."""
    if dist.device.type == "cuda":
        return torch.cuda.max_memory_allocated(dist.device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def sample_lines(
    problem: Problem,
    texts: Sequence[str],
    rollouts: Rollouts,
    rewards_PG: torch.Tensor,
    advantages_PG: torch.Tensor,
) -> list[str]:
    """Return the first group of a step as text: the problem, then each output with its reward."""
    columns = (rollouts.lengths_PG, rollouts.finished_PG, rewards_PG, advantages_PG)
    rows = zip(texts, *(column[0].tolist() for column in columns))
    return [
        f"prompt: {problem.prompt}",
        f"problem: {json.dumps(problem.payload, ensure_ascii=False)}",
        *(
            f"reward {'none' if math.isnan(reward) else f'{reward:.2f}'} "
            f"advantage {advantage:+.2f} tokens {length}{'' if finished else ', truncated'}: {text}"
            for text, length, finished, reward, advantage in rows
        ),
    ]


def draw_plots(run_dir: str | os.PathLike, *, at_end: bool) -> None:
    """Draw all that metrics.jsonl holds so far into plots/metrics.png.

    It takes about a second, so before the end at most once in PLOT_INTERVAL_S.
    """
    before = Path(run_dir) / "plots" / "metrics.png"
    if not before.exists():
        before = Path(run_dir) / "config.json"  # as old as this start of the run
    if at_end or time.time() - before.stat().st_mtime >= PLOT_INTERVAL_S:
        plot_metrics(run_dir, PANELS)
