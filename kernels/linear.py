"""The policy loss from hidden states [N, D] and the head's weight [V, D]: [N, V] never exists.

Rows without weight are dropped, the rest goes through in chunks: logits of the chunk into one
buffer, the row pass writes their gradient over them, and two more matrix products turn that into
the chunk's hidden gradient and add to the head's. So the forward pass does all 6 N V D FLOPs and
nothing is recomputed; backward hands the finished gradients out. The head's gradient is summed in
fp32: rounding each chunk to bf16 would bias training (the entropy drifts down).

Runs as the model's head_fn, inside the root's forward, where sharded weights are gathered. N = 0
gives zero gradients, so a rank without rows still takes part. On a GPU, dropping rows waits for the
device once (their number must be known); nothing else does.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kernels.policy_loss import NOTHING, new_status, run_rows, with_gradients
from kernels.reference import Objective, PolicyLossOutput
from kernels.rows import Rows, RowStats, check_head, check_rows, spread

# On a CPU a chunk's logits should stay in the cache (1M are 4 MiB), but each chunk also reads the
# head twice and its gradient once: below 256 rows that is what it would wait for.
CPU_CHUNK_ELEMENTS = 2**20
CPU_CHUNK_MIN_ROWS = 256
GPU_CHUNK_ROWS = 8192  # each chunk re-reads and re-writes the fp32 head gradient: 4-9% at 4096-8192


def linear_policy_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    objective: Objective,
    *,
    weights_N: Tensor,
    advantages_N: Tensor,
    old_logp_N: Tensor | None = None,
    ref_logp_N: Tensor | None = None,
    chunk_rows: int | None = None,
    status: Tensor | None = None,
) -> PolicyLossOutput:
    """Compute policy_loss of hidden @ head^T with gradients for both, by chunks of rows.

    hidden_ND and head_VD in one dtype, on one device. Outputs have N rows; those of weight 0 are
    dropped before the head and hold 0. chunk_rows: rows per chunk, chosen from memory if None.
    The other arguments, `status` and the errors are policy_loss's.
    """
    rows = Rows(targets_N, weights_N, advantages_N, old_logp_N, ref_logp_N)
    return _from_hidden(hidden_ND, head_VD, rows, objective, chunk_rows, status)


def linear_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    *,
    weights_N: Tensor,
    chunk_rows: int | None = None,
    status: Tensor | None = None,
) -> PolicyLossOutput:
    """Compute sum_n w_n * -logp_n from hidden states and head; otherwise as linear_policy_loss."""
    rows = Rows(targets_N, weights_N)
    return _from_hidden(hidden_ND, head_VD, rows, NOTHING, chunk_rows, status)


@torch.no_grad()
def linear_token_logprobs(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    status: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute (logp_N, entropy_N in nats) of hidden @ head^T without gradient, by chunks of rows.

    For the old and the reference passes. Raises as linear_policy_loss does.
    """
    check_head(hidden_ND, head_VD)
    objective = replace(NOTHING, temperature=temperature)
    rows = check_rows(Rows(targets_N), hidden_ND, objective)
    stats = RowStats.new(hidden_ND, hidden_ND.shape[0], has_loss=False)
    _run_chunks(hidden_ND, head_VD, rows, objective, stats, None, None, chunk_rows, status)
    return stats.logp_N, stats.entropy_N


def _from_hidden(hidden_ND, head_VD, rows, objective, chunk_rows, status) -> PolicyLossOutput:
    check_head(hidden_ND, head_VD)
    rows = check_rows(rows, hidden_ND, objective)
    status = new_status(hidden_ND) if status is None else status
    num_rows = hidden_ND.shape[0]
    needs_grads = [torch.is_grad_enabled() and x.requires_grad for x in (hidden_ND, head_VD)]
    # The gradients are made here, while the logits of a chunk are at hand; backward only hands
    # them out. So no graph is recorded.
    with torch.no_grad():
        # Prompt, padding and outputs that are not in the loss would cost as much as the others.
        index_M = rows.weights_N.nonzero()[:, 0]  # the one wait for the device
        hidden_MD = hidden_ND if len(index_M) == num_rows else hidden_ND[index_M]
        grad_hidden_MD = hidden_MD.new_empty(hidden_MD.shape) if needs_grads[0] else None
        grad_head_VD = _new_head_grad(head_VD) if needs_grads[1] else None
        stats = RowStats.new(hidden_MD, len(index_M), has_loss=True)
        _run_chunks(
            hidden_MD, head_VD, rows.take(index_M), objective, stats, grad_hidden_MD, grad_head_VD,
            chunk_rows, status,
        )  # fmt: skip
        # Back to the caller's N rows: the dropped ones have loss, statistics and gradient 0.
        stats = RowStats(*(spread(x_M, index_M, num_rows) for x_M in stats))
        grads = [None, None]
        if grad_hidden_MD is not None:
            grads[0] = spread(grad_hidden_MD, index_M, num_rows)
        if grad_head_VD is not None:
            grads[1] = grad_head_VD.to(head_VD.dtype)  # rounded once, after the last chunk
    return with_gradients(stats, rows.weights_N, (hidden_ND, head_VD), grads, status)


