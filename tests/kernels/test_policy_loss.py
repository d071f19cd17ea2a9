"""The losses from logits against float64 reference math: values, gradients, errors."""

import re
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import Objective, reference
from kernels.policy_loss import NOTHING, run_rows, uses_triton
from kernels.rows import BAD_ROW_REASONS, Rows, RowStats

# Rows with infinities make NaN on purpose, and the interpreter runs on numpy, which warns of them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]
OBJECTIVE = Objective(clip_eps_low=0.2, clip_eps_high=0.28, kl_coef=0.04)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # of the gradient, in its row's scale
VALUES = ("loss_N", "logp_N", "entropy_N", "kl_N", "ratio_N")


def run(module, case, objective=OBJECTIVE):
    """(output, gradient by the logits) of policy_loss in `module`."""
    logits_NV = case.logits_NV.clone().requires_grad_()
    output = module.policy_loss(logits_NV, case.targets_N, objective, **case.rows())
    output.loss.backward()
    return output, logits_NV.grad


def assert_equal_to_reference(case, device, objective=OBJECTIVE):
    grad_tolerance = TOLERANCE[case.logits_NV.dtype]
    if case.logits_NV.dtype == torch.bfloat16 and uses_triton(case.logits_NV):
        # The interpreter cuts off where a GPU rounds (test_compile.py sees cvt.rn): 2^-7, not 2^-8.
        grad_tolerance *= 2
    output, grad_NV = run(kernels, case.to(device), objective)
    exact, exact_grad_NV = run(reference, case.double(), objective)
    for name in VALUES:
        value_N, exact_N = getattr(output, name).cpu().double(), getattr(exact, name)
        error_N = (value_N - exact_N).abs() / exact_N.abs().clamp(min=1.0)
        assert error_N.max() <= 2e-6, (name, error_N.max(), error_N.argmax())
    assert torch.equal(output.clipped_N.cpu(), exact.clipped_N)
    assert abs(output.loss.item() - exact.loss.item()) <= 2e-6 * max(1.0, abs(exact.loss.item()))
    coefficient_N = reference.gradient_coefficient(
        exact.logp_N, *(x.double() for x in list(case.rows().values())[1:]), objective
    )
    scale_N = case.weights_N.double() * coefficient_N[case.weights_N != 0].abs().max()
    scale_N = scale_N / objective.temperature
    error_N = (grad_NV.cpu().double() - exact_grad_NV).abs().amax(1)
    assert bool((error_N <= grad_tolerance * scale_N).all()), ("grad", (error_N / scale_N).max())
    return exact


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("vocab_size", [1, 17, 1000])
@pytest.mark.parametrize("num_rows", [1, 3, 257])
def test_equals_float64_reference(device, make_case, num_rows, vocab_size, dtype):
    """Every output within 2e-6 and the gradient within 2e-6 (bf16: 4e-3) of its row's scale, on all
    kinds of rows; the four clip cases, the inside and both KL signs do occur."""
    case = make_case(num_rows, vocab_size, seed=num_rows + vocab_size, dtype=dtype)
    exact = assert_equal_to_reference(case, device)
    if num_rows < 257:
        return
    kept_NV = case.logits_NV[case.weights_N != 0].float()
    assert kept_NV.abs()[kept_NV.isfinite()].max() > 75
    if vocab_size > 1:
        one_hot_N = ((kept_NV == 80).sum(1) == 1) & ((kept_NV == -80).sum(1) == vocab_size - 1)
        assert int(one_hot_N.sum()) > 9 and int((kept_NV == -torch.inf).any(1).sum()) > 9
    kept_N, up_N = case.weights_N != 0, case.advantages_N > 0
    low_N, high_N = exact.ratio_N < 0.8, exact.ratio_N > 1.28
    inside_N = ~low_N & ~high_N
    cases = (up_N & low_N, up_N & high_N, ~up_N & low_N, ~up_N & high_N, inside_N)
    assert all(int((case_N & kept_N).sum()) > 2 for case_N in cases) and not kept_N.all()
    assert set(exact.clipped_N.tolist()) == {-1, 0, 1}
    log_ref_N = case.ref_logp_N - exact.logp_N
    assert int((log_ref_N[kept_N] > 0.1).sum()) > 9 and int((log_ref_N[kept_N] < -0.1).sum()) > 9


