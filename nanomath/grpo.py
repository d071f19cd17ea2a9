"""GRPO after the sampling: advantages, reference log-probabilities and the policy update (Sec. 4).

    rollouts, rewards --outcome_advantages, make_batch--> RolloutBatch
    RolloutBatch      --response_logprobs--> its reference and old log-probabilities
                      --policy_update--> a better policy

This file never samples (sampler.py) and never judges (rewards.py). A batch holds the outputs of
this rank's questions; weights are fixed from the global counts before anything is split, so that
micro-batch size and world size never change the update.

Per-token tensors are packed: one axis N runs over the response tokens of all rows, row by row,
without padding. Masks come from lengths, never from token ids.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kernels import (
    PolicyLossOutput,
    check_status,
    linear_policy_loss,
    linear_token_logprobs,
)
from nanomath.dist import Dist, all_reduce_sum
from nanomath.optim import accumulate_gradients, optimizer_step, split_rows
from nanomath.sampler import Rollouts


def outcome_advantages(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Return A_i = (r_i - mean(r)) / std(r) within each group, in float64 (Sec. 4.1.2).

    rewards_PG: [P, G]; NaN marks an output without a reward, which leaves its group: it gets
    advantage 0 and counts in neither mean nor std. std is the population's (ddof 0), without an
    epsilon; a group whose rewards are all equal gets exactly 0. Raises ValueError for G < 2.
    """
    if rewards_PG.shape[1] < 2:
        raise ValueError("a group needs at least 2 outputs: with one, every advantage is 0")
    rewards_PG = rewards_PG.double()
    scored_PG = ~rewards_PG.isnan()
    count_P1 = scored_PG.sum(dim=1, keepdim=True).clamp(min=1)
    filled_PG = rewards_PG.masked_fill(~scored_PG, 0.0)
    mean_P1 = filled_PG.sum(dim=1, keepdim=True) / count_P1
    centred_PG = (filled_PG - mean_P1).masked_fill(~scored_PG, 0.0)
    std_P1 = (centred_PG.square().sum(dim=1, keepdim=True) / count_P1).sqrt()
    # Test equality, not std == 0: eight rewards of 0.1 have a tiny std by rounding.
    return torch.where(constant_groups(rewards_PG)[:, None], 0.0, centred_PG / std_P1)


