"""The definitions: each kernel as plain torch, one function per equation, any dtype, autograd.

Slow and readable on purpose; the kernels are tested against these functions in float64. The
functions named like the kernels take the same arguments. Nothing here checks its input.
Next: nanomath/advantages.py.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3")  # of KL(pi || pi_ref); k3 is Eq. 4


@dataclass(frozen=True)
class Objective:
    """The constants of Eq. 3, as they go from the command line to the kernel."""

    clip_eps_low: float  # the ratio is clipped to [1 - clip_eps_low, 1 + clip_eps_high]
    clip_eps_high: float
    kl_coef: float  # beta
    temperature: float = 1.0  # the sampling temperature
    kl_estimator: str = "k3"  # the only one for which a GPU kernel is compiled anew

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be finite and above 0, got {self.temperature}")
        for name in ("clip_eps_low", "clip_eps_high", "kl_coef"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"kl_estimator must be of {KL_ESTIMATORS}, got {self.kl_estimator}")


class PolicyLossOutput(NamedTuple):
    """The loss and, detached, what each row had: fp32, or fp64 where the logits are fp64.

    logp_N is fp64 always: against log-probabilities of the same weights, kept so, each ratio is
    exactly 1 and each KL exactly 0. Rows of weight 0 hold 0 everywhere: they are never computed,
    their targets never read.
    """

    loss: Tensor  # scalar, differentiable: sum_n weights_N * loss_N
    loss_N: Tensor  # -[min(rho A, clip(rho) A) - kl_coef * kl], or -logp for cross entropy
    logp_N: Tensor  # log-probability of the target at the temperature
    entropy_N: Tensor  # nats
    kl_N: Tensor  # the estimator's value, k3 in Eq. 4; 0 without reference log-probabilities
    ratio_N: Tensor  # rho; 1 without old log-probabilities
    clipped_N: Tensor  # int8: -1 held back by the low side of the clip, +1 by the high one, else 0
    status: Tensor | None = None  # GPU only: the device word that check_status reads


def log_softmax(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities over the vocabulary at the sampling temperature."""
    return torch.log_softmax(logits_NV / temperature, dim=-1)


def entropy(logp_NV: Tensor) -> Tensor:
    """Entropy in nats of each row of log-probabilities; an entry of -inf adds nothing."""
    return -(logp_NV.exp() * logp_NV.masked_fill(logp_NV == -torch.inf, 0.0)).sum(-1)


def ratio(logp_N: Tensor, old_logp_N: Tensor | None) -> Tensor:
    """rho = pi / pi_old (Eq. 3). Without old log-probabilities the policy is its own old policy:
    the value is 1, the derivative by logp is 1 as well."""
    old_logp_N = logp_N.detach() if old_logp_N is None else old_logp_N
    return (logp_N - old_logp_N).exp()


def clipped_surrogate(ratio_N: Tensor, advantages_N: Tensor, objective: Objective) -> Tensor:
    """min(rho A, clip(rho, 1 - eps, 1 + eps) A)."""  # Eq. 3
    clipped_N = ratio_N.clamp(1.0 - objective.clip_eps_low, 1.0 + objective.clip_eps_high)
    return torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)


def clip_side(ratio_N: Tensor, advantages_N: Tensor, objective: Objective) -> Tensor:
    """Which side of the clip holds the gradient back: -1 low, +1 high, 0 neither (int8)."""
    low_N = (ratio_N < 1.0 - objective.clip_eps_low) & (advantages_N < 0)
    high_N = (ratio_N > 1.0 + objective.clip_eps_high) & (advantages_N > 0)
    return high_N.to(torch.int8) - low_N.to(torch.int8)


def kl_k1(logp_N: Tensor, ref_logp_N: Tensor) -> Tensor:
    """log(pi/pi_ref): unbiased for the KL, of either sign. As a loss it only adds noise: its
    derivative by logp is 1, and E_pi[grad logp] = 0."""
    return logp_N - ref_logp_N


def kl_k2(logp_N: Tensor, ref_logp_N: Tensor) -> Tensor:
    """log(pi/pi_ref)^2 / 2: biased, never negative; its derivative by logp is log(pi/pi_ref), so on
    the policy's own samples its expected gradient is that of the KL."""
    return 0.5 * (logp_N - ref_logp_N).square()


def kl_k3(logp_N: Tensor, ref_logp_N: Tensor) -> Tensor:
    """pi_ref/pi - log(pi_ref/pi) - 1: unbiased for the KL, never negative; its derivative by logp
    is 1 - pi_ref/pi: on the policy's own samples the expected gradient is KL(pi_ref || pi)'s."""
    log_ratio_N = ref_logp_N - logp_N
    return torch.expm1(log_ratio_N) - log_ratio_N  # Eq. 4


def kl(logp_N: Tensor, ref_logp_N: Tensor, estimator: str) -> Tensor:
    """The estimate of KL(pi || pi_ref) that the objective takes."""
    if estimator == "k1":
        return kl_k1(logp_N, ref_logp_N)
    if estimator == "k2":
        return kl_k2(logp_N, ref_logp_N)
    return kl_k3(logp_N, ref_logp_N)  # Eq. 4


