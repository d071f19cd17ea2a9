"""The losses from hidden states and head: gradients, dropped rows, memory, use as a head."""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import reference

SETTINGS = {"clip_eps_low": 0.2, "clip_eps_high": 0.28, "kl_coef": 0.04}
WIDTH = 24


@pytest.fixture
def make_hidden_case(make_case):
    """(hidden, head, case): like make_case, with old and reference values that fit the head."""

    def make(num_rows, vocab_size, seed=0, dtype=torch.float32):
        case = make_case(num_rows, vocab_size, seed)
        generator = torch.Generator().manual_seed(seed)
        hidden_ND = torch.randn(num_rows, WIDTH, generator=generator).to(dtype)
        head_VD = torch.randn(vocab_size, WIDTH, generator=generator).to(dtype)
        logp_N, _ = reference.linear_token_logprobs(
            hidden_ND.double(), head_VD.double(), case.targets_N
        )
        old_N = logp_N - torch.tensor([-0.7, 0.0, 0.7, 0.05]).repeat(num_rows)[:num_rows]
        ref_N = logp_N + torch.tensor([-0.5, 0.8]).repeat(num_rows)[:num_rows]
        case = case._replace(old_logp_N=old_N.float(), ref_logp_N=ref_N.float())
        return hidden_ND, head_VD, case

    return make


def run(loss, hidden_ND, head_VD, *args, **kwargs):
    hidden_ND, head_VD = (x.detach().clone().requires_grad_() for x in (hidden_ND, head_VD))
    output = loss(hidden_ND, head_VD, *args, **kwargs)
    output.loss.backward()
    return output, hidden_ND.grad, head_VD.grad


def assert_near(value, exact, tolerance):
    """Errors at most `tolerance` of the largest value."""
    error = (value.cpu().double() - exact).abs().max()
    assert error <= tolerance * exact.abs().max(), error / exact.abs().max()


@pytest.mark.parametrize("chunk_rows", [7, None])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 17), (3, 1000), (57, 300)])
def test_equals_float64_reference(device, make_hidden_case, num_rows, vocab_size, chunk_rows):
    """Values and both gradients equal autograd through the whole [N, V] in float64, whatever the
    chunks; rows of weight 0 are dropped and hold 0."""
    hidden_ND, head_VD, case = make_hidden_case(num_rows, vocab_size, seed=num_rows)
    on_device = case.to(device)
    output, grad_ND, grad_VD = run(
        kernels.linear_policy_loss, hidden_ND.to(device), head_VD.to(device), on_device.targets_N,
        **on_device.rows(), **SETTINGS, chunk_rows=chunk_rows,
    )  # fmt: skip
    exact, exact_ND, exact_VD = run(
        reference.linear_policy_loss, hidden_ND.double(), head_VD.double(), case.targets_N,
        **case.double().rows(), **SETTINGS,
    )  # fmt: skip
    for name in ("loss_N", "logp_N", "entropy_N", "kl_N", "ratio_N"):
        torch.testing.assert_close(
            getattr(output, name).cpu().double(), getattr(exact, name), rtol=1e-5, atol=1e-5
        )
    assert torch.equal(output.clipped_N.cpu(), exact.clipped_N)
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5, abs=1e-6)
    assert_near(grad_ND, exact_ND, 5e-6)
    assert_near(grad_VD, exact_VD, 5e-6)
    if num_rows > 11:
        dropped_N = case.weights_N == 0
        assert dropped_N.any() and not grad_ND.cpu()[dropped_N].any()
        assert set(exact.clipped_N.tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(make_hidden_case, dtype):
    """float64 is exact to 1e-12; bf16 keeps fp32 values and rounds its gradients once."""
    hidden_ND, head_VD, case = make_hidden_case(40, 300, seed=2, dtype=dtype)
    rows = (case.double() if dtype == torch.float64 else case).rows()
    output, grad_ND, grad_VD = run(
        kernels.linear_policy_loss, hidden_ND, head_VD, case.targets_N, **rows, **SETTINGS,
        chunk_rows=9,
    )  # fmt: skip
    exact, exact_ND, exact_VD = run(
        reference.linear_policy_loss, hidden_ND.double(), head_VD.double(), case.targets_N,
        **case.double().rows(), **SETTINGS,
    )  # fmt: skip
    tolerance = 1e-12 if dtype == torch.float64 else 4e-3
    assert grad_ND.dtype == grad_VD.dtype == dtype
    assert_near(output.logp_N, exact.logp_N, min(tolerance, 2e-6))
    assert_near(grad_ND, exact_ND, tolerance)
    assert_near(grad_VD, exact_VD, tolerance)


def test_dropped_rows_are_not_read(device, make_hidden_case):
    """A row of weight 0 may hold NaN and a target of -100; errors name the caller's rows."""
    hidden_ND, head_VD, case = make_hidden_case(24, 100, seed=3)
    dropped_N = case.weights_N == 0
    hidden_ND[dropped_N] = float("nan")
    targets_N = case.targets_N.masked_fill(dropped_N, -100)
    arguments = [x.to(device) for x in (hidden_ND, head_VD, targets_N)]
    weights_N = case.weights_N.to(device)
    output, grad_ND, grad_VD = run(kernels.linear_cross_entropy, *arguments, weights_N=weights_N)
    exact, exact_ND, exact_VD = run(
        reference.linear_cross_entropy, hidden_ND.nan_to_num().double(), head_VD.double(),
        targets_N, weights_N=case.weights_N.double(),
    )  # fmt: skip
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5)
    assert_near(grad_ND, exact_ND, 5e-6)
    assert_near(grad_VD, exact_VD, 5e-6)
    arguments[2][15] = 100  # the 15th of those kept: two chunks and one dropped row before it
    with pytest.raises(ValueError, match="row 15 has no loss: its target is outside"):
        output = kernels.linear_cross_entropy(*arguments, weights_N=weights_N, chunk_rows=8)
        kernels.check_status(output.status)


