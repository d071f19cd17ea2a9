"""The row pass on a GPU: log-softmax, ratio, clip, KL, loss and gradient in one Triton kernel.

One program per row, two sweeps over its logits. Sweep 1 keeps an online log-sum-exp and the
entropy's moment per lane; then a few scalars decide the row's loss and slope; sweep 2 writes the
gradient, over the logits if asked. Traffic: two reads, of which the second can hit the L2 cache,
and one write. No atomics, nothing waits for the device, and only V and the switched-off terms
are compiled in. Imported only when a kernel runs; under TRITON_INTERPRET=1, set before the import,
the same source runs on CPU tensors.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import LossSettings, Rows, RowStats

LOG2_E = math.log2(math.e)
# Stands for -inf, so that no difference is NaN. Lower finite logits count as this one.
FLOOR = tl.constexpr(-1e30)


@triton.jit
def policy_loss_kernel(
    logits_ptr,  # (N, V) bf16, fp16 or fp32, row stride = logits_stride
    grad_ptr,  # (N, V) dtype of the logits, row stride = grad_stride; may be logits_ptr
    targets_ptr,  # (N,) int64 or int32
    weights_ptr,  # (N,) fp32 or fp64; this and the next three are read only where switched on
    advantages_ptr,  # (N,) fp32 or fp64
    old_logp_ptr,  # (N,) fp32 or fp64
    ref_logp_ptr,  # (N,) fp32 or fp64
    ids_ptr,  # (N,) int64, row numbers for the status word
    loss_ptr,  # (N,) fp32, as are the next four
    logp_ptr,
    entropy_ptr,
    kl_ptr,
    ratio_ptr,
    clipped_ptr,  # (N,) int8
    status_ptr,  # (1,) int64: row << 8 | reason of a bad row
    logits_stride,
    grad_stride,
    vocab_size,
    exponent_scale,  # log2(e) / temperature
    temperature: tl.float64,
    clip_eps_low: tl.float64,
    clip_eps_high: tl.float64,
    kl_coef: tl.float64,
    HAS_LOSS: tl.constexpr,
    HAS_ADVANTAGES: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_STATUS: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # N * V passes 2^31 at 20,971 rows of 102,400
    logits_ptr += row * logits_stride
    grad_ptr += row * grad_stride
    columns = tl.arange(0, BLOCK)
    weight = 1.0
    if HAS_LOSS:
        weight = tl.load(weights_ptr + row).to(tl.float64)
    if HAS_LOSS and weight == 0.0:  # outputs were made as zeros
        if WRITE_GRAD:
            zeros = tl.zeros([BLOCK], tl.float32)
            for start in range(0, vocab_size, BLOCK):
                mask = start + columns < vocab_size
                tl.store(grad_ptr + start + columns, zeros, mask=mask)
    else:
        # Sweep 1, per lane: m = max x, s = sum e^((x-m)/T), w = sum (x-m) e^((x-m)/T). One exp2
        # an element serves both cases: a new maximum rescales s and w, any other x adds to them.
        m = tl.full([BLOCK], FLOOR, tl.float32)
        s = tl.zeros([BLOCK], tl.float32)
        w = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            mask = start + columns < vocab_size
            x = tl.load(
                logits_ptr + start + columns, mask=mask, other=FLOOR, eviction_policy="evict_last"
            ).to(tl.float32)
            x = tl.where(x < FLOOR, FLOOR, x)  # keeps a NaN, which maximum would drop
            delta = x - m
            e = tl.exp2(-tl.abs(delta) * exponent_scale)
            rises = delta > 0
            w = tl.where(rises, (w - s * delta) * e, w + e * delta)
            s = tl.where(rises, s * e + 1.0, s + e)
            m = tl.maximum(m, x)
        row_max = tl.max(m, axis=0)
        lane = tl.exp2((m - row_max) * exponent_scale)
        row_sum = tl.sum(s * lane, axis=0)
        moment = tl.sum((w + s * (m - row_max)) * lane, axis=0)

        # The row's scalars, in float64: a difference of log-probabilities must not lose digits.
        target = tl.load(targets_ptr + row).to(tl.int64)
        in_range = (target >= 0) & (target < vocab_size)
        x_target = tl.load(logits_ptr + target, mask=in_range, other=0.0).to(tl.float32)
        log_sum = tl.log(row_sum.to(tl.float64))
        logp = (x_target.to(tl.float64) - row_max.to(tl.float64)) / temperature - log_sum
        entropy = log_sum - moment.to(tl.float64) / row_sum.to(tl.float64) / temperature
        code = tl.where(x_target > FLOOR, 0, 4)
        well = (row_sum >= 1.0) & (row_sum < float("inf")) & (row_max > FLOOR)
        well = well & (row_max < float("inf"))
        code = tl.where(well, code, 3)

        loss = -logp
        slope = logp * 0.0 - 1.0  # dloss/dlogp; cross entropy is A = 1, rho = 1
        ratio = logp * 0.0 + 1.0
        inputs = weight + logp * 0.0
        if HAS_ADVANTAGES:
            advantage = tl.load(advantages_ptr + row).to(tl.float64)
            inputs += advantage * 0.0
            if HAS_OLD:
                old_logp = tl.load(old_logp_ptr + row).to(tl.float64)
                inputs += old_logp * 0.0
                ratio = tl.exp(logp - old_logp)
            low = ratio < 1.0 - clip_eps_low
            high = ratio > 1.0 + clip_eps_high
            bounded = tl.where(low, 1.0 - clip_eps_low, tl.where(high, 1.0 + clip_eps_high, ratio))
            loss = -tl.minimum(ratio * advantage, bounded * advantage)  # Eq. 3
            low = low & (advantage < 0)
            high = high & (advantage > 0)
            slope = tl.where(low | high, 0.0, -ratio * advantage)
            tl.store(clipped_ptr + row, tl.where(high, 1, tl.where(low, -1, 0)).to(tl.int8))
            if HAS_REF:
                ref_logp = tl.load(ref_logp_ptr + row).to(tl.float64)
                inputs += ref_logp * 0.0
                log_ref_ratio = ref_logp - logp
                excess = tl.exp(log_ref_ratio) - 1.0
                kl = excess - log_ref_ratio  # Eq. 4
                loss += kl_coef * kl
                slope -= kl_coef * excess
        finite = (inputs - inputs) == 0.0
        code = tl.where(finite | (code != 0), code, 2)
        code = tl.where(in_range, code, 1)
        if HAS_STATUS:  # noqa: SIM102  (this test is made at compile time, the next one is not)
            if code != 0:
                row_id = row
                if HAS_IDS:
                    row_id = tl.load(ids_ptr + row)
                tl.store(status_ptr, row_id * 256 + code)
        poison = tl.where(code == 0, 0.0, float("nan"))  # a bad row is NaN throughout
        tl.store(logp_ptr + row, logp + poison)
        tl.store(entropy_ptr + row, entropy + poison)
        if HAS_LOSS:
            tl.store(loss_ptr + row, loss + poison)
            tl.store(ratio_ptr + row, ratio + poison)
            if HAS_REF:
                tl.store(kl_ptr + row, kl + poison)
        if WRITE_GRAD:
            # Sweep 2: d(weight * loss)/dx_j = coefficient * (1[j = target] - p_j).
            coefficient = (weight * slope / temperature + poison).to(tl.float32)
            inverse_sum = 1.0 / row_sum
            tl.debug_barrier()  # every warp has read x_target before one overwrites it
            for start in range(0, vocab_size, BLOCK):
                offsets = start + columns
                mask = offsets < vocab_size
                x = tl.load(
                    logits_ptr + offsets, mask=mask, other=FLOOR, eviction_policy="evict_first"
                ).to(tl.float32)
                p = tl.exp2((x - row_max) * exponent_scale) * inverse_sum
                grad = coefficient * (tl.where(offsets == target, 1.0, 0.0) - p)
                tl.store(grad_ptr + offsets, grad, mask=mask, cache_modifier=".cs")


@triton.jit
def scale_kernel(
    grad_ptr,  # (R, C) any float dtype, row stride = stride
    upstream_ptr,  # () fp32
    stride,
    num_columns,
    BLOCK: tl.constexpr,
):
    """grad *= upstream in place; leaves at once where upstream is 1, as it is in the trainers."""
    upstream = tl.load(upstream_ptr).to(tl.float32)
    if upstream != 1.0:
        grad_ptr += tl.program_id(0).to(tl.int64) * stride
        columns = tl.arange(0, BLOCK)
        for start in range(0, num_columns, BLOCK):
            mask = start + columns < num_columns
            x = tl.load(grad_ptr + start + columns, mask=mask).to(tl.float32)
            tl.store(grad_ptr + start + columns, x * upstream, mask=mask)


def block_and_warps(vocab_size: int) -> tuple[int, int]:
    """Block of a sweep and warps of a program: 16 logits a thread, no spills on sm_90."""
    block = min(8192, triton.next_power_of_2(vocab_size))
    return block, max(1, min(16, block // 512))


def launch_rows(
    logits_NV: Tensor,
    rows: Rows,
    settings: LossSettings,
    stats: RowStats,
    grad_NV: Tensor | None,
    status: Tensor | None,
) -> None:
    """Launch policy_loss_kernel: fill stats and, if given, grad_NV (may be logits_NV)."""
    num_rows, vocab_size = logits_NV.shape
    block, warps = block_and_warps(vocab_size)
    unused = stats.logp_N  # any valid pointer, for arguments that are switched off
    pointers = (grad_NV, *rows, stats.loss_N, stats.logp_N, stats.entropy_N, *stats[3:], status)
    policy_loss_kernel[(num_rows,)](
        logits_NV,
        *(unused if pointer is None else pointer for pointer in pointers),
        logits_NV.stride(0),
        0 if grad_NV is None else grad_NV.stride(0),
        vocab_size,
        LOG2_E / settings.temperature,
        settings.temperature,
        settings.clip_eps_low,
        settings.clip_eps_high,
        settings.kl_coef,
        HAS_LOSS=rows.weights_N is not None,
        HAS_ADVANTAGES=rows.advantages_N is not None,
        HAS_OLD=rows.old_logp_N is not None,
        HAS_REF=rows.ref_logp_N is not None,
        HAS_IDS=rows.ids_N is not None,
        HAS_STATUS=status is not None,
        WRITE_GRAD=grad_NV is not None,
        BLOCK=block,
        num_warps=warps,
    )


def launch_scale(grad: Tensor, upstream: Tensor) -> None:
    """Multiply a gradient matrix by the upstream gradient (a device scalar) in place."""
    block, warps = block_and_warps(grad.shape[1])
    scale_kernel[(grad.shape[0],)](
        grad, upstream, grad.stride(0), grad.shape[1], BLOCK=block, num_warps=warps
    )
