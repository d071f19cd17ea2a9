"""AdamW groups, learning-rate schedules, and one optimizer step from token-weighted rows.

Pretraining, SFT and GRPO make their updates here: the weight of every token is fixed before the
batch is split, so micro-batch size and world size never change the update. Next: data.py.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from kernels import check_status, linear_cross_entropy
from nanomath.data import TrainBatch
from nanomath.dist import Dist, all_reduce_sum, clip_grad_norm, microbatch_sync


def make_adamw(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """Build AdamW (Sec. 2.2): matrices decay, vectors (norm scales) do not."""
    # Decay pulls a weight to 0. For a matrix that is a prior; a norm's scale belongs near 1, and a
    # bias or scale has too few numbers to overfit.
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # One kernel for all tensors instead of a loop over them: at small sizes the loop is the time.
    fused = all(p.device.type in ("cuda", "cpu") for p in parameters)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def multi_step_lr(step: int, *, num_steps: int, peak: float, warmup_steps: int) -> float:
    """Return the paper's multi-step schedule at 0-based `step` of num_steps (Sec. 2.2).

    Linear warm-up to the peak, 31.6% of it from 80% of training on, 10.0% from 90% on.
    """
    # Step 0 is trained at a rate above 0, and the last warm-up step at the peak.
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    # 31.6% is sqrt(10%): each of the two drops divides the rate by the same factor.
    if step >= 0.9 * num_steps:
        return 0.100 * peak
    if step >= 0.8 * num_steps:
        return 0.316 * peak
    return peak


def cosine_lr(step: int, *, num_steps: int, peak: float, warmup_steps: int) -> float:
    """Return linear warm-up, then a cosine from the peak to zero at num_steps."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    # The share of the steps after warm-up that are done; 0 steps after it divide by 1.
    share = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.5 * peak * (1.0 + math.cos(math.pi * min(1.0, share)))


def constant_lr(step: int, *, num_steps: int, peak: float, warmup_steps: int) -> float:
    """Return linear warm-up, then the peak (Sec. 3 and 4.2 use a constant rate)."""
    return peak * min(1.0, (step + 1) / max(1, warmup_steps))


SCHEDULES: dict[str, Callable[..., float]] = {
    "multi_step": multi_step_lr,
    "cosine": cosine_lr,
    "constant": constant_lr,
}


def split_rows(
    rows: Sequence[int], num_rows_longest: int, micro_batch_size: int
) -> list[list[int]]:
    """Cut this rank's rows into micro-batches; every rank gets the same number of them.

    num_rows_longest is the row count of the rank that has most. A rank that has run out of rows
    gets empty lists: it still has to take part in the collectives of a sharded model.
    """
    # Counted from the longest rank's rows, not from this rank's: FSDP2 gathers weights in every
    # forward pass, and a rank that made one pass fewer would leave the others waiting.
    starts = range(0, max(num_rows_longest, 1), micro_batch_size)
    return [list(rows[start : start + micro_batch_size]) for start in starts]


def accumulate_gradients(
    model: nn.Module,
    micro_batches: Sequence[list[int]],
    loss_of_rows: Callable[[list[int]], torch.Tensor],
) -> None:
    """Add up the gradients of loss_of_rows over this rank's micro-batches.

    loss_of_rows must already carry the global weights: the gradients of all micro-batches and
    ranks are summed, never averaged. An empty micro-batch must still give a loss with a graph.
    """
    for index, rows in enumerate(micro_batches):
        # Gradients travel between ranks once a step, in the last backward pass, not once a pass.
        microbatch_sync(model, is_last=index == len(micro_batches) - 1)
        loss_of_rows(rows).backward()


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    lr: float,
    max_grad_norm: float | None,
    dist: Dist,
) -> tuple[float, bool]:
    """Clip, step, clear the gradients. Return (gradient norm before clipping, whether it stepped).

    A gradient that is not finite leaves the weights and the optimizer as they were, on all ranks
    alike: the norm is global. So does one of zeros, with nothing to learn from: momentum and weight
    decay would move the weights all the same.
    """
    # One number decides for all ranks: whether one of them skips must not depend on its own rows.
    grad_norm = float(clip_grad_norm(model.parameters(), max_grad_norm, dist))
    finite = math.isfinite(grad_norm)
    if finite and grad_norm > 0.0:
        # Set anew each step, a function of the step alone: a resumed run needs no schedule's state.
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    # None, not zeros: the memory goes back before the next batch is sampled, 2 bytes a weight or 4.
    optimizer.zero_grad(set_to_none=True)
    return grad_norm, finite


def supervised_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    *,
    lr: float,
    max_grad_norm: float | None,
    micro_batch_size: int,
    dist: Dist,
) -> dict[str, float]:
    """Take one cross-entropy step on a global batch and return its loss and gradient norm.

    Each rank trains on its own rows of the batch. The batch's weights sum to one over all its
    trained tokens, so the loss is their mean (Sec. 2.2 and 3).
    """
    # Rows go round the ranks, not in blocks: a batch sorted by anything is shared evenly.
    num_rows = batch.tokens_BT.shape[0]
    mine = range(dist.rank, num_rows, dist.world_size)
    longest = math.ceil(num_rows / dist.world_size)
    losses = []
    status = torch.zeros(1, dtype=torch.int64, device=dist.device)

    def loss_of_rows(rows: list[int]) -> torch.Tensor:
        # A rank without rows runs one with weight 0, so that every weight has a gradient to reduce.
        part = batch.rows(rows or [0]).to(dist.device)
        weights_BT = part.weights_BT if rows else torch.zeros_like(part.weights_BT)

        def head_fn(hidden_BTD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
            return linear_cross_entropy(
                hidden_BTD.flatten(0, 1),
                head_VD,
                part.tokens_BT[:, 1:].flatten(),
                weights_N=weights_BT[:, :-1].flatten(),
                status=status,
            ).loss

        # The last token is a target only: nothing is predicted from it.
        loss = model(
            part.tokens_BT[:, :-1],
            head_fn=head_fn,
            segments_BT=None if part.segments_BT is None else part.segments_BT[:, :-1],
            positions_BT=None if part.positions_BT is None else part.positions_BT[:, :-1],
        )
        losses.append(loss.detach())
        return loss

    # Nothing above has waited for a GPU. Errors of the loss kernels are looked at once a step.
    accumulate_gradients(model, split_rows(mine, longest, micro_batch_size), loss_of_rows)
    check_status(status)
    grad_norm, stepped = optimizer_step(
        model, optimizer, lr=lr, max_grad_norm=max_grad_norm, dist=dist
    )
    # Weights are global, so ranks add up: a mean of their means would weigh short ranks too much.
    total = all_reduce_sum({"loss": float(torch.stack(losses).double().sum())}, dist)
    return {"loss": total["loss"], "grad_norm": grad_norm, "stepped": float(stepped)}