def test_token_logprobs(device, make_hidden_case):
    """Log-probabilities and entropies by chunks equal the whole [N, V] in float64."""
    hidden_ND, head_VD, case = make_hidden_case(40, 300, seed=4)
    values = kernels.linear_token_logprobs(
        *(x.to(device) for x in (hidden_ND, head_VD, case.targets_N)),
        temperature=0.7, chunk_rows=9,
    )  # fmt: skip
    exact = reference.linear_token_logprobs(
        hidden_ND.double(), head_VD.double(), case.targets_N, temperature=0.7
    )
    for value_N, exact_N in zip(values, exact, strict=True):
        torch.testing.assert_close(value_N.cpu().double(), exact_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [0, 5])
def test_no_rows_still_give_gradients(num_rows):
    """Without rows, or with all of weight 0: loss 0 and zero gradients, so that a rank without
    rows takes part in the reductions."""
    output, grad_ND, grad_VD = run(
        kernels.linear_cross_entropy, torch.randn(num_rows, 8), torch.randn(30, 8),
        torch.zeros(num_rows).long(), weights_N=torch.zeros(num_rows),
    )  # fmt: skip
    assert output.loss.item() == 0.0 and output.loss_N.tolist() == [0.0] * num_rows
    assert grad_ND.shape == (num_rows, 8) and not grad_ND.any()
    assert grad_VD.shape == (30, 8) and not grad_VD.any()


def test_row_order_and_chunks_do_not_matter(make_hidden_case):
    """Permuted rows and other chunks give the same gradients to rounding."""
    hidden_ND, head_VD, case = make_hidden_case(57, 300, seed=5)
    order = torch.randperm(57, generator=torch.Generator().manual_seed(0))
    shuffled = type(case)(*(field[order] for field in case))
    _, grad_ND, grad_VD = run(
        kernels.linear_policy_loss, hidden_ND, head_VD, case.targets_N, **case.rows(), **SETTINGS
    )
    _, other_ND, other_VD = run(
        kernels.linear_policy_loss, hidden_ND[order], head_VD, shuffled.targets_N,
        **shuffled.rows(), **SETTINGS, chunk_rows=10,
    )  # fmt: skip
    assert_near(other_ND, grad_ND[order].double(), 2e-6)
    assert_near(other_VD, grad_VD.double(), 2e-6)


