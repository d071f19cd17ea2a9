"""GRPO after the sampling: advantages, reference log-probabilities and the policy update (Sec. 4).

    rollouts + rewards --outcome_advantages--> RolloutBatch --score--> ref and old log-probabilities
                                                            --policy_update--> a better policy

This file never samples (sampler.py) and never judges (rewards.py). A batch holds the outputs of
this rank's questions; weights are fixed from the global counts before anything is split, so that
micro-batch size and world size never change the update.

Per-token tensors are packed: one axis N runs over the response tokens of all rows, row by row,
without padding. Masks come from lengths, never from token ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kernels import linear_policy_loss, linear_token_logprobs
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

    rows: per output, prompt and response token ids in one list.
    prompt_lengths, response_lengths: B ints each; the sampled EOS is part of the response.
    advantages_B: float64 [B]. weights_B: float64 [B], 1 / (P G |o_i|) with global P (Eq. 3).
    sampler_logp_N, ref_logp_N, old_logp_N: packed over response tokens, fp32 or wider.
    """

    rows: list[list[int]]
    prompt_lengths: list[int]
    response_lengths: list[int]
    advantages_B: torch.Tensor
    weights_B: torch.Tensor
    sampler_logp_N: torch.Tensor
    ref_logp_N: torch.Tensor | None = None
    old_logp_N: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def token_slices(self, rows: Sequence[int]) -> torch.Tensor:
        """Return the positions on the packed axis N of the response tokens of `rows`."""
        ends = torch.tensor(self.response_lengths, dtype=torch.int64).cumsum(0)
        parts = [torch.arange(ends[r] - self.response_lengths[r], ends[r]) for r in rows]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def make_batch(
    prompts: Sequence[Sequence[int]],
    rollouts: Rollouts,
    advantages_PG: torch.Tensor,
    scored_PG: torch.Tensor,
    num_prompts: int,
) -> RolloutBatch:
    """Lay out rollouts of this rank's prompts as rows with the weights of Eq. 3.

    num_prompts is the global P. G of a group is the number of its outputs that have a reward
    (scored_PG); the others get weight 0.
    """
    rows, prompt_lengths, response_lengths, logp = [], [], [], []
    group_size = rollouts.lengths_PG.shape[1]
    lengths_PG = rollouts.lengths_PG.tolist()
    tokens_PGT = rollouts.tokens_PGT.cpu()
    for p, prompt in enumerate(prompts):
        for g in range(group_size):
            length = lengths_PG[p][g]
            rows.append(list(prompt) + tokens_PGT[p, g, :length].tolist())
            prompt_lengths.append(len(prompt))
            response_lengths.append(length)
            logp.append(rollouts.logp_PGT[p, g, :length].cpu())
    counts_P1 = scored_PG.sum(dim=1, keepdim=True).clamp(min=1).double()
    lengths = rollouts.lengths_PG.clamp(min=1).double().cpu()
    weights_PG = scored_PG.double() / (num_prompts * counts_P1 * lengths)  # Eq. 3: 1 / (P G |o_i|)
    return RolloutBatch(
        rows=rows,
        prompt_lengths=prompt_lengths,
        response_lengths=response_lengths,
        advantages_B=advantages_PG.flatten(),
        weights_B=weights_PG.flatten(),
        sampler_logp_N=torch.cat(logp) if logp else torch.zeros(0),
    )