def constant_groups(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Return for each group whether all its rewards are equal (or none is known): [P] bool."""
    missing_PG = rewards_PG.isnan()
    high_P = rewards_PG.masked_fill(missing_PG, -torch.inf).amax(dim=1)
    low_P = rewards_PG.masked_fill(missing_PG, torch.inf).amin(dim=1)
    return high_P <= low_P


@dataclass
class RolloutBatch:
    """This rank's sampled outputs as training rows; B = its questions times G.

    sequences: per output, prompt and response token ids in one list.
    prompt_lengths, response_lengths: B ints each; the sampled EOS is part of the response.
    advantages_B: float64 [B]. weights_B: float64 [B], 1 / (P G |o_i|) with global P (Eq. 3).
    num_rows_longest: the largest B of any rank. All ranks run as many passes as that takes, some
        without rows, because sharded ranks must run each pass together.
    sampler_logp_N, ref_logp_N, old_logp_N: packed over response tokens, fp32 or wider.
    """

    sequences: list[list[int]]
    prompt_lengths: list[int]
    response_lengths: list[int]
    advantages_B: torch.Tensor
    weights_B: torch.Tensor
    num_rows_longest: int
    sampler_logp_N: torch.Tensor
    ref_logp_N: torch.Tensor | None = None
    old_logp_N: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    def micro_batches(self, size: int, part: int = 0, num_parts: int = 1) -> list[list[int]]:
        """Return the rows of one part of the batch, `size` at a time.

        Rows of similar length share a micro-batch, so that little of it is padding. Scoring and
        updating split alike, so that the first ratio is 1 to the last bit.
        """
        first, end = (len(self) * k // num_parts for k in (part, part + 1))
        rows = sorted(range(first, end), key=lambda row: len(self.sequences[row]))
        return split_rows(rows, self.num_rows_longest // num_parts, size)

    def token_slices(self, rows: Sequence[int]) -> torch.Tensor:
        """Return the positions on the packed axis N of the response tokens of `rows`."""
        ends = torch.tensor(self.response_lengths, dtype=torch.int64).cumsum(0)
        parts = [torch.arange(ends[row] - self.response_lengths[row], ends[row]) for row in rows]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def make_batch(
    prompts: Sequence[Sequence[int]],
    rollouts: Rollouts,
    advantages_PG: torch.Tensor,
    has_reward_PG: torch.Tensor,
    *,
    num_prompts: int,
    world_size: int,
) -> RolloutBatch:
    """Lay out rollouts of this rank's prompts as rows with the weights of Eq. 3.

    num_prompts is the global P, shared out over world_size ranks. G of a group is the number of
    its outputs that have a reward; the others get weight 0. P counts every sampled question.
    Raises ValueError for outputs that greedy, top-k or top-p choice took from another distribution.
    """
    if not rollouts.from_policy:
        raise ValueError("outputs drawn greedily, by top-k or by top-p are not the policy's own")
    sequences, prompt_lengths, response_lengths, logp = [], [], [], []
    group_size = rollouts.lengths_PG.shape[1]
    lengths_PG = rollouts.lengths_PG.tolist()
    tokens_PGT, logp_PGT = rollouts.tokens_PGT.cpu(), rollouts.logp_PGT.cpu()
    for p, prompt in enumerate(prompts):
        for g in range(group_size):
            length = lengths_PG[p][g]
            sequences.append(list(prompt) + tokens_PGT[p, g, :length].tolist())
            prompt_lengths.append(len(prompt))
            response_lengths.append(length)
            logp.append(logp_PGT[p, g, :length])
    counts_P1 = has_reward_PG.sum(dim=1, keepdim=True).clamp(min=1).double()
    lengths_PG = rollouts.lengths_PG.clamp(min=1).double().cpu()
    weights_PG = has_reward_PG.double() / (num_prompts * counts_P1 * lengths_PG)  # Eq. 3
    return RolloutBatch(
        sequences=sequences,
        prompt_lengths=prompt_lengths,
        response_lengths=response_lengths,
        advantages_B=advantages_PG.flatten(),
        weights_B=weights_PG.flatten(),
        num_rows_longest=math.ceil(num_prompts / world_size) * group_size,
        sampler_logp_N=torch.cat(logp) if logp else torch.zeros(0),
    )


def pad_rows(
    batch: RolloutBatch, rows: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens [B, T] of `rows` padded right, where responses are predicted, and targets.

    predicted_N indexes the flattened [B * T] positions t whose next token is a response token (the
    first is the prompt's last position); targets_N are those next tokens. No rows give one row of
    one token and no index, so that a rank without work can still run the model.
    """
    if not rows:
        none_N = torch.zeros(0, dtype=torch.int64, device=device)
        return torch.zeros(1, 1, dtype=torch.int64, device=device), none_N, none_N
    width = max(len(batch.sequences[row]) for row in rows)
    tokens_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    predicted = []
    for b, row in enumerate(rows):
        tokens_BT[b, : len(batch.sequences[row])] = torch.tensor(batch.sequences[row])
        first = b * width + batch.prompt_lengths[row] - 1
        predicted.append(torch.arange(first, first + batch.response_lengths[row]))
    predicted_N = torch.cat(predicted)
    targets_N = tokens_BT.flatten()[predicted_N + 1]
    return tokens_BT.to(device), predicted_N.to(device), targets_N.to(device)


@torch.no_grad()
def response_logprobs(
    model: nn.Module,
    batch: RolloutBatch,
    *,
    temperature: float,
    micro_batch_size: int,
    device: torch.device,
) -> torch.Tensor:
    """Score every response token of the batch under `model`: [N], no gradient.

    At the sampling temperature, over the full vocabulary. fp32, whatever the compute type; float64
    for a float64 model.
    """
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    logp_N = torch.zeros(sum(batch.response_lengths), dtype=dtype)
    status = torch.zeros(1, dtype=torch.int64, device=device)
    for rows in batch.micro_batches(micro_batch_size):
        tokens_BT, predicted_N, targets_N = pad_rows(batch, rows, device)

        def head_fn(hidden_BTD, head_VD, predicted_N=predicted_N, targets_N=targets_N):
            return linear_token_logprobs(
                hidden_BTD.flatten(0, 1)[predicted_N],
                head_VD,
                targets_N,
                temperature=temperature,
                status=status,
            )

        part_N, _ = model(tokens_BT, head_fn=head_fn)
        logp_N[batch.token_slices(rows)] = part_N.cpu()
    check_status(status)
    return logp_N


@dataclass(frozen=True)
class Objective:
    """The constants of Eq. 3: clip range, KL coefficient beta, and the sampling temperature."""

    clip_eps: float
    kl_coef: float
    temperature: float


METRIC_SUMS = (
    "loss",
    "kl_weighted",
    "tokens",
    "kl",
    "entropy",
    "clip_low",
    "clip_high",
    "sampler_gap",
)


def objective_of_rows(
    model: nn.Module,
    batch: RolloutBatch,
    rows: Sequence[int],
    objective: Objective,
    device: torch.device,
    *,
    weight_scale: float = 1.0,
    status: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negated objective J of `rows` (Eq. 3, 4) with its graph, and the METRIC_SUMS.

    With old_logp_N None the old policy is the current one: every ratio is 1, with its gradient.
    status: where the kernels report bad rows; kernels.check_status raises on them.
    """
    tokens_BT, predicted_N, targets_N = pad_rows(batch, rows, device)
    slices_N = batch.token_slices(rows)
    lengths = torch.tensor([batch.response_lengths[row] for row in rows], dtype=torch.int64)
    weights_N = (batch.weights_B[rows] * weight_scale).repeat_interleave(lengths).to(device)
    advantages_N = batch.advantages_B[rows].repeat_interleave(lengths).to(device)

    def packed(values_N: torch.Tensor | None) -> torch.Tensor | None:
        return None if values_N is None else values_N[slices_N].to(device)

    def head_fn(hidden_BTD: torch.Tensor, head_VD: torch.Tensor) -> PolicyLossOutput:
        return linear_policy_loss(
            hidden_BTD.flatten(0, 1)[predicted_N],
            head_VD,
            targets_N,
            weights_N=weights_N,
            advantages_N=advantages_N,
            old_logp_N=packed(batch.old_logp_N),
            ref_logp_N=packed(batch.ref_logp_N),
            clip_eps_low=objective.clip_eps,
            clip_eps_high=objective.clip_eps,
            kl_coef=objective.kl_coef,
            temperature=objective.temperature,
            status=status,
        )

    out = model(tokens_BT, head_fn=head_fn)
    trained_N = weights_N > 0
    gap_N = (out.logp_N - packed(batch.sampler_logp_N)).abs()
    sums = {
        "loss": out.loss.detach(),
        "kl_weighted": (weights_N * out.kl_N).sum(),
        "tokens": trained_N.sum(),
        "kl": (out.kl_N * trained_N).sum(),
        "entropy": (out.entropy_N * trained_N).sum(),
        "clip_low": ((out.clipped_N < 0) & trained_N).sum(),
        "clip_high": ((out.clipped_N > 0) & trained_N).sum(),
        "sampler_gap": (gap_N * trained_N).sum(),
    }
    return out.loss, torch.stack([sums[name].double() for name in METRIC_SUMS])


def policy_update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: RolloutBatch,
    objective: Objective,
    *,
    lr: float,
    max_grad_norm: float,
    micro_batch_size: int,
    dist: Dist,
    part: int = 0,
    num_parts: int = 1,
) -> dict[str, float]:
    """Take one optimizer step up the GRPO objective (Alg. 1 l.11) and return its metrics.

    On one of num_parts equal parts of the batch the objective is the mean over that part. The
    questions of a rank must then divide by num_parts.
    """
    totals = torch.zeros(len(METRIC_SUMS), dtype=torch.float64, device=dist.device)
    status = torch.zeros(1, dtype=torch.int64, device=dist.device)

    def loss_of_rows(rows: list[int]) -> torch.Tensor:
        loss, sums = objective_of_rows(
            model, batch, rows, objective, dist.device, weight_scale=num_parts, status=status
        )
        totals.add_(sums)
        return loss

    accumulate_gradients(
        model, batch.micro_batches(micro_batch_size, part, num_parts), loss_of_rows
    )
    check_status(status)
    grad_norm, stepped = optimizer_step(
        model, optimizer, lr=lr, max_grad_norm=max_grad_norm, dist=dist
    )
    sums = all_reduce_sum(dict(zip(METRIC_SUMS, totals.tolist(), strict=True)), dist)
    tokens = max(sums["tokens"], 1.0)  # metrics are sums over sums, never means of means
    kl_term = objective.kl_coef * sums["kl_weighted"]
    return {
        "loss": sums["loss"],
        "loss_policy": sums["loss"] - kl_term,
        "loss_kl": kl_term,
        **{name: sums[name] / tokens for name in METRIC_SUMS[3:]},
        "grad_norm": grad_norm,
        "stepped": float(stepped),
    }