def test_tied_head_under_accumulation(device):
    """A head that is also the embedding, two micro-batches: the gradients add up to those of one
    batch through plain autograd."""
    torch.manual_seed(0)
    tokens_N = torch.randint(50, (20,)).to(device)
    targets_N = torch.randint(50, (20,)).to(device)
    weights_N = torch.rand(20).to(device)
    embedding_VD = torch.randn(50, 8).to(device).requires_grad_()
    for part in (slice(0, 13), slice(13, 20)):
        hidden_ND = embedding_VD[tokens_N[part]].tanh()
        kernels.linear_cross_entropy(
            hidden_ND, embedding_VD, targets_N[part], weights_N=weights_N[part]
        ).loss.backward()
    exact_VD = embedding_VD.detach().double().requires_grad_()
    hidden_ND = exact_VD[tokens_N].tanh()
    reference.linear_cross_entropy(
        hidden_ND, exact_VD, targets_N, weights_N=weights_N.double()
    ).loss.backward()
    assert_near(embedding_VD.grad, exact_VD.grad.cpu(), 3e-6)


def test_frozen_inputs_and_upstream(device, make_hidden_case):
    """Only the wanted gradients are made; another upstream gradient scales both; twice raises."""
    hidden_ND, head_VD, case = make_hidden_case(9, 40, seed=6)
    hidden_ND, head_VD, case = hidden_ND.to(device), head_VD.to(device), case.to(device)
    arguments = {**case.rows(), **SETTINGS}
    _, grad_ND, grad_VD = run(
        kernels.linear_policy_loss, hidden_ND, head_VD, case.targets_N, **arguments
    )
    head_VD.requires_grad_()
    output = kernels.linear_policy_loss(hidden_ND, head_VD, case.targets_N, **arguments)
    (3.0 * output.loss).backward(retain_graph=True)
    assert hidden_ND.grad is None
    torch.testing.assert_close(head_VD.grad, 3.0 * grad_VD, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        output.loss.backward()
    output = kernels.linear_policy_loss(
        hidden_ND.requires_grad_(), head_VD.detach(), case.targets_N, **arguments
    )
    torch.testing.assert_close(
        torch.autograd.grad(0.5 * output.loss, hidden_ND)[0], 0.5 * grad_ND, rtol=1e-6, atol=0
    )
    with torch.no_grad():
        output = kernels.linear_policy_loss(hidden_ND, head_VD, case.targets_N, **arguments)
    assert not output.loss.requires_grad


class LargestTensor(TorchDispatchMode):
    """Watches what operators return: the most elements of one tensor, the operators by name."""

    def __init__(self):
        super().__init__()
        self.num_elements, self.operators = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operators.append(function.overloadpacket.__name__)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def test_whole_logits_never_exist():
    """No operator returns more than a chunk of logits, and each chunk costs three matrix products:
    nothing is recomputed."""
    hidden_ND = torch.randn(64, 8, requires_grad=True)
    head_VD = torch.randn(500, 8, requires_grad=True)
    gc.collect()
    with LargestTensor() as watch:
        kernels.linear_cross_entropy(
            hidden_ND, head_VD, torch.arange(64), weights_N=torch.ones(64), chunk_rows=16
        ).loss.backward()
    assert watch.num_elements == 16 * 500
    assert watch.operators.count("mm") + watch.operators.count("addmm") == 3 * 4


@pytest.mark.parametrize(
    ("hidden", "head", "message"),
    [
        (
            torch.zeros(4, 8),
            torch.zeros(30, 7),
            r"head_VD \[30, 7\] does not fit hidden_ND \[4, 8\]",
        ),
        (torch.zeros(4, 8), torch.zeros(30, 8).bfloat16(), "must have one dtype"),
        (torch.zeros(1, 4, 8), torch.zeros(30, 8), "hidden_ND must be a floating matrix"),
        (torch.zeros(5, 8), torch.zeros(30, 8), r"targets_N must be \[5\], got \[4\]"),
    ],
)
def test_misfit_names_the_argument(hidden, head, message):
    """A wrong shape or dtype raises ValueError with the argument's name."""
    with pytest.raises(ValueError, match=message):
        kernels.linear_cross_entropy(hidden, head, torch.zeros(4).long(), weights_N=torch.ones(4))
