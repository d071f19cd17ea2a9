"""This file lays weights out once for a CPU's matrix products: a step of few rows then takes half
as long.

The plain form is the model itself, which `packed` returns wherever this would not pay.
"""

import copy

import torch
from torch import Tensor, nn

from nanomath.model import Transformer

SMALL_WEIGHT = 2**17  # numbers; on a CPU a product with a smaller one gains nothing from packing


class PackedLinear(nn.Module):
    """A Linear whose weight oneDNN has laid out for its own products; without gradients."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        self.bias, self.weight = linear.bias, torch.ops.mkldnn._reorder_linear_weight(weight, 128)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def packed(model: Transformer) -> Transformer:
    """Return the model; in fp32 on a CPU a twin that holds the large weights again, repacked."""
    weight = model.embedding.weight
    if weight.is_cuda or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return model
    # oneDNN's layout is for fp32 on a CPU; and it costs a second copy of each weight it is given.
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    large = {name: m for name, m in linears.items() if m.weight.numel() > SMALL_WEIGHT}
    if not large:
        return model
    # deepcopy's memo names the parameters, so that the twin shares them instead of copying them.
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for name, linear in large.items():
        twin.set_submodule(name, PackedLinear(linear))
    return twin
