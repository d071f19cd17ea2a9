"""What blocks keep for the backward pass, and their compilation: set on a model from outside.

    none       keep every intermediate result
    selective  keep the outputs of matrix products and attention, recompute what is between them
               (norms, rotary, SiLU, sums): no product is done twice, so it costs memory traffic
               only. Per token of a block with H = K: 6 D + 2 F numbers and the block's input
    full       keep only each block's input, D numbers per token, and recompute the rest: one more
               forward pass, a third more FLOPs

Recomputed numbers are the same to the last bit on a CPU, so a run may change the policy at any
step. Neither names of parameters nor modules change: only the blocks' `forward` is replaced.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
KEPT_OPS = [
    aten.mm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]


def wrap_blocks(model: nn.Module, activation_checkpointing: str, compiled: bool) -> None:
    """Make each of `model.blocks` recompute and compile as told, in place.

    Call it before FSDP2 wraps the blocks: gathering stays outside, and is not done again for the
    recomputation. Passes with a key/value cache run as they are.
    """
    if activation_checkpointing == "none" and not compiled:
        return
    for block in model.blocks:
        block.forward = _wrapped(block.forward, activation_checkpointing, compiled)


def _wrapped(plain, activation_checkpointing: str, compiled: bool):
    policy = {}
    if activation_checkpointing == "selective":
        policy["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT_OPS)

    def recomputing(*inputs):  # without the generators' state: nothing in a block is random
        return checkpoint(plain, *inputs, use_reentrant=False, preserve_rng_state=False, **policy)

    trained = plain if activation_checkpointing == "none" else recomputing
    trained = torch.compile(trained) if compiled else trained

    def forward(x_BTD, rope, mask, cache):
        return (plain if cache is not None else trained)(x_BTD, rope, mask, cache)

    return forward
