"""GRPO after the sampling: reference log-probabilities and the policy update (Sec. 4).

    rollouts, advantages, weights --make_batch--> RolloutBatch
    RolloutBatch --response_logprobs--> its reference and old log-probabilities
                 --policy_update--> a better policy

This file never samples (engine/stream.py) and never judges (rewards.py, advantages.py). A batch
holds the outputs of this rank's questions.

Per-token tensors are packed. Elsewhere they are [B, T] with a mask; here one axis N runs over the
response tokens of all rows, row by row, without padding. The model itself still runs on padded
[B, T] tokens, and `pad_rows` says which of its B * T positions make up N. So prompts and padding
never meet the head, the widest product of the model, and no mask has to be applied to one tensor
after another. Which tokens make up N follows from lengths, never from token ids: a padding id may
be the EOS id, and the EOS that ends a response is trained. Next: train_grpo.py.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from kernels import (
    Objective,
    PolicyLossOutput,
    check_status,
    linear_policy_loss,
    linear_token_logprobs,
)
from nanomath.dist import Dist, all_reduce_max, all_reduce_sum, reshard
from nanomath.optim import accumulate_gradients, optimizer_step
from nanomath.rollouts import RolloutBatch


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
    # The padding is on the right and attention is causal: no response token sees the padding, and
    # the positions of a row do not depend on its neighbours. So no attention mask is needed.
    tokens_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    predicted = []
    for b, row in enumerate(rows):
        tokens_BT[b, : len(batch.sequences[row])] = torch.tensor(batch.sequences[row])
        # Position t predicts token t + 1, so a response is scored from the last prompt position on.
        first = b * width + batch.prompt_lengths[row] - 1
        predicted.append(torch.arange(first, first + batch.response_lengths[row]))
    predicted_N = torch.cat(predicted)
    # The shift by one never crosses into the next row: the last position of a row is not in N.
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
    num_parts: int = 1,
) -> torch.Tensor:
    """Score the response tokens in the loss under `model`: [N], no gradient; 0 for the others.

    At the sampling temperature, over the full vocabulary. float64, whatever the compute type.
    num_parts: policy_update's.
    """
    # float64, because two of these are subtracted for a ratio: of the same weights they then differ
    # by exactly 0, and the first ratio is exactly 1.
    logp_N = torch.zeros(sum(batch.response_lengths), dtype=torch.float64)
    status = torch.zeros(1, dtype=torch.int64, device=device)
    parts = (batch.micro_batches(micro_batch_size, k, num_parts) for k in range(num_parts))
    # The same micro-batches as in the update: other shapes would round differently.
    # One without rows is run as well, because under sharding each pass gathers weights from all
    # ranks, and those that have rows would wait forever for one that does not join.
    for rows in itertools.chain(*parts):
        tokens_BT, predicted_N, targets_N = pad_rows(batch, rows, device)

        # The model calls head_fn inside its own forward, where the sharded head is gathered. Its
        # rows are bound as defaults, so that it does not depend on the loop's variables.
        def head_fn(hidden_BTD, head_VD, predicted_N=predicted_N, targets_N=targets_N):
            return linear_token_logprobs(
                hidden_BTD.flatten(0, 1)[predicted_N],
                head_VD,
                targets_N,
                temperature=temperature,
                status=status,
            )

        part_N, _ = model(tokens_BT, head_fn=head_fn)
        # Micro-batches are sorted by length, so each result goes back to its place on N.
        logp_N[batch.token_positions(rows)] = part_N.cpu()
    check_status(status)
    reshard(model)  # without a backward pass the embedding and the head would stay gathered
    return logp_N


# Micro-batches and ranks report sums, which may be added up in any order; they are divided once,
# by the number of tokens, at the very end. In a mean of their means a token would count more where
# it has few neighbours.
PER_TOKEN = ("kl", "kl_old", "entropy", "clip_low", "clip_high", "sampler_gap")
METRIC_SUMS = ("loss", "kl_weighted", "tokens", *PER_TOKEN)  # tokens: those in the loss
METRIC_MAXIMA = ("ratio_max", "sampler_gap_max")


def objective_of_rows(
    model: nn.Module,
    batch: RolloutBatch,
    rows: Sequence[int],
    objective: Objective,
    device: torch.device,
    *,
    weight_scale: float = 1.0,
    status: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the negated objective J of `rows` (Eq. 3, 4) with its graph, the METRIC_SUMS, and
    over the trained tokens the METRIC_MAXIMA (0 without a token).

    With old_logp_N None the old policy is the current one: every ratio is 1, with its gradient.
    status: where the kernels report bad rows; kernels.check_status raises on them.
    """
    tokens_BT, predicted_N, targets_N = pad_rows(batch, rows, device)
    positions_N = batch.token_positions(rows)
    # The weights already hold 1 / (P G |o_i|) with the counts of all ranks. So the losses of
    # micro-batches and of ranks are added, and nothing here divides by how many there are.
    weights_N = batch.weights_N[positions_N].to(device) * weight_scale

    def packed(values_N: torch.Tensor | None) -> torch.Tensor | None:
        return None if values_N is None else values_N[positions_N].to(device)

    # Head and loss are one function for two reasons: under sharding the head's weight is whole only
    # inside the model's forward, and the logits [N, V] are then never held, only a chunk of them.
    def head_fn(hidden_BTD: torch.Tensor, head_VD: torch.Tensor) -> PolicyLossOutput:
        return linear_policy_loss(
            hidden_BTD.flatten(0, 1)[predicted_N],
            head_VD,
            targets_N,
            objective,
            weights_N=weights_N,
            advantages_N=packed(batch.advantages_N),
            old_logp_N=packed(batch.old_logp_N),
            ref_logp_N=packed(batch.ref_logp_N),
            status=status,
        )

    out = model(tokens_BT, head_fn=head_fn)
    # What follows is for the metrics and has no gradient: all outputs but the loss are detached.
    # The gap is between what the sampler recorded and what the trainer computes: it should be
    # rounding. A large one means that sampler and trainer do not run the same policy.
    trained_N = weights_N > 0
    gap_N = (out.logp_N - packed(batch.sampler_logp_N)).abs() * trained_N
    log_ratio_N = torch.zeros_like(out.logp_N, dtype=torch.float64)
    if batch.old_logp_N is not None:
        log_ratio_N = (out.logp_N - packed(batch.old_logp_N)).where(trained_N, 0.0).double()
    sums = {
        "loss": out.loss.detach(),
        "kl_weighted": (weights_N * out.kl_N).sum(),
        "tokens": trained_N.sum(),
        "kl": (out.kl_N * trained_N).sum(),
        "kl_old": (log_ratio_N.expm1() - log_ratio_N).sum(),  # KL(old || policy), on old's tokens
        "entropy": (out.entropy_N * trained_N).sum(),
        "clip_low": ((out.clipped_N < 0) & trained_N).sum(),
        "clip_high": ((out.clipped_N > 0) & trained_N).sum(),
        "sampler_gap": gap_N.sum(),
    }
    # The 0 appended lets a micro-batch without tokens have a maximum.
    maxima = [F.pad(values_N, (0, 1)).max().double() for values_N in (out.ratio_N, gap_N)]
    sums = torch.stack([sums[name].double() for name in METRIC_SUMS])
    return out.loss, sums, torch.stack(maxima)


