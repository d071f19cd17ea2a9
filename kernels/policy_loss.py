"""The policy loss from logits [N, V], with its gradient made in the forward pass.

    policy_loss      GRPO's clipped surrogate with the k3 KL (Eq. 3, 4), summed with a weight a row
    cross_entropy    the same pass with A = 1 and rho = 1 (pretraining, SFT, RFT)
    token_logprobs   log-probability and entropy only, no gradient, one sweep

A row's weight carries everything that scales its loss (1/(P G |o|), gradient accumulation, world
size), so backward hands the finished gradient out as it is; any other upstream gradient is applied
in place. The gradient exists once: backward can run once, and double backward raises. CUDA tensors
go to the Triton kernel, all others to torch. The trainers use the forms of linear.py, which never
hold [N, V].
"""

import os
from dataclasses import replace

import torch
from torch import Tensor

from kernels import policy_loss_torch
from kernels.reference import Objective, PolicyLossOutput
from kernels.rows import Rows, RowStats, check_logits, check_rows, spread

# The log-probability alone, without clip or KL.
NOTHING = Objective(clip_eps_low=0.0, clip_eps_high=0.0, kl_coef=0.0)


def policy_loss(
    logits_NV: Tensor,
    targets_N: Tensor,
    objective: Objective,
    *,
    weights_N: Tensor,
    advantages_N: Tensor,
    old_logp_N: Tensor | None = None,
    ref_logp_N: Tensor | None = None,
    status: Tensor | None = None,
) -> PolicyLossOutput:
    """Compute GRPO's loss sum_n w_n * -(min(rho A, clip(rho) A) - kl_coef * kl) (Eq. 3, 4).

    logits_NV bf16, fp16, fp32 or fp64; targets_N int64 or int32; the rest fp32 or fp64, constants
    of the loss. old_logp_N None: the policy is its own old policy, rho = 1 with its gradient (one
    update per batch of rollouts). Rows of weight 0 are dropped and hold 0 in every output.
    status: on a GPU, a word (int64 [1], zeros) to share among calls; see check_status.
    Raises ValueError for a shape, dtype or setting that does not fit, and on a CPU for bad values.
    """
    rows = Rows(targets_N, weights_N, advantages_N, old_logp_N, ref_logp_N)
    return _from_logits(logits_NV, rows, objective, status)


def cross_entropy(
    logits_NV: Tensor, targets_N: Tensor, *, weights_N: Tensor, status: Tensor | None = None
) -> PolicyLossOutput:
    """Compute sum_n w_n * -logp_n; arguments and errors as in policy_loss (SFT in Sec. 5.2)."""
    return _from_logits(logits_NV, Rows(targets_N, weights_N), NOTHING, status)


