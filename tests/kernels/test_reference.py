"""The definitions themselves against the paper's closed forms, in float64."""

import pytest
import torch

from kernels import Objective, reference


@pytest.mark.parametrize("kl_estimator", reference.KL_ESTIMATORS)
def test_gradient_coefficient_is_the_derivative_of_eq_3(kl_estimator):
    """The closed form of dJ/dlogp equals autograd's in each clip case and for both KL signs."""
    torch.manual_seed(0)
    logp_N = -3 * torch.rand(400, dtype=torch.float64)
    logp_N.requires_grad_()
    old_N = logp_N.detach() + 0.5 * torch.randn(400)
    ref_N = logp_N.detach() + torch.randn(400)
    advantages_N = torch.randn(400, dtype=torch.float64)
    objective = Objective(0.2, 0.3, 0.04, kl_estimator=kl_estimator)
    ratio_N = reference.ratio(logp_N, old_N)
    surrogate_N = reference.clipped_surrogate(ratio_N, advantages_N, objective)
    (surrogate_N - 0.04 * reference.kl(logp_N, ref_N, kl_estimator)).sum().backward()
    coefficient_N = reference.gradient_coefficient(
        logp_N.detach(), advantages_N, old_N, ref_N, objective
    )
    torch.testing.assert_close(logp_N.grad, coefficient_N, rtol=1e-12, atol=1e-12)
    sides = reference.clip_side(ratio_N, advantages_N, objective)
    assert set(sides.tolist()) == {-1, 0, 1}
    ignored_N = (ratio_N < 0.8) & (advantages_N > 0) | (ratio_N > 1.3) & (advantages_N < 0)
    assert ignored_N.any() and not sides[ignored_N].any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "side"),
    [
        (0.5, 2.0, 1.0, 0),  # worse than old though good: pulled back up, no clip
        (1.5, 2.0, 2.4, 1),
        (0.5, -2.0, -1.6, -1),
        (1.5, -2.0, -3.0, 0),
        (1.1, 2.0, 2.2, 0),
        (1.1, -2.0, -2.2, 0),
    ],
)
def test_clip_cases_by_hand(ratio, advantage, value, side):
    """min(rho A, clip(rho, 0.8, 1.2) A), worked by hand."""
    ratio, advantage = torch.tensor([ratio]), torch.tensor([advantage])
    objective = Objective(0.2, 0.2, 0.0)
    surrogate = reference.clipped_surrogate(ratio, advantage, objective)
    assert surrogate.item() == pytest.approx(value)
    assert reference.clip_side(ratio, advantage, objective).item() == side


def test_values_and_gradients_of_the_kl_estimators():
    """E_pi of k1 and of k3 is KL(pi || ref), of k2 it is not; k2 and k3 are at least 0 (Eq. 4). As
    a loss on pi's samples k1 has no expected gradient, k2 that of KL(pi || ref), k3 that of
    KL(ref || pi)."""
    torch.manual_seed(1)
    logits_V = torch.randn(50, dtype=torch.float64, requires_grad=True)
    logp_V = logits_V.log_softmax(0)
    ref_V = torch.randn(50, dtype=torch.float64).log_softmax(0)
    kl, reverse = (torch.sum(a.exp() * (a - b)) for a, b in ((logp_V, ref_V), (ref_V, logp_V)))
    gradients = {"k1": torch.zeros(50, dtype=torch.float64)}
    for name, exact in (("k2", kl), ("k3", reverse)):
        (gradients[name],) = torch.autograd.grad(exact, logits_V, retain_graph=True)
    pi_V = logp_V.detach().exp()  # the samples are fixed when the loss is made
    for name in reference.KL_ESTIMATORS:
        values_V = reference.kl(logp_V, ref_V, name)
        mean = (pi_V * values_V).sum()
        assert (mean.item() == pytest.approx(kl.item(), rel=1e-12)) == (name != "k2")
        assert (values_V.min() >= 0) == (name != "k1")
        (gradient_V,) = torch.autograd.grad(mean, logits_V, retain_graph=True)
        torch.testing.assert_close(gradient_V, gradients[name], rtol=1e-10, atol=1e-14)


def test_entropy_by_hand():
    """Uniform over 8 of 10 entries: log 8; one certain entry: 0."""
    logits = torch.zeros(2, 10, dtype=torch.float64)
    logits[0, 8:] = -torch.inf
    logits[1, 1:] = -torch.inf
    entropy = reference.entropy(reference.log_softmax(logits))
    assert entropy.tolist() == pytest.approx([2.0794415416798357, 0.0])
