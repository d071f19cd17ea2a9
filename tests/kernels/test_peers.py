"""Values and gradients beside trl's and liger-kernel's own kernels, where they compute the same."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import kernels
from kernels import Objective, reference

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
OBJECTIVE = Objective(clip_eps_low=0.2, clip_eps_high=0.28, kl_coef=0.04)
NUM_SEQUENCES, LENGTH, VOCAB, WIDTH = 4, 8, 300, 24


@pytest.fixture
def batch():
    """(hidden, head, targets, rows) of equally long sequences, one advantage each."""
    generator = torch.Generator().manual_seed(0)
    num_rows = NUM_SEQUENCES * LENGTH
    hidden_ND = torch.randn(num_rows, WIDTH, generator=generator)
    head_VD = torch.randn(VOCAB, WIDTH, generator=generator)
    targets_N = torch.randint(VOCAB, (num_rows,), generator=generator)
    logp_N, _ = reference.linear_token_logprobs(hidden_ND, head_VD, targets_N)
    advantages_N = torch.tensor([1.5, -0.8, 0.3, -1.0]).repeat_interleave(LENGTH)
    rows = {
        "weights_N": torch.full((num_rows,), 1 / num_rows),
        "advantages_N": advantages_N,
        "old_logp_N": logp_N + 0.4 * torch.randn(num_rows, generator=generator),
        "ref_logp_N": logp_N + 0.5 * torch.randn(num_rows, generator=generator),
    }
    exact = reference.linear_policy_loss(hidden_ND, head_VD, targets_N, **rows, objective=OBJECTIVE)
    assert set(exact.clipped_N.tolist()) == {-1, 0, 1}
    return hidden_ND, head_VD, targets_N, rows


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves)


def by_sequence(tensor_N):
    return tensor_N.view(NUM_SEQUENCES, LENGTH)


def test_equals_liger_fused_linear_grpo(batch):
    """Loss and both gradients equal LigerFusedLinearGRPOLoss's."""
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="needs the extra [peers]")
    hidden_ND, head_VD, targets_N, rows = batch
    leaves = hidden_ND.requires_grad_(), head_VD.requires_grad_()
    ours = kernels.linear_policy_loss(*leaves, targets_N, **rows, objective=OBJECTIVE).loss
    loss = liger.LigerFusedLinearGRPOLoss(
        beta=OBJECTIVE.kl_coef, epsilon_low=OBJECTIVE.clip_eps_low,
        epsilon_high=OBJECTIVE.clip_eps_high, loss_type="grpo", compiled=False,
    )  # fmt: skip
    theirs, *_ = loss(
        hidden_ND.view(NUM_SEQUENCES, LENGTH, WIDTH), head_VD, by_sequence(targets_N),
        torch.ones(NUM_SEQUENCES, LENGTH), by_sequence(rows["advantages_N"])[:, 0],
        ref_per_token_logps=by_sequence(rows["ref_logp_N"]),
        old_per_token_logps=by_sequence(rows["old_logp_N"]),
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for mine, other in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
        assert (mine - other).abs().max() <= 5e-6 * other.abs().max()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_trl_chunked_logprob(batch, temperature):
    """Log-probabilities, entropies and, under the same loss, both gradients equal those of trl's
    ChunkedLogProbFunction."""
    trl = pytest.importorskip("trl.kernels", reason="needs the extra [peers]")
    hidden_ND, head_VD, targets_N, rows = batch
    leaves = hidden_ND.requires_grad_(), head_VD.requires_grad_()
    ours = kernels.linear_policy_loss(
        *leaves, targets_N, **rows, objective=replace(OBJECTIVE, temperature=temperature)
    )
    logp_N, entropy_N, *_ = trl.ChunkedLogProbFunction.apply(
        *leaves, None, targets_N, temperature, 128, None, 1.0, ("log_probs", "entropy")
    )
    torch.testing.assert_close(ours.logp_N.float(), logp_N, rtol=2e-6, atol=5e-6)
    torch.testing.assert_close(ours.entropy_N, entropy_N, rtol=2e-6, atol=1e-5)
    ratio_N = reference.ratio(logp_N, rows["old_logp_N"])
    surrogate_N = reference.clipped_surrogate(ratio_N, rows["advantages_N"], OBJECTIVE)
    loss_N = -(surrogate_N - 0.04 * reference.kl_k3(logp_N, rows["ref_logp_N"]))
    theirs = (rows["weights_N"] * loss_N).sum()
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-5, atol=1e-6)
    for mine, other in zip(gradients(ours.loss, leaves), gradients(theirs, leaves), strict=True):
        assert (mine - other).abs().max() <= 5e-6 * other.abs().max()


def test_liger_triton_kernel_in_the_interpreter(batch, tmp_path):
    """Loss and logits' gradient equal liger's triton_grpo_loss, run by Triton's interpreter."""
    pytest.importorskip("liger_kernel", reason="needs the extra [peers]")
    hidden_ND, head_VD, targets_N, rows = batch
    logits_NV = (hidden_ND @ head_VD.T).requires_grad_()
    ours = kernels.policy_loss(logits_NV, targets_N, **rows, objective=OBJECTIVE).loss
    ours.backward()
    arguments = {"logits": logits_NV.detach(), "targets": targets_N, **rows}
    save_file(arguments, tmp_path / "arguments")
    program = f"""
import sys, torch
from safetensors.torch import load_file, save_file
from liger_kernel.transformers.grpo_loss import triton_grpo_loss
a = load_file(sys.argv[1])
rows = lambda name: a[name].view({NUM_SEQUENCES}, {LENGTH})
padded = torch.nn.functional.pad(a["logits"].view({NUM_SEQUENCES}, {LENGTH}, -1), (0, 0, 0, 1))
padded.requires_grad_()
loss = triton_grpo_loss(
    padded, rows("old_logp_N"), rows("ref_logp_N"), rows("targets"),
    rows("advantages_N")[:, 0].contiguous(), temperature=1.0, beta=0.04, eps_low=0.2,
    eps_high=0.28, loss_type="grpo", inplace=False, reduce=True)[0]
loss.backward()
save_file({{"loss": loss.detach(), "grad": padded.grad[:, :-1].flatten(0, 1)}}, sys.argv[2])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "arguments", tmp_path / "results"],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "results")
    torch.testing.assert_close(ours.detach(), theirs["loss"], rtol=1e-5, atol=1e-6)
    error = (logits_NV.grad - theirs["grad"]).abs().max()
    assert error <= 5e-6 * theirs["grad"].abs().max()