@torch.no_grad()
def token_logprobs(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    status: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute (logp_N, entropy_N in nats) of the targets, without gradient, in one sweep.

    Raises as policy_loss does; on a GPU a bad row is NaN and `status`, if given, names it.
    """
    check_logits(logits_NV)
    objective = replace(NOTHING, temperature=temperature)
    rows = check_rows(Rows(targets_N), logits_NV, objective)
    # One pass with the loss's own code, so that both round alike: the ratio of a policy to itself
    # is then 1 to the last bit.
    stats = RowStats.new(logits_NV, logits_NV.shape[0], has_loss=False)
    run_rows(logits_NV.detach(), rows, objective, stats, None, status)
    return stats.logp_N, stats.entropy_N


def run_rows(
    logits_NV: Tensor,
    rows: Rows,
    objective: Objective,
    stats: RowStats,
    grad_NV: Tensor | None,
    status: Tensor | None,
) -> None:
    """Fill stats and, if given, grad_NV (may be logits_NV); no row has a weight of 0."""
    if logits_NV.shape[0] == 0:  # a grid of no programs cannot be launched
        return
    # The kernels walk along a row; how far apart rows are is free.
    if logits_NV.stride(1) != 1:
        logits_NV = logits_NV.contiguous()
    if uses_triton(logits_NV):
        # Imported here: triton exists on Linux only, and a CPU needs none.
        from kernels.policy_loss_triton import launch_rows

        word = (torch.int64, (1,), logits_NV.device)
        if status is not None and (status.dtype, status.shape, status.device) != word:
            raise ValueError(f"status must be int64 [1] on {logits_NV.device}: see check_status")
        launch_rows(logits_NV, rows, objective, stats, grad_NV, status)
    else:
        policy_loss_torch.run_rows(logits_NV, rows, objective, stats, grad_NV)


def uses_triton(tensor: Tensor) -> bool:
    """Tell whether this tensor goes to the Triton kernel: on a GPU, or with TRITON_INTERPRET=1
    (Triton's own switch, which runs the kernel's source on CPU tensors, slowly). The kernel's
    sums are fp32, so float64 stays with torch."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (tensor.is_cuda or interpreted) and tensor.dtype != torch.float64


def new_status(like: Tensor) -> Tensor | None:
    # The CPU path raises at once and needs no word to leave a message in.
    return torch.zeros(1, dtype=torch.int64, device=like.device) if uses_triton(like) else None


def scale_by_upstream(grads: list[Tensor | None], upstream: Tensor) -> None:
    """Multiply finished gradients by the upstream gradient, in place. On a GPU the value is never
    read by the host: the kernel leaves at once where it is 1."""
    # In the trainers it is 1: everything that scales the loss is in the weights. A product by 1 of
    # a 7B model's head gradient would move 1.7 GB a micro-batch for nothing.
    for grad in grads:
        if grad is None or grad.numel() == 0:
            continue
        if uses_triton(grad):
            from kernels.policy_loss_triton import launch_scale

            launch_scale(grad, upstream)
        elif grad.is_cuda or float(upstream) != 1.0:
            grad.mul_(upstream)


class _Given(torch.autograd.Function):
    """A loss whose gradients by `inputs` are made already: backward hands them out, once."""

    @staticmethod
    def forward(ctx, loss, grads, *inputs):
        # inputs are only named, for autograd to know whose gradients these are.
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        # Autograd runs backward with gradients enabled only for create_graph=True.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a fused loss has no second derivative (create_graph=True): its gradient is a "
                "constant made in the forward pass; use kernels.reference"
            )
        if ctx.grads is None:
            raise RuntimeError(
                "backward ran twice through a fused loss: its gradient is made in the forward pass "
                "and handed out once; compute the loss again instead of retain_graph=True"
            )
        grads, ctx.grads = ctx.grads, None  # dropped here, so that autograd may keep the memory
        scale_by_upstream(grads, upstream)
        return None, None, *grads


def with_gradients(
    stats: RowStats,
    weights_N: Tensor,
    inputs: tuple[Tensor, ...],
    grads: list[Tensor | None],
    status: Tensor | None,
) -> PolicyLossOutput:
    """Return the loss, with the finished gradients behind it, and what each row had."""
    # The weights carry 1 / (P G |o|) of Eq. 3 already, so a sum is all that is left to do.
    # Summed in float64, so that it does not depend on the order of the rows.
    loss = (stats.loss_N.double() * weights_N.double()).sum().to(stats.loss_N.dtype)
    return PolicyLossOutput(_Given.apply(loss, grads, *inputs), **stats._asdict(), status=status)


def _from_logits(logits_NV, rows, objective, status) -> PolicyLossOutput:
    check_logits(logits_NV)
    all_rows = check_rows(rows, logits_NV, objective)
    status = new_status(logits_NV) if status is None else status
    num_rows = logits_NV.shape[0]
    needs_grad = logits_NV.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        index_M = all_rows.weights_N.nonzero()[:, 0]
        # A copy, so the gradient may go over it. It costs a read and a write of the logits more
        # than a kernel that skips rows: this form is for study and tests, linear.py for training.
        logits_MV = logits_NV[index_M]
        stats = RowStats.new(logits_MV, len(index_M), has_loss=True)
        grad_MV = logits_MV if needs_grad else None
        run_rows(logits_MV, all_rows.take(index_M), objective, stats, grad_MV, status)
        # Back to the caller's N rows: those of weight 0 hold 0 in every output.
        stats = RowStats(*(spread(x_M, index_M, num_rows) for x_M in stats))
        grads = [spread(grad_MV, index_M, num_rows) if needs_grad else None]
    return with_gradients(stats, all_rows.weights_N, (logits_NV,), grads, status)