def pad_rows(batch: RolloutBatch, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens [B, T] of `rows`, padded right, and where the response is predicted.

    The second tensor holds indices into the flattened [B * T] positions t whose next token is a
    response token: the first is the prompt's last position. No rows give one row of one token and
    no index, so that a rank without work can still run the model.
    """
    if not rows:
        return torch.zeros(1, 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    width = max(len(batch.rows[r]) for r in rows)
    tokens_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    predicted = []
    for b, r in enumerate(rows):
        tokens_BT[b, : len(batch.rows[r])] = torch.tensor(batch.rows[r])
        first = b * width + batch.prompt_lengths[r] - 1
        predicted.append(torch.arange(first, first + batch.response_lengths[r]))
    return tokens_BT, torch.cat(predicted)


@torch.no_grad()
def response_logprobs(
    model: nn.Module,
    batch: RolloutBatch,
    *,
    temperature: float,
    micro_batch_size: int,
    num_rows_longest: int,
    device: torch.device,
) -> torch.Tensor:
    """Score every response token of the batch under `model`: [N], no gradient.

    fp32, whatever the compute type; float64 for a float64 model.

    The temperature is the sampling temperature, over the full vocabulary (PAPER Sec. 4, silent).
    """
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    logp_N = torch.zeros(sum(batch.response_lengths), dtype=dtype)
    for rows in split_rows(range(len(batch)), num_rows_longest, micro_batch_size):
        tokens_BT, predicted_N = (t.to(device) for t in pad_rows(batch, rows))
        targets_N = tokens_BT.roll(-1, dims=1).flatten()[predicted_N]

        def head_fn(hidden_BTD, head_VD, predicted_N=predicted_N, targets_N=targets_N):
            hidden_ND = hidden_BTD.flatten(0, 1)[predicted_N]
            return linear_token_logprobs(hidden_ND, head_VD, targets_N, temperature=temperature)[0]

        logp_N[batch.token_slices(rows)] = model(tokens_BT, head_fn=head_fn).cpu()
    return logp_N


@dataclass(frozen=True)
class Objective:
    """The constants of Eq. 3: clip range, KL coefficient beta, and the sampling temperature."""

    clip_eps: float
    kl_coef: float
    temperature: float


def objective_of_rows(
    model: nn.Module,
    batch: RolloutBatch,
    rows: Sequence[int],
    objective: Objective,
    device: torch.device,
    weight_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negated objective J of `rows` (Eq. 3, 4) with its graph, and the METRIC_SUMS.

    With old_logp_N None the old policy is the current one: every ratio is 1, with its gradient.
    """
    tokens_BT, predicted_N = (t.to(device) for t in pad_rows(batch, rows))
    targets_N = tokens_BT.roll(-1, dims=1).flatten()[predicted_N]
    slices_N = batch.token_slices(rows)
    lengths = torch.tensor([batch.response_lengths[r] for r in rows], dtype=torch.int64)
    weights_N = (batch.weights_B[rows] * weight_scale).repeat_interleave(lengths).to(device)
    advantages_N = batch.advantages_B[rows].repeat_interleave(lengths).to(device)

    def packed(values_N: torch.Tensor | None) -> torch.Tensor | None:
        return None if values_N is None else values_N[slices_N].to(device)

    outputs = []

    def head_fn(hidden_BTD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
        out = linear_policy_loss(
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
        )
        outputs.append(out)
        return out.loss

    loss = model(tokens_BT, head_fn=head_fn)
    out, trained_N = outputs[0], weights_N > 0
    gap_N = (out.logp_N - packed(batch.sampler_logp_N)).abs()
    sums = {
        "loss": loss.detach(),
        "kl_weighted": (weights_N * out.kl_N).sum(),
        "tokens": trained_N.sum(),
        "kl": (out.kl_N * trained_N).sum(),
        "entropy": (out.entropy_N * trained_N).sum(),
        "clip_low": ((out.clipped_N < 0) & trained_N).sum(),
        "clip_high": ((out.clipped_N > 0) & trained_N).sum(),
        "sampler_gap": (gap_N * trained_N).sum(),
    }
    return loss, torch.stack([sums[name].double() for name in METRIC_SUMS])


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


def policy_update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: RolloutBatch,
    objective: Objective,
    *,
    lr: float,
    max_grad_norm: float,
    micro_batch_size: int,
    num_rows_longest: int,
    dist: Dist,
    rows: Sequence[int] | None = None,
    weight_scale: float = 1.0,
) -> dict[str, float]:
    """Take one optimizer step up the GRPO objective (Alg. 1 l.11) and return its metrics.

    rows: the rows of this step (default: all of the batch). weight_scale: the batch's questions
    over the step's, so that a step on part of a batch is the mean over that part.
    """
    # Rows of similar length share a micro-batch, so that little of it is padding.
    rows = sorted(range(len(batch)) if rows is None else rows, key=lambda r: len(batch.rows[r]))
    totals = torch.zeros(len(METRIC_SUMS), dtype=torch.float64, device=dist.device)

    def loss_of_rows(part: list[int]) -> torch.Tensor:
        loss, sums = objective_of_rows(model, batch, part, objective, dist.device, weight_scale)
        totals.add_(sums)
        return loss

    accumulate_gradients(model, split_rows(rows, num_rows_longest, micro_batch_size), loss_of_rows)
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