def kl_pull(logp_N: Tensor, ref_logp_N: Tensor, estimator: str) -> Tensor:
    """-dKL/dlogp, with which the KL term pulls a token's log-probability to the reference's."""
    log_ref_ratio_N = ref_logp_N - logp_N
    if estimator == "k1":
        return torch.full_like(logp_N, -1.0)
    if estimator == "k2":
        return log_ref_ratio_N
    return torch.expm1(log_ref_ratio_N)  # k3: pi_ref/pi - 1


def gradient_coefficient(
    logp_N: Tensor,
    advantages_N: Tensor,
    old_logp_N: Tensor | None,
    ref_logp_N: Tensor | None,
    objective: Objective,
) -> Tensor:
    """dJ/dlogp of one token in closed form: rho A where the clip lets it through, plus
    beta (pi_ref/pi - 1). At rho = 1 this is GRPO's coefficient of Sec. 5.2. For k2 log(pi_ref/pi)
    stands in place of pi_ref/pi - 1, for k1 the constant -1."""
    ratio_N = ratio(logp_N, old_logp_N)
    passes_N = clip_side(ratio_N, advantages_N, objective) == 0
    coefficient_N = torch.where(passes_N, ratio_N * advantages_N, 0.0)
    if ref_logp_N is not None:
        pull_N = kl_pull(logp_N, ref_logp_N, objective.kl_estimator)
        coefficient_N = coefficient_N + objective.kl_coef * pull_N
    return coefficient_N


def policy_loss(
    logits_NV: Tensor,
    targets_N: Tensor,
    objective: Objective,
    *,
    weights_N: Tensor,
    advantages_N: Tensor,
    old_logp_N: Tensor | None = None,
    ref_logp_N: Tensor | None = None,
) -> PolicyLossOutput:
    """GRPO's loss, sum_n w_n * -(min(rho A, clip(rho) A) - beta kl); rows of weight 0 give 0."""
    kept_N = weights_N != 0
    logp_MV = log_softmax(logits_NV[kept_N], objective.temperature)
    logp_M = logp_MV.gather(1, targets_N[kept_N].long()[:, None])[:, 0]
    advantages_M, weights_M = advantages_N[kept_N], weights_N[kept_N]
    ratio_M = ratio(logp_M, None if old_logp_N is None else old_logp_N[kept_N])
    surrogate_M = clipped_surrogate(ratio_M, advantages_M, objective)
    kl_M = torch.zeros_like(logp_M)
    if ref_logp_N is not None:
        kl_M = kl(logp_M, ref_logp_N[kept_N], objective.kl_estimator)
    loss_M = -(surrogate_M - objective.kl_coef * kl_M)  # Eq. 3
    clipped_M = clip_side(ratio_M, advantages_M, objective)
    rows_M = (loss_M, logp_M, entropy(logp_MV), kl_M, ratio_M, clipped_M)
    return PolicyLossOutput((weights_M * loss_M).sum(), *(_spread(x, kept_N) for x in rows_M))


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, *, weights_N: Tensor) -> PolicyLossOutput:
    """sum_n w_n * -logp_n: the gradient of policy_loss at A = 1, rho = 1 (SFT in Sec. 5.2)."""
    nothing = Objective(clip_eps_low=0.0, clip_eps_high=0.0, kl_coef=0.0)
    advantages_N = torch.ones_like(weights_N)
    output = policy_loss(
        logits_NV, targets_N, nothing, weights_N=weights_N, advantages_N=advantages_N
    )
    # At rho = 1 the surrogate's value is 1 and its gradient that of logp: value and gradient apart.
    value = -(weights_N * output.logp_N).sum()
    return output._replace(loss=output.loss - output.loss.detach() + value, loss_N=-output.logp_N)


def token_logprobs(
    logits_NV: Tensor, targets_N: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row, without gradient."""
    logp_NV = log_softmax(logits_NV.detach(), temperature)
    return logp_NV.gather(1, targets_N.long()[:, None])[:, 0], entropy(logp_NV)


def linear_policy_loss(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, objective: Objective, **rows
) -> PolicyLossOutput:
    """policy_loss of the logits hidden @ head^T."""
    return policy_loss(hidden_ND @ head_VD.T, targets_N, objective, **rows)


def linear_cross_entropy(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, *, weights_N: Tensor
) -> PolicyLossOutput:
    """cross_entropy of the logits hidden @ head^T."""
    return cross_entropy(hidden_ND @ head_VD.T, targets_N, weights_N=weights_N)


def linear_token_logprobs(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """token_logprobs of the logits hidden @ head^T."""
    return token_logprobs(hidden_ND @ head_VD.T, targets_N, temperature=temperature)


def _spread(values_M: Tensor, kept_N: Tensor) -> Tensor:
    spread_N = values_M.new_zeros(kept_N.shape)
    spread_N[kept_N] = values_M.detach()
    return spread_N
