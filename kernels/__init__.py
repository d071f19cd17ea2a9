"""Fused losses over the vocabulary: the gradient is made in the forward pass.

For token-level GRPO the derivative of the loss by a token's log-probability depends on that row
alone (its log-probability, the old and reference ones, advantage, weight), so the gradient by the
logits is known as soon as the row's log-sum-exp is: no second pass, nothing recomputed.

    reference.py           the definitions, one function per equation; the tests' oracle
    policy_loss.py         from logits [N, V]: policy_loss, cross_entropy, token_logprobs
    linear.py              from hidden states [N, D] and head [V, D]: [N, V] never exists
    rows.py                what goes in with a row and what comes out; checks of the arguments
    policy_loss_torch.py   the row pass on a CPU
    policy_loss_triton.py  the row pass on a GPU: one program per row, two sweeps

N flattened tokens, V vocabulary, D model width. Imports torch; triton only when a kernel runs.
"""

from kernels.linear import linear_cross_entropy, linear_policy_loss, linear_token_logprobs
from kernels.policy_loss import cross_entropy, policy_loss, token_logprobs
from kernels.reference import Objective, PolicyLossOutput
from kernels.rows import NotFinite, check_status

__all__ = [
    "NotFinite",
    "Objective",
    "PolicyLossOutput",
    "check_status",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_policy_loss",
    "linear_token_logprobs",
    "policy_loss",
    "token_logprobs",
]
