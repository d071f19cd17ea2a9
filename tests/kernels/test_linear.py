"""The losses from hidden states and head: gradients, dropped rows, memory, use as a head."""

import gc
import itertools
import socket
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import Objective, linear, reference

OBJECTIVE = Objective(clip_eps_low=0.2, clip_eps_high=0.28, kl_coef=0.04)
WIDTH = 24


@pytest.fixture
def make_hidden_case(make_case):
    """(hidden, head, case): like make_case, with old and reference values that fit the head.

    hidden and head are multiples of 1/8, so that their logits are exact in fp32.
    """

    def make(num_rows, vocab_size, seed=0, dtype=torch.float32):
        case = make_case(num_rows, vocab_size, seed)
        generator = torch.Generator().manual_seed(seed)
        hidden_ND, head_VD = (
            ((8 * torch.randn(size, WIDTH, generator=generator)).round() / 8).to(dtype)
            for size in (num_rows, vocab_size)
        )
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


@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "chunk_rows"),
    [
        *[(1, 1, None), (1, 17, 7), (3, 1000, 7), (57, 300, 7), (57, 300, None)],
        *[(257, 17, None), (3, 102_400, 2), (2, 151_936, None)],
    ],
)
def test_equals_float64_reference(device, make_hidden_case, num_rows, vocab_size, chunk_rows):
    """Values and both gradients equal autograd through the whole [N, V] in float64, whatever the
    chunks; rows of weight 0 are dropped and hold 0."""
    hidden_ND, head_VD, case = make_hidden_case(num_rows, vocab_size, seed=num_rows)
    on_device = case.to(device)
    output, grad_ND, grad_VD = run(
        kernels.linear_policy_loss, hidden_ND.to(device), head_VD.to(device), on_device.targets_N,
        **on_device.rows(), objective=OBJECTIVE, chunk_rows=chunk_rows,
    )  # fmt: skip
    exact, exact_ND, exact_VD = run(
        reference.linear_policy_loss, hidden_ND.double(), head_VD.double(), case.targets_N,
        **case.double().rows(), objective=OBJECTIVE,
    )  # fmt: skip
    for name in ("loss_N", "logp_N", "entropy_N", "kl_N", "ratio_N"):
        value_N, exact_N = getattr(output, name).cpu().double(), getattr(exact, name)
        error_N = (value_N - exact_N).abs() / exact_N.abs().clamp(min=1.0)
        assert error_N.max() <= 2e-6, (name, error_N.max())
    assert torch.equal(output.clipped_N.cpu(), exact.clipped_N)
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=2e-6, abs=2e-6)
    # A hidden gradient is a product of V terms, whose own fp32 rounding grows as sqrt(V).
    assert_near(grad_ND, exact_ND, max(2e-6, 2e-7 * vocab_size**0.5))
    assert_near(grad_VD, exact_VD, 2e-6)
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
        kernels.linear_policy_loss, hidden_ND, head_VD, case.targets_N, **rows, objective=OBJECTIVE,
        chunk_rows=9,
    )  # fmt: skip
    exact, exact_ND, exact_VD = run(
        reference.linear_policy_loss, hidden_ND.double(), head_VD.double(), case.targets_N,
        **case.double().rows(), objective=OBJECTIVE,
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
        kernels.linear_policy_loss, hidden_ND, head_VD, case.targets_N, OBJECTIVE, **case.rows()
    )
    _, other_ND, other_VD = run(
        kernels.linear_policy_loss, hidden_ND[order], head_VD, shuffled.targets_N,
        **shuffled.rows(), objective=OBJECTIVE, chunk_rows=10,
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
    arguments = {**case.rows(), "objective": OBJECTIVE}
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


def test_hidden_states_may_lie_in_memory_in_any_way(device, make_hidden_case):
    """Transposed hidden states and head, under an upstream gradient: the gradients of the same
    numbers row by row."""
    hidden_ND, head_VD, case = make_hidden_case(24, 40, seed=7)
    leaves = hidden_ND.to(device), head_VD.to(device)
    case = case.to(device)
    for weights_N in (case.weights_N, torch.ones_like(case.weights_N)):
        _, *expected = run(
            kernels.linear_cross_entropy, *leaves, case.targets_N, weights_N=weights_N
        )
        turned = [x.t().contiguous().t().requires_grad_() for x in leaves]
        output = kernels.linear_cross_entropy(*turned, case.targets_N, weights_N=weights_N)
        grads = torch.autograd.grad(3.0 * output.loss, turned)
        for grad, exact in zip(grads, expected, strict=True):
            assert_near(grad, 3.0 * exact.cpu().double(), 2e-6)


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


def test_memory_is_one_chunk_beside_the_gradients():
    """Forward and backward hold at most one chunk of logits, the block the row pass works in, both
    gradients and some numbers a row."""
    num_rows, vocab_size, width, chunk_rows = 512, 8192, 64, 128
    hidden_ND = torch.randn(num_rows, width, requires_grad=True)
    head_VD = torch.randn(vocab_size, width, requires_grad=True)
    arguments = hidden_ND, head_VD, torch.arange(num_rows)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = kernels.linear_cross_entropy(
            *arguments, weights_N=torch.ones(num_rows), chunk_rows=chunk_rows
        )
        output.loss.backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    peak = max(itertools.accumulate(changes))
    floats = chunk_rows * vocab_size + 2**19 + num_rows * width + vocab_size * width
    assert 4 * floats <= peak <= 4 * floats + 200 * num_rows


def test_head_gradient_is_summed_in_fp32():
    """400 chunks that each add the same to a bf16 head's gradient give 400 times one of them to a
    bf16's rounding; adding them up in bf16 stops short of it."""
    hidden_ND = torch.ones(400, 8, dtype=torch.bfloat16)
    head_VD = torch.zeros(16, 8, dtype=torch.bfloat16)
    targets_N = torch.full((400,), 3)
    _, _, grad_VD = run(
        kernels.linear_cross_entropy, hidden_ND, head_VD, targets_N, weights_N=torch.ones(400),
        chunk_rows=1,
    )  # fmt: skip
    one_V = torch.full((16,), 1 / 16) - torch.eye(16)[3]
    exact_VD = 400 * one_V[:, None].double().expand(16, 8)
    rounded_V = torch.zeros(16, dtype=torch.bfloat16)
    for _ in range(400):
        rounded_V += one_V.bfloat16()
    assert_near(grad_VD, exact_VD, 2**-8)
    assert (rounded_V.double() - exact_VD[:, 0]).abs().max() > 0.2 * exact_VD.abs().max()


@pytest.mark.parametrize(
    ("free_gib", "unused_gib", "chunk_rows"),
    [(70, 0, 8192), (1, 0, 1280), (0, 1, 1280), (0.5, 0.5, 1280), (0, 0, 256)],
)
def test_chunk_fits_the_free_memory(monkeypatch, free_gib, unused_gib, chunk_rows):
    """On a GPU a chunk of logits takes at most a quarter of what is free, what torch holds unused
    included, in multiples of 256 rows up to 8192."""
    memory = {"mem_get_info": (int(free_gib * 2**30), 80 * 2**30), "memory_allocated": 2**30}
    memory["memory_reserved"] = 2**30 + int(unused_gib * 2**30)
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    hidden = types.SimpleNamespace(device=torch.device("cuda"), element_size=lambda: 2)
    assert linear._default_chunk_rows(hidden, 102_400) == chunk_rows


class TiedModel(nn.Module):
    """Two layers and an embedding that is also the head; the loss runs inside forward."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(51, 8), nn.Linear(8, 8)

    def forward(self, tokens_N, head_fn):
        return head_fn(self.layer(self.embedding(tokens_N)).tanh(), self.embedding.weight)


def tied_gradients(model, micro_batches):
    """Gradients of the summed loss of micro-batches (first row, last row) of 40 tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens_N, targets_N = torch.randint(51, (2, 40), generator=generator)
    weights_N = torch.rand(40, generator=generator, dtype=torch.float64)
    weights_N[5:9] = 0.0
    for span in itertools.starmap(slice, micro_batches):
        head_fn = lambda hidden_ND, head_VD, span=span: (
            kernels.linear_cross_entropy(
                hidden_ND, head_VD, targets_N[span], weights_N=weights_N[span], chunk_rows=4
            ).loss
        )
        model(tokens_N[span], head_fn).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def worker_fsdp2(rank, port, folder):
    """One of two ranks: the sharded model's gradients of its half, in uneven micro-batches."""
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = TiedModel().double()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    fully_shard(model.layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in (model, model.layer):
        module.set_gradient_divide_factor(1.0)
    spans = [(0, 12), (12, 12)] if rank == 0 else [(12, 31), (31, 40)]  # one without rows
    grads = {name: grad.full_tensor() for name, grad in tied_gradients(model, spans).items()}
    if rank == 0:
        save_file(grads, folder / "grads.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_inside_a_sharded_root_forward(tmp_path):
    """As head_fn inside an FSDP2 root forward, with a tied head, accumulated over micro-batches on
    two ranks, one of them without rows: the gradients are those of one process and one batch."""
    torch.manual_seed(0)
    exact = tied_gradients(TiedModel().double(), [(0, 40)])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=worker_fsdp2, args=(r, port, tmp_path)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=90)
    assert [process.exitcode for process in ranks] == [0, 0]
    grads = load_file(tmp_path / "grads.safetensors")
    assert grads.keys() == exact.keys()
    for name in exact:
        torch.testing.assert_close(grads[name], exact[name], rtol=1e-10, atol=1e-12)


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


@pytest.mark.parametrize("chunk_rows", [0, -3])
def test_chunk_of_no_rows_is_refused(chunk_rows):
    """A chunk holds at least one row; 0 does not mean the default."""
    with pytest.raises(ValueError, match="chunk_rows must be at least 1"):
        kernels.linear_token_logprobs(
            torch.zeros(4, 8), torch.zeros(30, 8), torch.zeros(4).long(), chunk_rows=chunk_rows
        )
