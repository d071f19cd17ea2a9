"""The row pass on a GPU: log-softmax, ratio, clip, KL, loss and gradient in one Triton kernel.

One program per row, two sweeps over its logits. Sweep 1 keeps an online log-sum-exp and the
entropy's moment in each thread; then a few scalars decide the row's loss and slope; sweep 2 writes
the gradient, over the logits if asked. No atomics, nothing waits for the device, and only V's block
and the terms that are switched off (arguments that are None) are compiled in. Imported only when a
kernel runs; under TRITON_INTERPRET=1, set before the import, the same source runs on CPU tensors.

Bytes: DRAM should see one read and one write of a row. A row of 102,400 bf16 logits is 200 KiB; at
one row per SM an H100 has 27 MB of rows in flight, half of them still to be read again, which its
50 MB L2 can hold: sweep 1 asks it to keep them (evict_last), sweep 2 and its stores to let go. So a
program takes a whole SM (32 warps, 33 to 64 registers), and since no second program is there to
hide its waits, each block is loaded two steps before it is used: 32 KiB are always on the way.
Keeping a row in shared memory instead would need the same SM and could not be run by the
interpreter. Not measured: no claim is made before `ncu` has counted the bytes.
Next: linear.py.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import Objective
from kernels.rows import Rows, RowStats

LOG2_E = tl.constexpr(math.log2(math.e))
# Stands for -inf where 0 * -inf would be NaN. A row without a logit above it counts as all -inf.
FLOOR = tl.constexpr(-1e30)
PER_THREAD = tl.constexpr(8)  # logits a thread loads at a time: 16 bytes of bf16


# Lengths and chunks shift these pointers by any number of rows: that must not compile again.
@triton.jit(
    do_not_specialize_on_alignment=[
        name.removesuffix("_N") + "_ptr" for name in Rows._fields + RowStats._fields
    ]
)
def policy_loss_kernel(
    logits_ptr,  # (N, V) bf16, fp16 or fp32, row stride = logits_stride
    grad_ptr,  # (N, V) dtype of the logits, row stride = grad_stride; may be logits_ptr; or None
    targets_ptr,  # (N,) int64 or int32
    weights_ptr,  # (N,) fp32 or fp64; None: logp and entropy only
    advantages_ptr,  # (N,) fp32 or fp64; None: cross entropy
    old_logp_ptr,  # (N,) fp32 or fp64, or None
    ref_logp_ptr,  # (N,) fp32 or fp64, or None
    ids_ptr,  # (N,) int64, row numbers for the status word
    logp_ptr,  # (N,) fp64
    entropy_ptr,  # (N,) fp32, as are the next three
    loss_ptr,
    kl_ptr,
    ratio_ptr,
    clipped_ptr,  # (N,) int8
    status_ptr,  # (1,) int64: row << 8 | reason of a bad row; or None
    logits_stride,
    grad_stride,
    vocab_size,
    inverse_temperature: tl.float64,
    clip_eps_low: tl.float64,
    clip_eps_high: tl.float64,
    kl_coef: tl.float64,
    KL: tl.constexpr,  # k1, k2 or k3
    THREADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # N * V passes 2^31 at 20,971 rows of 102,400
    logits_ptr += row * logits_stride
    if grad_ptr is not None:
        grad_ptr += row * grad_stride
    weight = tl.full([], 1.0, tl.float64)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row).to(tl.float64)  # not 0: those rows were dropped
    exponent_scale = tl.cast(inverse_temperature * LOG2_E, tl.float32)
    target = tl.load(targets_ptr + row).to(tl.int64)
    in_range = (target >= 0) & (target < vocab_size)
    x_target = tl.load(logits_ptr + target, mask=in_range, other=0.0).to(tl.float32)
    advantage, old_logp, ref_logp = None, None, None
    if advantages_ptr is not None:
        advantage = tl.load(advantages_ptr + row).to(tl.float64)
    if old_logp_ptr is not None:
        old_logp = tl.load(old_logp_ptr + row).to(tl.float64)
    if ref_logp_ptr is not None:
        ref_logp = tl.load(ref_logp_ptr + row).to(tl.float64)
    # Kept in the L2 cache for sweep 2, if there is one.
    EVICTION: tl.constexpr = "evict_first" if grad_ptr is None else "evict_last"
    row_max, row_sum, moment = _log_sum_exp(
        logits_ptr, vocab_size, exponent_scale, EVICTION, THREADS
    )

    # The row's scalars, in float64: a difference of log-probabilities must not lose digits.
    log_sum = tl.log(row_sum.to(tl.float64))
    logp = (x_target.to(tl.float64) - row_max) * inverse_temperature - log_sum
    entropy = log_sum - moment / row_sum * inverse_temperature
    loss, slope, kl, ratio, side, inputs = _loss_and_slope(
        logp, advantage, old_logp, ref_logp, clip_eps_low, clip_eps_high, kl_coef, KL
    )
    inputs += weight

    code = tl.where(x_target > FLOOR, 0, 4)  # kernels.rows.BAD_ROW_REASONS
    code = tl.where(row_sum >= 1.0, code, 3)  # the maximum alone adds 1; a NaN or +inf makes it NaN
    finite = (inputs - inputs) == 0.0
    code = tl.where(finite | (code != 0), code, 2)
    code = tl.where(in_range, code, 1)
    if status_ptr is not None:  # noqa: SIM102  (known at compile time, the next one is not)
        if code != 0:
            tl.store(status_ptr, tl.load(ids_ptr + row) * 256 + code)
    poison = tl.where(code == 0, 0.0, float("nan"))  # a bad row is NaN throughout
    tl.store(logp_ptr + row, logp + poison)
    tl.store(entropy_ptr + row, entropy + poison)
    if weights_ptr is not None:
        tl.store(loss_ptr + row, loss + poison)
        tl.store(kl_ptr + row, kl + poison)
        tl.store(ratio_ptr + row, ratio + poison)
        tl.store(clipped_ptr + row, side)
    if grad_ptr is not None:
        # d(weight * loss)/dx_j = coefficient * (1[j = target] - p_j)
        coefficient = weight * slope * inverse_temperature + poison
        scale = coefficient.to(tl.float32) / row_sum
        _store_minus_p(logits_ptr, grad_ptr, vocab_size, row_max, exponent_scale, scale, THREADS)
        tl.debug_barrier()  # the target's entry goes last, over what another thread wrote there
        at_target = coefficient * (1.0 - tl.exp(logp))
        tl.store(grad_ptr + target, at_target.to(tl.float32), mask=in_range)


@triton.jit
def _log_sum_exp(
    logits_ptr, vocab_size, exponent_scale, EVICTION: tl.constexpr, THREADS: tl.constexpr
):
    """Sweep 1: m = max x, s = sum e^((x-m)/T), w = sum (x-m) e^((x-m)/T), per thread, then of the
    row. 7 instructions a logit, no reduction among threads inside the loop."""
    offsets = _offsets(THREADS)
    m = tl.full([THREADS], FLOOR, tl.float32)
    s = tl.zeros([THREADS], tl.float32)
    w = tl.zeros([THREADS], tl.float32)
    first = _load(logits_ptr, offsets, vocab_size, EVICTION)
    second = _load(logits_ptr, THREADS * PER_THREAD + offsets, vocab_size, EVICTION)
    for start in range(0, vocab_size, THREADS * PER_THREAD):
        x = first.to(tl.float32)
        first = second
        ahead = start + 2 * THREADS * PER_THREAD + offsets
        second = _load(logits_ptr, ahead, vocab_size, EVICTION)
        new_m = tl.maximum(m, tl.max(x, axis=1))
        rescale = tl.exp2((m - new_m) * exponent_scale)
        w = (w + s * (m - new_m)) * rescale
        s = s * rescale
        m = new_m
        delta = x - m[:, None]
        e = tl.exp2(delta * exponent_scale)  # keeps a NaN, which max and maximum may drop
        s += tl.sum(e, axis=1)
        w += tl.sum(e * tl.maximum(delta, FLOOR), axis=1)
    row_max = tl.max(m, axis=0)
    rescale = tl.exp2((m - row_max) * exponent_scale)
    return (
        row_max,
        tl.sum(s * rescale, axis=0),
        tl.sum((w + s * (m - row_max)) * rescale, axis=0),
    )


@triton.jit
def _loss_and_slope(
    logp, advantage, old_logp, ref_logp, clip_eps_low, clip_eps_high, kl_coef, KL: tl.constexpr
):
    """(loss, dloss/dlogp, KL, rho, clip side, a sum that is finite where every input is)."""
    one = tl.full([], 1.0, tl.float64)
    ratio, kl, inputs, side = one, one - one, one, tl.full([], 0, tl.int8)
    loss, slope = -logp, -one  # cross entropy is A = 1, rho = 1
    if advantage is not None:
        inputs += advantage
        if old_logp is not None:
            inputs += old_logp
            ratio = tl.exp(logp - old_logp)
        low, high = ratio < 1.0 - clip_eps_low, ratio > 1.0 + clip_eps_high
        bounded = tl.where(low, 1.0 - clip_eps_low, tl.where(high, 1.0 + clip_eps_high, ratio))
        loss = -tl.minimum(ratio * advantage, bounded * advantage)  # Eq. 3
        low, high = low & (advantage < 0), high & (advantage > 0)
        side = high.to(tl.int8) - low.to(tl.int8)
        slope = tl.where(low | high, 0.0, -ratio * advantage)
        if ref_logp is not None:
            inputs += ref_logp
            log_ref_ratio = ref_logp - logp
            if KL == "k1":
                kl, pull = -log_ref_ratio, -one  # value, and -dkl/dlogp
            elif KL == "k2":
                kl, pull = 0.5 * log_ref_ratio * log_ref_ratio, log_ref_ratio
            else:
                pull = tl.exp(log_ref_ratio) - 1.0  # pi_ref / pi - 1
                kl = pull - log_ref_ratio  # Eq. 4
            loss += kl_coef * kl
            slope -= kl_coef * pull
    return loss, slope, kl, ratio, side, inputs


@triton.jit
def _store_minus_p(
    logits_ptr, grad_ptr, vocab_size, row_max, exponent_scale, scale, THREADS: tl.constexpr
):
    """Sweep 2: grad = -scale * e^((x-m)/T). A block is loaded before it is overwritten, so
    grad_ptr may be logits_ptr."""
    offsets = _offsets(THREADS)
    first = _load(logits_ptr, offsets, vocab_size, "evict_first")
    second = _load(logits_ptr, THREADS * PER_THREAD + offsets, vocab_size, "evict_first")
    for start in range(0, vocab_size, THREADS * PER_THREAD):
        x = first.to(tl.float32)
        first = second
        ahead = start + 2 * THREADS * PER_THREAD + offsets
        second = _load(logits_ptr, ahead, vocab_size, "evict_first")
        grad = -scale * tl.exp2((x - row_max) * exponent_scale)
        mask = start + offsets < vocab_size
        tl.store(grad_ptr + start + offsets, grad, mask=mask, cache_modifier=".cs")


@triton.jit
def _offsets(THREADS: tl.constexpr):
    return tl.arange(0, THREADS)[:, None] * PER_THREAD + tl.arange(0, PER_THREAD)[None, :]


@triton.jit
def _load(logits_ptr, offsets, vocab_size, EVICTION: tl.constexpr):
    return tl.load(
        logits_ptr + offsets, mask=offsets < vocab_size, other=float("-inf"),
        eviction_policy=EVICTION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def scale_kernel(
    grad_ptr,  # (R, C) any float dtype, row stride = stride
    upstream_ptr,  # () fp32
    stride,
    num_rows,
    num_columns,
    BLOCK: tl.constexpr,
):
    """grad *= upstream in place; leaves at once where upstream is 1, as it is in the trainers."""
    upstream = tl.load(upstream_ptr).to(tl.float32)
    if upstream != 1.0:
        for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
            row_ptr = grad_ptr + tl.cast(row, tl.int64) * stride
            for start in range(0, num_columns, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                x = tl.load(row_ptr + columns, mask=columns < num_columns).to(tl.float32)
                tl.store(row_ptr + columns, x * upstream, mask=columns < num_columns)


def launch_rows(
    logits_NV: Tensor,
    rows: Rows,
    objective: Objective,
    stats: RowStats,
    grad_NV: Tensor | None,
    status: Tensor | None,
) -> None:
    """Launch policy_loss_kernel: fill stats and, if given, grad_NV (may be logits_NV)."""
    num_rows, vocab_size = logits_NV.shape
    # With and without a gradient alike: other threads would sum up to other log-probabilities.
    warps = max(1, min(32, triton.next_power_of_2(vocab_size) // (32 * PER_THREAD.value)))
    strides = logits_NV.stride(0), 0 if grad_NV is None else grad_NV.stride(0)
    with torch.cuda.device_of(logits_NV):  # Triton launches on the current one
        policy_loss_kernel[(num_rows,)](
            logits_NV, grad_NV, *rows, *stats, status, *strides, vocab_size,
            1.0 / objective.temperature, objective.clip_eps_low, objective.clip_eps_high,
            objective.kl_coef, KL=objective.kl_estimator, THREADS=32 * warps, num_warps=warps,
        )  # fmt: skip


def launch_scale(grad: Tensor, upstream: Tensor) -> None:
    """Multiply a gradient matrix by the upstream gradient (a device scalar) in place."""
    num_rows, num_columns = grad.shape
    block = min(4096, triton.next_power_of_2(num_columns))
    with torch.cuda.device_of(grad):
        scale_kernel[(min(num_rows, 1024),)](
            grad, upstream, grad.stride(0), num_rows, num_columns, BLOCK=block
        )