def policy_update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: RolloutBatch,
    objective: Objective,
    *,
    lr: float,
    max_grad_norm: float | None,
    micro_batch_size: int,
    dist: Dist,
    part: int = 0,
    num_parts: int = 1,
) -> dict[str, float]:
    """Take one optimizer step up the GRPO objective (Alg. 1 l.11).

    On one of num_parts equal parts of the batch its weights count num_parts times: with loss_norm
    response the objective is the mean over that part. The questions of a rank must then divide by
    num_parts. Return, over all ranks, the METRIC_SUMS and METRIC_MAXIMA, the gradient's norm,
    whether it stepped (0: the gradient was not finite) and whether there was nothing to step for
    (empty_steps: every coefficient, hence the gradient, is 0; momentum must not move the policy).
    """
    # On the device: reading a number per micro-batch would make the host wait for each of them.
    totals = torch.zeros(len(METRIC_SUMS), dtype=torch.float64, device=dist.device)
    largest = torch.zeros(len(METRIC_MAXIMA), dtype=torch.float64, device=dist.device)
    status = torch.zeros(1, dtype=torch.int64, device=dist.device)

    def loss_of_rows(rows: list[int]) -> torch.Tensor:
        loss, sums, maxima = objective_of_rows(
            model, batch, rows, objective, dist.device, weight_scale=num_parts, status=status
        )
        totals.add_(sums)
        torch.maximum(largest, maxima, out=largest)
        return loss

    # Gradients of all micro-batches add up before the one step: the split is a matter of memory.
    accumulate_gradients(
        model, batch.micro_batches(micro_batch_size, part, num_parts), loss_of_rows
    )
    check_status(status)  # a bad row is named before it can reach the weights
    grad_norm, stepped = optimizer_step(
        model, optimizer, lr=lr, max_grad_norm=max_grad_norm, dist=dist
    )
    return {
        **all_reduce_sum(dict(zip(METRIC_SUMS, totals.tolist(), strict=True)), dist),
        **{k: all_reduce_max(v, dist) for k, v in zip(METRIC_MAXIMA, largest.tolist())},
        "grad_norm": grad_norm,
        "stepped": float(stepped),
        "empty_steps": float(grad_norm == 0.0),
    }


def update_metrics(steps: Sequence[dict[str, float]], kl_coef: float) -> dict[str, float]:
    """Describe the policy_update steps of one batch: sums over sums, never means of means.

    The loss and the gradient's norm are means over the steps. What is said of tokens is of those
    of weight above 0, and NaN where there are none.
    """
    totals = {name: sum(step[name] for step in steps) for name in steps[0]}
    # Per step the loss is a sum already: its weights divide. The KL's share of it is taken with the
    # same weights, so that the two terms add up to the loss.
    loss, kl_term = totals["loss"] / len(steps), kl_coef * totals["kl_weighted"] / len(steps)
    of_tokens = {name: totals[name] / max(totals["tokens"], 1.0) for name in PER_TOKEN}
    of_tokens |= {name: max(step[name] for step in steps) for name in METRIC_MAXIMA}
    return {
        "loss": loss,
        "loss_policy": loss - kl_term,
        "loss_kl": kl_term,
        **(of_tokens if totals["tokens"] else dict.fromkeys(of_tokens, math.nan)),
        "grad_norm": totals["grad_norm"] / len(steps),
        "stepped": min(step["stepped"] for step in steps),
        "empty_steps": totals["empty_steps"],
    }
