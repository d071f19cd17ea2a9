"""What goes into the loss of a row, what comes out of it, and the checks of both.

A row is one token: its logits over the vocabulary (or its hidden state) and a few numbers. The
checks here read shapes, dtypes and host numbers only, so that a GPU is never waited for; bad
values are found by the row pass itself (see check_status).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference import Objective


class Rows(NamedTuple):
    """The inputs of the row pass beside the logits; None where a term is switched off."""

    targets_N: Tensor  # int64 or int32
    weights_N: Tensor | None = None  # None: log-probabilities only
    advantages_N: Tensor | None = None  # None with weights: cross entropy
    old_logp_N: Tensor | None = None
    ref_logp_N: Tensor | None = None
    # int64, each row's number in the caller's tensors: rows are dropped and cut into chunks, and an
    # error must still name the row that its reader can look up.
    ids_N: Tensor | None = None

    def take(self, index: slice | Tensor) -> "Rows":
        return Rows(*(None if field is None else field[index] for field in self))


class RowStats(NamedTuple):
    """The outputs of the row pass, written in place; fields as in PolicyLossOutput."""

    logp_N: Tensor
    entropy_N: Tensor
    loss_N: Tensor | None = None
    kl_N: Tensor | None = None
    ratio_N: Tensor | None = None
    clipped_N: Tensor | None = None

    @classmethod
    def new(cls, like: Tensor, num_rows: int, has_loss: bool) -> "RowStats":
        # Log-probabilities in float64 whatever the logits: two of them are subtracted in a ratio.
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        dtypes = [torch.float64, dtype, *([dtype] * 3 + [torch.int8] if has_loss else [])]
        return cls(*(torch.zeros(num_rows, dtype=d, device=like.device) for d in dtypes))

    def take(self, index: slice) -> "RowStats":
        return RowStats(*(None if field is None else field[index] for field in self))


def spread(values_M: Tensor, index_M: Tensor, num_rows: int) -> Tensor:
    """Put row m at index_M[m] of num_rows rows; the others hold 0."""
    if len(index_M) == num_rows:  # all rows were kept: nothing is copied
        return values_M
    return values_M.new_zeros(num_rows, *values_M.shape[1:]).index_copy_(0, index_M, values_M)


# What the low byte of the status word and the CPU's errors mean; the row number is above it.
BAD_ROW_REASONS = {
    1: "its target is outside [0, V)",
    2: "its weight, advantage, old or reference log-probability is not finite",
    3: "its logits hold a NaN or +inf, or are all -inf",
    4: "the logit of its target is -inf",
}


class NotFinite(ValueError):
    """The model's weights or what they compute are no longer finite: training has diverged."""


def bad_row_error(row: int, code: int) -> ValueError:
    # Codes 1 and 2 are faults of the caller's data; 3 and 4 come out of the model.
    kind = NotFinite if code > 2 else ValueError
    return kind(f"row {row} has no loss: {BAD_ROW_REASONS[code]}")


def check_status(status: Tensor | None) -> None:
    """Raise ValueError naming a bad row if the kernels met one since `status` was made.

    status: the int64 word, shape [1], of PolicyLossOutput.status or the one passed as `status=`
    to several calls; None (a CPU has raised at once) passes. Waits for the device: read it once
    a step. Where several rows are bad one of them is named; each of them is NaN in the outputs
    and in the gradient.
    """
    # One word holds row and reason, so that the device can report both in one store.
    word = 0 if status is None else int(status)
    if word:
        raise bad_row_error(word >> 8, word & 255)


def check_logits(logits_NV: Tensor) -> None:
    if logits_NV.dim() != 2 or logits_NV.shape[1] == 0:
        raise ValueError(f"logits_NV must be [N, V] with V > 0, got {list(logits_NV.shape)}")
    if not logits_NV.is_floating_point():
        raise ValueError(f"logits_NV must be floating point, got {logits_NV.dtype}")


def check_head(hidden_ND: Tensor, head_VD: Tensor) -> None:
    for name, tensor in (("hidden_ND", hidden_ND), ("head_VD", head_VD)):
        if tensor.dim() != 2 or not tensor.is_floating_point():
            shape = list(tensor.shape)
            raise ValueError(f"{name} must be a floating matrix, got {tensor.dtype} {shape}")
    if head_VD.shape[0] == 0 or head_VD.shape[1] != hidden_ND.shape[1]:
        raise ValueError(
            f"head_VD {list(head_VD.shape)} does not fit hidden_ND {list(hidden_ND.shape)}"
        )
    if head_VD.dtype != hidden_ND.dtype or head_VD.device != hidden_ND.device:
        raise ValueError(
            f"head_VD ({head_VD.dtype}, {head_VD.device}) and hidden_ND ({hidden_ND.dtype}, "
            f"{hidden_ND.device}) must have one dtype and device"
        )


def check_rows(rows: Rows, like_N: Tensor, objective: Objective) -> Rows:
    """Return rows, numbered and contiguous; raise ValueError naming the argument that does not fit
    like_N, the tensor whose first dimension is N."""
    # beta > 0 without a reference would train on the surrogate alone, without a word (Eq. 3).
    if objective.kl_coef > 0 and rows.ref_logp_N is None:
        raise ValueError("kl_coef > 0 needs ref_logp_N: the KL is against the reference")
    # A field of the wrong length would be read past its end by the kernel, without any error.
    checked = {}
    for name, field in rows._asdict().items():
        if field is None:
            continue
        if field.shape != like_N.shape[:1]:
            raise ValueError(f"{name} must be [{like_N.shape[0]}], got {list(field.shape)}")
        if field.device != like_N.device:
            raise ValueError(f"{name} is on {field.device}, the logits or hidden states are not")
        integer, floating = (torch.int64, torch.int32), (torch.float32, torch.float64)
        allowed = integer if name == "targets_N" else floating
        if field.dtype not in allowed:
            raise ValueError(f"{name} must be {allowed[0]} or {allowed[1]}, got {field.dtype}")
        # The fused loss gives none of these a gradient: one that is asked for would be missing.
        if field.requires_grad:
            raise ValueError(f"{name} is a constant of the loss: detach it")
        checked[name] = field.contiguous()
    return Rows(**checked, ids_N=torch.arange(like_N.shape[0], device=like_N.device))
