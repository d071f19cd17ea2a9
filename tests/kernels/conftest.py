"""Where the kernel tests run (torch, the Triton source in the interpreter, a GPU) and on what."""

import importlib.util
import sys
from contextlib import contextmanager
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels

TRITON_MODULE = "kernels.policy_loss_triton"


def _is_triton(name: str) -> bool:
    """Whether a module is Triton's or uses it; its C extension is not: it loads once a process."""
    if name.startswith("triton._C"):
        return False
    return name.split(".")[0] == "triton" or name == TRITON_MODULE


@pytest.fixture(scope="session")
def interpreted():
    """A context in which CPU tensors go through the Triton source, run by Triton's interpreter.

    Triton decides whether it compiles or interprets when a function is decorated, its own library
    included. So inside there is a second triton package, imported with TRITON_INTERPRET=1, and the
    module of the kernels is imported anew each time. Whatever was imported before is back
    afterwards: compiled and interpreted tests can share one process, in any order.
    """
    second_triton = {}

    @contextmanager
    def context():
        before = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_triton(name)}
        sys.modules.update(second_triton)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TRITON_INTERPRET", "1")
                yield
            reached = TRITON_MODULE in sys.modules
        finally:
            sys.modules.pop(TRITON_MODULE, None)
            names = [name for name in sys.modules if _is_triton(name)]
            second_triton.update({name: sys.modules.pop(name) for name in names})
            sys.modules.update(before)
            vars(kernels).pop("policy_loss_triton", None)  # a package also holds its modules
            if TRITON_MODULE in before:
                kernels.policy_loss_triton = before[TRITON_MODULE]
        assert reached, "the test never reached the Triton source"

    yield context
    # Python clears at exit what is in sys.modules; without that nanobind reports leaks.
    sys.modules.update({f"interpreted.{name}": second_triton[name] for name in second_triton})


@pytest.fixture(params=["torch", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch, interpreted):
    """The device to test on; with "interpreter" CPU tensors go through the Triton source."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        yield "cuda"
        return
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if request.param == "torch":
        yield "cpu"
        return
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if version("triton").startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of triton 3.6 needs numpy < 2.4: it calls int() on arrays")
    with interpreted():
        yield "cpu"


class Case(NamedTuple):
    logits_NV: Tensor
    targets_N: Tensor
    weights_N: Tensor
    advantages_N: Tensor
    old_logp_N: Tensor
    ref_logp_N: Tensor

    def rows(self) -> dict[str, Tensor]:
        fields = self._asdict()
        return {name: fields[name] for name in fields if name not in ("logits_NV", "targets_N")}

    def to(self, device: str) -> "Case":
        return Case(*(field.to(device) for field in self))

    def double(self) -> "Case":
        return Case(*(f.double() if f.is_floating_point() else f for f in self))


@pytest.fixture
def make_case():
    """A function of (N, V, seed, dtype, temperature): rows of every kind, in turn by row number.

    Logits: plain, to +-80, one entry at 80 over a floor of -80 (target on it or off it), a third
    of the entries -inf. Ratios to both sides of the clip and inside, under both signs of A; KL
    from both signs of log(ref/pi); one row in eleven of weight 0.
    """

    def make(
        num_rows: int, vocab_size: int, seed: int = 0, dtype=torch.float32, temperature: float = 1.0
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)
        logits_NV = 3 * torch.randn(num_rows, vocab_size, generator=generator)
        targets_N = torch.randint(vocab_size, (num_rows,), generator=generator)
        kind_N = torch.arange(num_rows) % 5
        logits_NV[kind_N == 1] = 80 * (2 * torch.rand(logits_NV[kind_N == 1].shape) - 1)
        logits_NV[kind_N == 2] = -80.0
        for row in (kind_N == 2).nonzero()[:, 0].tolist():
            hot = targets_N[row] if row % 2 else torch.randint(vocab_size, (), generator=generator)
            logits_NV[row, hot] = 80.0
        for row in (kind_N == 3).nonzero()[:, 0].tolist():
            infinite_V = torch.rand(vocab_size, generator=generator) < 0.33
            infinite_V[targets_N[row]] = False
            logits_NV[row, infinite_V] = -torch.inf
        logits_NV = logits_NV.to(dtype)
        logp_NV = torch.log_softmax(logits_NV.double() / temperature, 1)
        logp_N = logp_NV.gather(1, targets_N[:, None])[:, 0]
        # Two lie between the sides' bounds of 0.2 and 0.28; seven, so that each kind meets each.
        log_ratio_N = torch.tensor([-0.7, -0.29, -0.05, 0.0, 0.05, 0.22, 0.7]).repeat(num_rows)[
            :num_rows
        ]
        log_ref_N = torch.tensor([0.9, -0.4, 0.002, -1.3]).repeat(num_rows)[:num_rows]
        sign_N = torch.tensor([1.0, -1.0, -1.0]).repeat(num_rows)[:num_rows]
        weights_N = torch.rand(num_rows, generator=generator) / 64 + 1e-3
        weights_N[torch.arange(num_rows) % 11 == 10] = 0.0
        return Case(
            logits_NV=logits_NV,
            targets_N=targets_N,
            weights_N=weights_N,
            advantages_N=sign_N * (0.5 + torch.rand(num_rows, generator=generator)),
            old_logp_N=(logp_N - log_ratio_N).float(),
            ref_logp_N=(logp_N + log_ref_N).float(),
        )

    return make