@pytest.mark.parametrize("kl_estimator", ["k1", "k2"])
def test_other_kl_estimators_equal_float64_reference(device, make_case, kl_estimator):
    """Value and gradient with k1 or k2 in place of k3, on all kinds of rows; they differ from k3's
    by far more than the tolerance."""
    case = make_case(60, 100, seed=3)
    k3_objective = replace(OBJECTIVE, kl_coef=0.5)
    objective = replace(k3_objective, kl_estimator=kl_estimator)
    exact = assert_equal_to_reference(case, device, objective)
    k3, k3_grad_NV = run(reference, case.double(), k3_objective)
    _, grad_NV = run(reference, case.double(), objective)
    assert (exact.kl_N - k3.kl_N).abs().max() > 0.1
    assert (grad_NV - k3_grad_NV).abs().max() > 0.1 * k3_grad_NV.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(5, 102_400), (3, 151_936)])
def test_equals_reference_at_full_vocabulary(device, make_case, num_rows, vocab_size, dtype):
    """Rows longer than one block, at the vocabularies of DeepSeek and Qwen."""
    case = make_case(num_rows, vocab_size, seed=5, dtype=dtype)
    assert_equal_to_reference(case, device)


def test_offsets_beyond_32_bits(interpreted):
    """The second row of logits lies 2^31 elements after the first (4 GiB, mostly never touched) and
    is read and overwritten there."""
    pytest.importorskip("triton", reason="triton is not installed")
    stride = 2**31 + 16
    logits_NV = torch.empty(stride + 16, dtype=torch.bfloat16).as_strided((2, 16), (stride, 1))
    values_NV = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits_NV.copy_(values_NV)
    targets_N, weights_N = torch.tensor([3, 5]), torch.ones(2)
    with interpreted():
        stats = RowStats.new(logits_NV, 2, has_loss=True)
        rows = Rows(targets_N, weights_N, ids_N=torch.arange(2))
        run_rows(logits_NV, rows, NOTHING, stats, logits_NV, None)
    exact_NV = values_NV.double().requires_grad_()
    exact = reference.cross_entropy(exact_NV, targets_N, weights_N=weights_N.double())
    exact.loss.backward()
    torch.testing.assert_close(stats.logp_N, exact.logp_N, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(logits_NV.double(), exact_NV.grad, rtol=4e-3, atol=4e-3)


class Waits(TorchDispatchMode):
    """Collects the operators for which a host waits on a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(monkeypatch, make_case):
    """Between the launches one operator reads a value back, in forward: how many rows are kept;
    scoring reads none."""
    case = make_case(23, 100, seed=6)
    launched = []
    launches = types.SimpleNamespace(
        launch_rows=lambda *_: launched.append("rows"),
        launch_scale=lambda *_: launched.append("scale"),
    )
    monkeypatch.setitem(sys.modules, "kernels.policy_loss_triton", launches)
    # The package's attribute of this name is the function, not its module.
    monkeypatch.setattr(sys.modules["kernels.policy_loss"], "uses_triton", lambda _: True)
    logits_NV = case.logits_NV.clone().requires_grad_()
    with Waits() as waits:
        output = kernels.policy_loss(logits_NV, case.targets_N, **case.rows(), objective=OBJECTIVE)
        output.loss.backward()
        kernels.token_logprobs(logits_NV, case.targets_N)
    assert waits.seen == ["nonzero"] and launched == ["rows", "scale", "rows"]
    hidden_ND = torch.randn(23, 8, requires_grad=True)
    head_VD = torch.randn(100, 8, requires_grad=True)
    with Waits() as waits:
        kernels.linear_policy_loss(
            hidden_ND, head_VD, case.targets_N, **case.rows(), objective=OBJECTIVE
        ).loss.backward()
        kernels.linear_token_logprobs(hidden_ND, head_VD, case.targets_N)
    assert waits.seen == ["nonzero"]
    assert launched[3:] == ["rows", "scale", "scale", "rows"]


@pytest.mark.gpu
def test_cuda_finds_no_synchronisation(make_case):
    """CUDA's own check is silent during forward and backward from logits."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    case = make_case(23, 100, seed=6).to("cuda")
    run(kernels, case)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, _ = run(kernels, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kernels.check_status(output.status)


def test_interpreter_and_compiler_in_one_process(interpreted, make_case):
    """The Triton source is interpreted also after Triton was imported to compile, and twice; what
    was imported before is there again afterwards."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from kernels import policy_loss_triton

    case = make_case(3, 20, seed=1)
    for _ in range(2):
        with interpreted():
            assert_equal_to_reference(case, "cpu")
            assert sys.modules["triton"] is not triton
        assert sys.modules["triton"] is triton
        assert sys.modules["kernels.policy_loss_triton"] is policy_loss_triton
    assert isinstance(policy_loss_triton.policy_loss_kernel, triton.JITFunction)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_temperature_divides_the_logits(device, make_case, temperature):
    """Values and gradient at another sampling temperature, rows longer than a thread's share."""
    case = make_case(33, 700, seed=3, temperature=temperature)
    assert_equal_to_reference(case, device, replace(OBJECTIVE, temperature=temperature))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_keep_fp32_values(device, make_case, dtype):
    """bf16 and fp16 logits give values as exact as fp32 ones, and a gradient of their own dtype."""
    case = make_case(33, 700, seed=4, dtype=dtype)
    output, grad_NV = run(kernels, case.to(device))
    exact, _ = run(reference, case.double())
    torch.testing.assert_close(output.logp_N.cpu().double(), exact.logp_N, rtol=2e-6, atol=2e-6)
    assert output.loss_N.dtype == torch.float32 and grad_NV.dtype == dtype


def test_float64_is_exact(make_case):
    """float64 logits run in float64: everything within 1e-12."""
    case = make_case(33, 700, seed=4).double()
    output, grad_NV = run(kernels, case)
    exact, exact_grad_NV = run(reference, case)
    for name in VALUES:
        torch.testing.assert_close(
            getattr(output, name), getattr(exact, name), rtol=1e-12, atol=1e-12
        )
    torch.testing.assert_close(grad_NV, exact_grad_NV, rtol=0, atol=1e-13)
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=1e-12)


def test_terms_switch_off(device, make_case):
    """Without old and reference log-probabilities: ratio 1 with its gradient, KL 0."""
    case = make_case(23, 100, seed=6)
    case = case._replace(advantages_N=case.advantages_N + 0.3)
    rows = {"weights_N": case.weights_N, "advantages_N": case.advantages_N}
    logits_NV = case.logits_NV.to(device).detach().requires_grad_()
    exact_NV = case.logits_NV.double().detach().requires_grad_()
    output = kernels.policy_loss(
        logits_NV,
        case.targets_N.to(device),
        Objective(0.2, 0.2, 0.0),
        **{k: v.to(device) for k, v in rows.items()},
    )
    exact = reference.policy_loss(
        exact_NV,
        case.targets_N,
        Objective(0.2, 0.2, 0.0),
        **{k: v.double() for k, v in rows.items()},
    )
    output.loss.backward()
    exact.loss.backward()
    kept_N = case.weights_N != 0
    assert torch.equal(output.ratio_N.cpu(), kept_N.float()) and not output.kl_N.any()
    assert float(exact_NV.grad.abs().max()) > 1e-3
    torch.testing.assert_close(logits_NV.grad.cpu().double(), exact_NV.grad, rtol=0, atol=1e-7)
    assert output.loss.item() == pytest.approx(exact.loss.item(), abs=1e-6)


def test_cross_entropy_is_the_special_case(device, make_case):
    """loss_N is -logp and the gradient that of torch's cross entropy; weight-0 rows never read
    their target (it may be -100)."""
    case = make_case(23, 100, seed=7)
    dropped_N = case.weights_N == 0
    targets_N = case.targets_N.masked_fill(dropped_N, -100)
    logits_NV = case.logits_NV.to(device).detach().requires_grad_()
    output = kernels.cross_entropy(
        logits_NV, targets_N.to(device), weights_N=case.weights_N.to(device)
    )
    output.loss.backward()
    exact_NV = case.logits_NV.double().detach().requires_grad_()
    per_row_N = torch.nn.functional.cross_entropy(exact_NV, targets_N, reduction="none")
    exact = (per_row_N * case.weights_N.double()).sum()
    exact.backward()
    assert dropped_N.any() and not logits_NV.grad[dropped_N.to(device)].any()
    torch.testing.assert_close(output.loss_N.cpu(), per_row_N.float(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(logits_NV.grad.cpu().double(), exact_NV.grad, rtol=0, atol=3e-8)
    assert output.loss.item() == pytest.approx(exact.item(), rel=2e-6)
    again = reference.cross_entropy(
        case.logits_NV.double(), case.targets_N, weights_N=case.weights_N.double()
    )
    assert again.loss.item() == pytest.approx(exact.item(), rel=1e-9)


def test_token_logprobs_equal_the_loss(device, make_case):
    """Log-probabilities and entropies without gradient equal the reference's in float64."""
    case = make_case(33, 700, seed=8, temperature=0.8)
    logp_N, entropy_N = kernels.token_logprobs(
        case.logits_NV.to(device).requires_grad_(), case.targets_N.to(device), temperature=0.8
    )
    exact = reference.token_logprobs(case.logits_NV.double(), case.targets_N, temperature=0.8)
    assert not logp_N.requires_grad
    for value_N, exact_N in zip((logp_N, entropy_N), exact, strict=True):
        torch.testing.assert_close(value_N.cpu().double(), exact_N, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("vocab_size", [700, 20_000])
def test_own_log_probabilities_give_ratio_1_and_kl_0(device, make_case, vocab_size, dtype):
    """Against log-probabilities of the same logits each ratio is exactly 1 and each KL exactly 0,
    with and without a gradient; where A is 0 so is the gradient."""
    case = make_case(33, vocab_size, seed=8, temperature=0.8, dtype=dtype).to(device)
    logits_NV = case.logits_NV.clone().requires_grad_()
    logp_N, _ = kernels.token_logprobs(logits_NV, case.targets_N.clamp(min=0), temperature=0.8)
    kept_N = case.weights_N != 0
    for estimator in ("k1", "k2", "k3"):
        output = kernels.policy_loss(
            logits_NV, case.targets_N, weights_N=case.weights_N,
            advantages_N=torch.zeros_like(case.advantages_N), old_logp_N=logp_N, ref_logp_N=logp_N,
            objective=replace(OBJECTIVE, temperature=0.8, kl_estimator=estimator),
        )  # fmt: skip
        assert torch.equal(output.ratio_N, kept_N.to(output.ratio_N.dtype))
        assert not output.kl_N.any() and output.loss == 0.0
    output.loss.backward()
    assert not logits_NV.grad.any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("vocab_size", [1, 17, 1000, 102_400, 151_936])
def test_no_rows(make_case, vocab_size, dtype):
    """N = 0 gives loss 0 and an empty gradient."""
    output, grad_NV = run(kernels, make_case(0, vocab_size, dtype=dtype))
    assert output.loss.item() == 0.0 and all(len(getattr(output, name)) == 0 for name in VALUES)
    assert grad_NV.shape == (0, vocab_size)


def test_all_rows_dropped(device, make_case):
    """Only weights of 0 give loss 0 and a gradient of zeros, also over memory that held others."""
    case = make_case(5, 1000).to(device)
    case.weights_N.zero_()
    output, grad_NV = run(kernels, case)
    assert output.loss.item() == 0.0
    assert all(getattr(output, name).tolist() == [0.0] * 5 for name in VALUES)
    assert grad_NV.shape == (5, 1000) and not grad_NV.any()


def test_gradient_at_ratio_one(device):
    """At rho = 1, dJ/dlogp = (A + beta (pi_ref/pi - 1)) / (P G |o|) (Sec. 4), to 1e-6."""
    torch.manual_seed(0)
    logits_NV = torch.randn(12, 50, device=device, requires_grad=True)
    targets_N = torch.randint(50, (12,)).to(device)
    logp_N, _ = reference.token_logprobs(logits_NV.double(), targets_N)
    ref_N = logp_N + torch.linspace(-1, 1, 12, device=device)
    advantages_N, beta, weight = torch.randn(12).to(device), 0.04, 1 / (2 * 3 * 2)
    for old_N in (None, logp_N):
        output = kernels.policy_loss(
            logits_NV, targets_N, weights_N=torch.full_like(advantages_N, weight),
            advantages_N=advantages_N, old_logp_N=old_N, ref_logp_N=ref_N,
            objective=Objective(0.2, 0.2, beta),
        )  # fmt: skip
        (grad_NV,) = torch.autograd.grad(output.loss, logits_NV)
        dlogp_N = (advantages_N + beta * (torch.exp(ref_N - logp_N) - 1)) * weight
        onehot_NV = torch.nn.functional.one_hot(targets_N, 50)
        expected_NV = -dlogp_N[:, None] * (onehot_NV - logits_NV.detach().double().softmax(1))
        torch.testing.assert_close(grad_NV.double(), expected_NV, rtol=0, atol=1e-6 * weight)


def test_loss_is_beta_times_kl_though_the_gradient_is_not_zero(device):
    """One step per batch, outcome advantages: loss = beta * mean over outputs of their mean token
    KL (Sec. 4), to 1e-6, while the gradient is not 0."""
    torch.manual_seed(1)
    lengths = [3, 5, 2, 6]
    weights_N = torch.cat([torch.full((n,), 1 / (len(lengths) * n)) for n in lengths])
    rewards_G = torch.tensor([1.0, 0.0, 0.0, 0.0])
    advantages_G = (rewards_G - rewards_G.mean()) / rewards_G.std(correction=0)
    assert advantages_G[0].item() == pytest.approx(3**0.5)  # sqrt(G - 1)
    logits_NV = torch.randn(sum(lengths), 40).to(device).requires_grad_()
    targets_N = torch.randint(40, (sum(lengths),)).to(device)
    ref_N, _ = kernels.token_logprobs(logits_NV + 0.3 * torch.randn(40).to(device), targets_N)
    output = kernels.policy_loss(
        logits_NV, targets_N, weights_N=weights_N.to(device), ref_logp_N=ref_N,
        objective=Objective(0.2, 0.2, 0.04),
        advantages_N=advantages_G.repeat_interleave(torch.tensor(lengths)).to(device),
    )  # fmt: skip
    output.loss.backward()
    mean_kl = torch.stack([kl.mean() for kl in output.kl_N.cpu().split(lengths)]).mean().item()
    assert mean_kl > 1e-3
    assert output.loss.item() == pytest.approx(0.04 * mean_kl, abs=1e-6)
    assert logits_NV.grad.abs().max() > 1e-2


def test_upstream_gradient_is_applied(device, make_case):
    """Another upstream gradient (loss * 0.5, two losses added) scales the gradient exactly."""
    case = make_case(7, 100, seed=9).to(device)
    _, once_NV = run(kernels, case)
    logits_NV = case.logits_NV.clone().requires_grad_()
    losses = [
        kernels.policy_loss(logits_NV, case.targets_N, **case.rows(), objective=OBJECTIVE).loss
        for _ in range(2)
    ]
    (0.5 * losses[0] + 2.0 * losses[1]).backward()
    torch.testing.assert_close(logits_NV.grad, 2.5 * once_NV, rtol=1e-6, atol=0)


def test_logits_may_lie_in_memory_in_any_way(device, make_case):
    """Transposed, sliced and repeated logits give the loss and the scaled gradient of the same
    numbers row by row."""
    case = make_case(24, 100, seed=10).to(device)
    wide_NV, plain = torch.cat([case.logits_NV, case.logits_NV], 1), torch.contiguous_format
    for logits_NV in (
        case.logits_NV.t().contiguous().t(),
        wide_NV[:, 3:103],
        wide_NV[::2, :100].repeat_interleave(2, 0),
        case.logits_NV[:1].expand(24, -1),
    ):
        targets_N = logits_NV.argmax(1)
        grads, losses = [], []
        for x_NV in (logits_NV.detach(), logits_NV.detach().clone(memory_format=plain)):
            loss = kernels.cross_entropy(
                x_NV.requires_grad_(), targets_N, weights_N=case.weights_N
            ).loss
            grads += torch.autograd.grad(0.5 * loss, x_NV)
            losses.append(loss.item())
        assert losses[0] == losses[1] and torch.equal(*grads) and grads[0].any()


def test_gradient_is_handed_out_once(device, make_case):
    """A second backward and a double backward raise instead of giving a wrong number."""
    case = make_case(7, 100, seed=9).to(device)
    logits_NV = case.logits_NV.clone().requires_grad_()
    loss = kernels.policy_loss(logits_NV, case.targets_N, **case.rows(), objective=OBJECTIVE).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits_NV, create_graph=True)
    torch.autograd.grad(loss, logits_NV, retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        loss.backward()


BAD_ROWS = {  # field, value, reason
    "outside": ("targets_N", 100, 1),
    "negative": ("targets_N", -1, 1),
    "weight": ("weights_N", float("nan"), 2),
    "infinite weight": ("weights_N", float("inf"), 2),
    "advantage": ("advantages_N", float("inf"), 2),
    "old": ("old_logp_N", float("-inf"), 2),
    "ref": ("ref_logp_N", float("nan"), 2),
    "nan logit": ("logits_NV", float("nan"), 3),
    "inf logit": ("logits_NV", float("inf"), 3),
    "all -inf": ("logits_NV", float("-inf"), 3),
    "target -inf": ("logits_NV", float("-inf"), 4),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_row_is_never_a_number(device, make_case, kind, request):
    """A bad value names its row: at once on a CPU; by NaN in that row alone and the status word
    where nothing may wait."""
    field, value, code = BAD_ROWS[kind]
    message = re.escape(f"row 5 has no loss: {BAD_ROW_REASONS[code]}")
    case = make_case(9, 100, seed=11)
    bad = case._replace(**{field: getattr(case, field).clone()})
    column = {"nan logit": 17, "inf logit": 17, "target -inf": int(case.targets_N[5])}
    index = (5, column.get(kind, slice(None))) if field == "logits_NV" else 5
    getattr(bad, field)[index] = value
    if "torch" in request.node.callspec.id:
        with pytest.raises(ValueError, match=message):
            run(kernels, bad)
        return
    good, good_NV = run(kernels, case.to(device))
    kernels.check_status(good.status)
    output, grad_NV = run(kernels, bad.to(device))
    others_N = torch.arange(9, device=device) != 5
    assert output.loss.isnan() and grad_NV[5].isnan().all()
    for name in VALUES:
        assert getattr(output, name)[5].isnan(), name
        assert torch.equal(getattr(output, name)[others_N], getattr(good, name)[others_N])
    assert torch.equal(grad_NV[others_N], good_NV[others_N])
    with pytest.raises(ValueError, match=message):
        kernels.check_status(output.status)


def test_bad_row_in_token_logprobs(make_case):
    """The log-probabilities alone refuse a bad row as well."""
    case = make_case(9, 100, seed=11)
    case.logits_NV[3, 0] = float("nan")
    with pytest.raises(ValueError, match="row 3 has no loss: its logits hold a NaN"):
        kernels.token_logprobs(case.logits_NV, case.targets_N)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_NV": torch.zeros(3)}, "logits_NV must be"),
        ({"logits_NV": torch.zeros(9, 100).long()}, "logits_NV must be floating"),
        ({"targets_N": torch.zeros(8).long()}, r"targets_N must be \[9\], got \[8\]"),
        ({"targets_N": torch.zeros(9)}, "targets_N must be torch.int64"),
        ({"weights_N": torch.zeros(9, 1)}, r"weights_N must be \[9\]"),
        ({"weights_N": torch.zeros(9, device="meta")}, "weights_N is on meta"),
        ({"advantages_N": torch.zeros(9).bfloat16()}, "advantages_N must be torch.float32"),
        ({"old_logp_N": torch.zeros(9, requires_grad=True)}, "old_logp_N is a constant"),
        ({"ref_logp_N": None}, "kl_coef > 0 needs ref_logp_N"),
    ],
)
def test_misfit_names_the_argument(make_case, change, message):
    """A wrong shape, dtype or setting raises ValueError with the argument's name."""
    arguments = make_case(9, 100)._asdict() | {"objective": OBJECTIVE} | change
    with pytest.raises(ValueError, match=message):
        kernels.policy_loss(arguments.pop("logits_NV"), arguments.pop("targets_N"), **arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (0.0, -1.0, float("nan"), float("inf"))],
        *[("clip_eps_low", value) for value in (-0.1, float("nan"), float("inf"))],
        *[("clip_eps_high", value) for value in (-0.1, float("nan"), float("inf"))],
        *[("kl_coef", value) for value in (-0.1, float("nan"), float("inf"))],
        ("kl_estimator", "k4"),
    ],
)
def test_an_objective_that_cannot_be_is_refused_by_name(name, value):
    """Each constant of Eq. 3 has its range; one outside is named."""
    with pytest.raises(ValueError, match=f"{name} must be"):
        replace(OBJECTIVE, **{name: value})


@pytest.mark.parametrize(
    "status", [torch.zeros(1, dtype=torch.int32), torch.zeros(0).long(), torch.zeros(()).long()]
)
def test_a_status_word_that_does_not_fit(interpreted, make_case, status):
    """The kernel writes 8 bytes there: anything but one int64 is refused before the launch."""
    pytest.importorskip("triton", reason="triton is not installed")
    case = make_case(3, 20)
    with interpreted():
        kernels.token_logprobs(case.logits_NV, case.targets_N)
        with pytest.raises(ValueError, match=r"status must be int64 \[1\] on cpu"):
            kernels.token_logprobs(case.logits_NV, case.targets_N, status=status)


def test_runs_without_triton():
    """`import kernels` and the CPU path need no triton."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kernels\n"
        "x = torch.zeros(2, 4, requires_grad=True)\n"
        "kernels.cross_entropy(x, torch.tensor([0, 1]), weights_N=torch.ones(2)).loss.backward()\n"
        "assert x.grad[0].tolist() == [-0.75, 0.25, 0.25, 0.25], x.grad"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