def _run_chunks(
    hidden_ND: Tensor,
    head_VD: Tensor,
    rows: Rows,
    objective: Objective,
    stats: RowStats,
    grad_hidden_ND: Tensor | None,
    grad_head_VD: Tensor | None,
    chunk_rows: int | None,
    status: Tensor | None,
) -> None:
    """Fill stats and the wanted gradients, chunk by chunk, with one buffer for the logits."""
    num_rows, vocab_size = hidden_ND.shape[0], head_VD.shape[0]
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    if num_rows == 0:
        # No chunk would store the head's gradient, and a rank without rows hands out zeros.
        if grad_head_VD is not None:
            grad_head_VD.zero_()
        return
    if hidden_ND.device.type == "cpu":  # slow there in bf16, and fp32 logits are the better ones
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        hidden_ND, head_VD = hidden_ND.to(dtype), head_VD.to(dtype)
    limit = chunk_rows or _default_chunk_rows(hidden_ND, vocab_size)
    num_chunks = -(-num_rows // limit)
    chunk = -(-num_rows // num_chunks)  # equal chunks: a short last one wastes its matrix products
    buffer_CV = hidden_ND.new_empty(chunk, vocab_size)
    wants_grad = grad_hidden_ND is not None or grad_head_VD is not None
    for start in range(0, num_rows, chunk):
        span = slice(start, min(start + chunk, num_rows))
        hidden_CD, logits_CV = hidden_ND[span], buffer_CV[: span.stop - start]
        # Logits into the one buffer; run_rows writes their gradient over them; two products more
        # take that to the hidden states and to the head. Nothing of size N x V outlives its chunk.
        torch.mm(hidden_CD, head_VD.t(), out=logits_CV)
        grad_CV = logits_CV if wants_grad else None
        run_rows(logits_CV, rows.take(span), objective, stats.take(span), grad_CV, status)
        if grad_hidden_ND is not None:
            _mm_into(grad_hidden_ND[span], logits_CV, head_VD)
        if grad_head_VD is not None:
            _add_head_grad(grad_head_VD, logits_CV, hidden_CD, is_first=start == 0)


def _default_chunk_rows(hidden_ND: Tensor, vocab_size: int) -> int:
    if hidden_ND.device.type == "cpu":
        return max(CPU_CHUNK_MIN_ROWS, CPU_CHUNK_ELEMENTS // vocab_size)
    # A quarter of what is free, in whole tiles of 256 rows: the more rows, the fewer times the head
    # and its gradient are read.
    device = hidden_ND.device
    free_bytes, _ = torch.cuda.mem_get_info(device)  # does not count what torch holds unused
    free_bytes += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    affordable = free_bytes // 4 // (vocab_size * hidden_ND.element_size())
    return max(256, min(GPU_CHUNK_ROWS, affordable // 256 * 256))


def _new_head_grad(head_VD: Tensor) -> Tensor:
    # Sums over many chunks in bf16 would lose what is small beside the sum so far.
    dtype = torch.promote_types(head_VD.dtype, torch.float32)
    return torch.empty(head_VD.shape, dtype=dtype, device=head_VD.device)


def _mm_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    # Into its place at once: a product of its own would be one more [chunk, D] in memory.
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:  # bf16 on a CPU, where the products are fp32
        out.copy_(left @ right)


def _add_head_grad(
    grad_head_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor, *, is_first: bool
) -> None:
    """grad_head += grad_logits^T @ hidden; the first chunk stores, which saves the zero fill."""
    # bf16 goes in and the sum stays fp32: the tensor cores add in fp32 anyway; memory is the cost.
    options = {} if grad_CV.dtype == grad_head_VD.dtype else {"out_dtype": grad_head_VD.dtype}
    if is_first:
        torch.mm(grad_CV.t(), hidden_CD, out=grad_head_VD, **options)
    else:
        torch.addmm(grad_head_VD, grad_CV.t(), hidden_CD, out=grad_head_VD, **options)
