"""The row pass on a CPU: same results as policy_loss_triton.py, few passes, no [N, V] temporary.

Works through the rows in blocks that stay in the cache: two block buffers are allocated once and
every operation writes into one of them. What is per row rather than per logit is done in float64,
which costs nothing there, by the functions of reference.py. Bad values raise at once. Also runs
float64 logits on any device.
"""

import torch
from torch import Tensor

from kernels import reference
from kernels.reference import Objective
from kernels.rows import Rows, RowStats, bad_row_error

BLOCK_ELEMENTS = 2**19  # logits a thread: 2 MiB in fp32, so that its buffers stay in the cache


def run_rows(
    logits_NV: Tensor, rows: Rows, objective: Objective, stats: RowStats, grad_NV: Tensor | None
) -> None:
    """Fill stats, and grad_NV (which may be logits_NV) with d(sum w loss)/dlogits if given."""
    # With z the logits at temperature T and c = w dloss/dlogp, the gradient by the logits of a row
    # is c/T (onehot(target) - softmax(z)): softmax is exp(z)/sum, so the exponentials of the
    # forward pass are scaled in place and one entry of them is added to. That is all of backward.
    num_rows, vocab_size = logits_NV.shape
    dtype = stats.entropy_N.dtype
    # Each operation ends in a wait for all threads: blocks grow with them, the waits do not.
    block = max(1, min(num_rows, BLOCK_ELEMENTS * torch.get_num_threads() // vocab_size))
    centred = torch.empty(block, vocab_size, dtype=dtype, device=logits_NV.device)
    # Where the types agree the exponentials are written into the gradient at once.
    direct = grad_NV is not None and grad_NV.dtype == dtype
    exps = None if direct else torch.empty_like(centred)
    rows = rows._replace(targets_N=_checked_targets(rows, vocab_size))
    _check_finite(rows)
    for start in range(0, num_rows, block):
        span = slice(start, min(start + block, num_rows))
        size = span.stop - start
        exps_BV = grad_NV[span] if direct else exps[:size]
        slope_B, sum_B = _run_block(
            logits_NV[span], rows.take(span), objective, stats.take(span), centred[:size], exps_BV
        )
        if grad_NV is None:
            continue
        exps_BV.mul_((-slope_B / sum_B).to(dtype)[:, None])
        exps_BV.scatter_add_(1, rows.targets_N[span, None], slope_B.to(dtype)[:, None])
        if not direct:
            grad_NV[span].copy_(exps_BV)


def _run_block(
    logits_BV: Tensor,
    rows: Rows,
    objective: Objective,
    stats: RowStats,
    centred_BV: Tensor,
    exps_BV: Tensor,
) -> tuple[Tensor | None, Tensor]:
    """Fill stats, and exps_BV with e^((x - max)/T); it may be the memory of logits_BV. Return
    (weight * dloss/dlogp / T, or None without weights; sum of exps_BV) of each row, in float64."""
    # Less the largest logit, which changes no probability, or exp would overflow at 89 in fp32.
    max_B1 = logits_BV.amax(1, keepdim=True).to(centred_BV.dtype)
    # The target's difference in float64: two fp32 logits 160 apart would give it 8e-6 wrong.
    target_B1 = logits_BV.gather(1, rows.targets_N[:, None]).double() - max_B1
    target_B = target_B1[:, 0] / objective.temperature
    torch.sub(logits_BV, max_B1, out=centred_BV)
    if objective.temperature != 1.0:
        centred_BV.mul_(1.0 / objective.temperature)
    torch.exp(centred_BV, out=exps_BV)
    sum_B = exps_BV.sum(1).double()
    # Entropy is log(sum) - sum(z exp(z))/sum: it costs one product more, and no second pass.
    moment_B = centred_BV.mul_(exps_BV).nansum(1).double()  # an entry of -inf makes 0 * -inf: 0
    log_sum_B = sum_B.log()
    logp_B = target_B - log_sum_B
    if not bool(logp_B.isfinite().all()):
        _raise_bad_logits(logp_B, max_B1[:, 0], rows)
    stats.logp_N.copy_(logp_B)
    stats.entropy_N.copy_(log_sum_B - moment_B / sum_B)
    if rows.weights_N is None:
        return None, sum_B
    slope_B = _loss_and_slope(logp_B, rows, objective, stats)
    return slope_B * rows.weights_N / objective.temperature, sum_B


def _loss_and_slope(logp_B: Tensor, rows: Rows, objective: Objective, stats: RowStats) -> Tensor:
    """Write loss, KL, ratio and clip flag of each row; return dloss/dlogp (float64)."""
    if rows.advantages_N is None:  # cross entropy: A = 1, rho = 1, and the loss reads as -logp
        stats.loss_N.copy_(-logp_B)
        stats.ratio_N.fill_(1.0)
        return torch.full_like(logp_B, -1.0)
    # A few numbers a row, beside V logits: here the equations can be the reference's own, and
    # only what is done V times a row has a fast form.
    advantages_B = rows.advantages_N.double()
    ratio_B = reference.ratio(logp_B, rows.old_logp_N)
    loss_B = -reference.clipped_surrogate(ratio_B, advantages_B, objective)  # Eq. 3
    if rows.ref_logp_N is not None:
        kl_B = reference.kl(logp_B, rows.ref_logp_N, objective.kl_estimator)  # Eq. 4
        stats.kl_N.copy_(kl_B)
        loss_B += objective.kl_coef * kl_B
    stats.loss_N.copy_(loss_B)
    stats.ratio_N.copy_(ratio_B)
    stats.clipped_N.copy_(reference.clip_side(ratio_B, advantages_B, objective))
    # The gradient coefficient of Sec. 5.2 is that of the objective J, which the loss negates.
    return -reference.gradient_coefficient(
        logp_B, advantages_B, rows.old_logp_N, rows.ref_logp_N, objective
    )


def _checked_targets(rows: Rows, vocab_size: int) -> Tensor:
    targets_N = rows.targets_N.long()
    outside_N = (targets_N < 0) | (targets_N >= vocab_size)
    if bool(outside_N.any()):
        raise bad_row_error(_row_id(rows, outside_N), 1)
    return targets_N


def _check_finite(rows: Rows) -> None:
    for field in rows[1:5]:
        if field is not None and not bool(field.isfinite().all()):
            raise bad_row_error(_row_id(rows, ~field.isfinite()), 2)


def _raise_bad_logits(logp_B: Tensor, max_B: Tensor, rows: Rows) -> None:
    bad_B = ~logp_B.isfinite()
    first = int(bad_B.nonzero()[0])
    # A NaN or +inf makes the maximum one too; with a finite maximum the target itself is -inf.
    code = 4 if bool(max_B[first].isfinite()) else 3
    raise bad_row_error(_row_id(rows, bad_B), code)


def _row_id(rows: Rows, bad_N: Tensor) -> int:
    return int(rows.ids_N[bad_N.nonzero()[0]])
