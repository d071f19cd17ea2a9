"""The definitions: each kernel as plain torch, one function per equation, any dtype, autograd.

Slow and readable on purpose; the kernels are tested against these functions in float64. The
functions named like the kernels take the same arguments. Nothing here checks its input.
"""

import torch
from torch import Tensor

from kernels.rows import PolicyLossOutput


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


def clipped_surrogate(
    ratio_N: Tensor, advantages_N: Tensor, clip_eps_low: float, clip_eps_high: float
) -> Tensor:
    """min(rho A, clip(rho, 1 - eps, 1 + eps) A)."""  # Eq. 3
    clipped_N = ratio_N.clamp(1.0 - clip_eps_low, 1.0 + clip_eps_high)
    return torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)


def clip_side(
    ratio_N: Tensor, advantages_N: Tensor, clip_eps_low: float, clip_eps_high: float
) -> Tensor:
    """Which side of the clip holds the gradient back: -1 low, +1 high, 0 neither (int8)."""
    low_N = (ratio_N < 1.0 - clip_eps_low) & (advantages_N < 0)
    high_N = (ratio_N > 1.0 + clip_eps_high) & (advantages_N > 0)
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


KL = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def gradient_coefficient(
    logp_N: Tensor,
    advantages_N: Tensor,
    old_logp_N: Tensor | None,
    ref_logp_N: Tensor | None,
    clip_eps_low: float,
    clip_eps_high: float,
    kl_coef: float,
    kl_estimator: str = "k3",
) -> Tensor:
    """dJ/dlogp of one token in closed form: rho A where the clip lets it through, plus
    beta (pi_ref/pi - 1). At rho = 1 this is GRPO's coefficient of Sec. 5.2. For k2 log(pi_ref/pi)
    stands in place of pi_ref/pi - 1, for k1 the constant -1."""
    ratio_N = ratio(logp_N, old_logp_N)
    passes_N = clip_side(ratio_N, advantages_N, clip_eps_low, clip_eps_high) == 0
    coefficient_N = torch.where(passes_N, ratio_N * advantages_N, 0.0)
    if ref_logp_N is not None:
        log_ref_ratio_N = ref_logp_N - logp_N
        pull_N = {
            "k1": -torch.ones_like(logp_N),
            "k2": log_ref_ratio_N,
            "k3": torch.expm1(log_ref_ratio_N),
        }[kl_estimator]
        coefficient_N = coefficient_N + kl_coef * pull_N
    return coefficient_N


def policy_loss(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    weights_N: Tensor,
    advantages_N: Tensor,
    old_logp_N: Tensor | None = None,
    ref_logp_N: Tensor | None = None,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    kl_coef: float = 0.0,
    temperature: float = 1.0,
    kl_estimator: str = "k3",
) -> PolicyLossOutput:
    """GRPO's loss, sum_n w_n * -(min(rho A, clip(rho) A) - beta kl); rows of weight 0 give 0."""
    kept_N = weights_N != 0
    logp_MV = log_softmax(logits_NV[kept_N], temperature)
    logp_M = logp_MV.gather(1, targets_N[kept_N].long()[:, None])[:, 0]
    advantages_M, weights_M = advantages_N[kept_N], weights_N[kept_N]
    ratio_M = ratio(logp_M, None if old_logp_N is None else old_logp_N[kept_N])
    surrogate_M = clipped_surrogate(ratio_M, advantages_M, clip_eps_low, clip_eps_high)
    kl_M = torch.zeros_like(logp_M)
    if ref_logp_N is not None:
        kl_M = KL[kl_estimator](logp_M, ref_logp_N[kept_N])
    loss_M = -(surrogate_M - kl_coef * kl_M)  # Eq. 3
    clipped_M = clip_side(ratio_M, advantages_M, clip_eps_low, clip_eps_high)
    rows_M = (loss_M, logp_M, entropy(logp_MV), kl_M, ratio_M, clipped_M)
    return PolicyLossOutput((weights_M * loss_M).sum(), *(_spread(x, kept_N) for x in rows_M))


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, *, weights_N: Tensor) -> PolicyLossOutput:
    """sum_n w_n * -logp_n: the gradient of policy_loss at A = 1, rho = 1 (SFT in Sec. 5.2)."""
    output = policy_loss(
        logits_NV, targets_N, weights_N=weights_N, advantages_N=torch.ones_like(weights_N)
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
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, **kwargs
) -> PolicyLossOutput:
    """policy_loss of the logits hidden @ head^T."""
    return policy_loss(hidden_ND @ head_VD.T, targets_N, **kwargs)


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
