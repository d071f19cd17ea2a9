"""Sharding and reductions: two gloo processes must do what one does, and end together.

The processes run this file as a script (`worker_*` below) and leave numbers for the tests.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from nanomath import dist as nd
from nanomath.base import processes
from nanomath.model import ModelConfig, Transformer
from nanomath.run import guard as failures

ROOT = Path(__file__).parents[2]
CFG = ModelConfig(33, 2, 12, 2, 1, 20)  # odd row counts: ranks hold unequal shares
ALONE = nd.Dist(0, 0, 1, torch.device("cpu"))
NUM_STEPS = 20
MAX_NORM = 0.05
# Rows of the global batch per rank and micro-batch: uneven, and in one a rank has nothing to train.
MICRO_BATCHES = {
    1: [[[0, 1, 2, 3, 4]]],
    2: [[[0], [1, 2]], [[3, 4], []]],
    4: [[[0], []], [[1], [2]], [[3], []], [[], [4]]],
}


def build_model(seed=0, dtype=torch.float64):
    model = Transformer(CFG).to(dtype)
    model.init_weights(seed, std=0.2)
    return model


def make_loss(model, step, rows):
    """Weighted cross-entropy of some rows of step's batch; the weights are global."""
    generator = torch.Generator().manual_seed(step)
    tokens_BT = torch.randint(0, CFG.vocab_size, (5, 7), generator=generator)
    weights_BT = torch.rand((5, 6), generator=generator, dtype=torch.float64) / 15
    if not rows:  # still a forward and a backward through every weight
        rows, weights_BT = [0], torch.zeros_like(weights_BT)

    def head_fn(hidden_BTD, head_VD):
        logp = (hidden_BTD[:, :-1] @ head_VD.T).log_softmax(-1)
        picked = logp.gather(-1, tokens_BT[rows, 1:, None])[..., 0]
        return -(weights_BT[rows] * picked).sum()

    return model(tokens_BT[rows], head_fn=head_fn)


def train(dist, activation_checkpointing="none", dtype=torch.float64):
    """Train NUM_STEPS; return model, losses, norms, and the first step's gradients."""
    model = nd.shard(build_model(dtype=dtype), dist, activation_checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    losses, norms, first_grads = [], [], {}
    for step in range(NUM_STEPS):
        micro_batches = MICRO_BATCHES[dist.world_size][dist.rank]
        loss = 0.0
        for index, rows in enumerate(micro_batches):
            nd.microbatch_sync(model, index == len(micro_batches) - 1)
            part = make_loss(model, step, rows)
            part.backward()
            loss += part.item()
            if dist.mesh is not None and index < len(micro_batches) - 1:
                assert all(p.grad is None for p in model.parameters()), "reduced before the last"
        if step == 0:
            first_grads = {name: full(p.grad) for name, p in model.named_parameters()}
        losses.append(nd.all_reduce_sum({"loss": loss}, dist)["loss"])
        norms.append(nd.clip_grad_norm(model.parameters(), MAX_NORM, dist))
        optimizer.step()
        optimizer.zero_grad()
    return model, losses, norms, first_grads


def full(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


# ---------------------------------------------------------------------------- the processes


def worker_train(out):
    """Train, leave numbers for the tests, then fail on rank 1 while the others wait for it."""
    dist = nd.setup("cpu", 1, timeout_s=60)
    with failures.raise_together(dist):
        model, losses, norms, first_grads = train(dist)
        weights = {name: full(p) for name, p in model.named_parameters()}
        if dist.is_main:
            save_file(weights, out / "weights.safetensors")
            save_file(first_grads, out / "grads.safetensors")
        recomputed = {
            mode: all(
                torch.equal(nd.local(p), nd.local(other))
                for p, other in zip(model.parameters(), train(dist, mode)[0].parameters())
            )
            for mode in ("selective", "full")
        }
        narrow, losses_fp32, _, _ = train(dist, dtype=torch.float32)
        narrow = {name: full(p) for name, p in narrow.named_parameters()}
        if dist.is_main:
            save_file(narrow, out / "weights_fp32.safetensors")
        tokens = torch.arange(20).reshape(4, 5)
        replica = nd.make_replica(model, dist)
        addresses = [p.data_ptr() for p in replica.parameters()]
        reference = nd.shard(build_model(seed=1), dist)
        with torch.no_grad():
            reference(tokens)  # leaves the root gathered: copies must not be lost behind it
            nd.copy_weights(reference, model)
            policy_logits, copied = model(tokens), reference(tokens)
            for parameter in model.parameters():
                nd.local(parameter).mul_(1.5)
            nd.refresh_replica(replica, model, dist)
            moved, sampled = model(tokens), replica(tokens)
        with failures.StopSignal() as stop:
            asked = [stop.requested(dist)]
            if dist.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            asked.append(stop.requested(dist))
        facts = {
            "recomputed": recomputed,
            "losses_fp32": losses_fp32,
            "losses": losses,
            "norms": norms,
            "unsharded": sum(not isinstance(p, DTensor) for p in reference.parameters()),
            "copied": (copied - policy_logits).abs().max().item(),
            "refreshed": (moved - sampled).abs().max().item(),
            "moved": (moved - policy_logits).abs().max().item(),
            "same_addresses": addresses == [p.data_ptr() for p in replica.parameters()],
            "replica_grads": any(p.requires_grad for p in replica.parameters()),
            "gathered": nd.gather_json({"rank": dist.rank, "pad": "x" * dist.rank}, dist),
            "broadcast": nd.broadcast_json([dist.rank, "\u00e9"], dist),
            "ok": [nd.all_ok(True, dist), nd.all_ok(dist.rank == 0, dist)],
            "sum": nd.all_reduce_sum({"a": 1e-17 + dist.rank, "b": -1.0}, dist),
            "stop": asked,
        }
        nd.set_timeout(dist, 600)  # far above what the tests wait
        (out / f"facts-{dist.rank}.json").write_text(json.dumps(facts))
        if dist.rank == 1:
            raise ValueError("the reward of prompt 17 broke")
        nd.barrier(dist)


def launch(worker, out, num_processes, file=__file__, timeout=120):
    """Run worker(out) of a test file in processes of their own; return [(status, stderr)]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(num_processes):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        }
        command = [sys.executable, str(file), worker, str(out)]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors)]


# ---------------------------------------------------------------------------- the tests


def check_equal_to_one(out, num_processes):
    """Compare a run of several processes with one here; return their facts and errors."""
    statuses = launch("train", out, num_processes)
    facts = [json.loads((out / f"facts-{rank}.json").read_text()) for rank in range(num_processes)]
    assert time.time() - (out / "facts-1.json").stat().st_mtime < 30  # all ended soon after rank 1
    model, losses, norms, first_grads = train(ALONE)
    assert min(norms) > MAX_NORM  # clipping took part
    for rank in range(num_processes):
        torch.testing.assert_close(facts[rank]["losses"], losses, rtol=1e-10, atol=0)
        torch.testing.assert_close(facts[rank]["norms"], norms, rtol=1e-10, atol=0)
    for name, grad in load_file(out / "grads.safetensors").items():
        torch.testing.assert_close(grad, first_grads[name], rtol=1e-10, atol=1e-13)
    for name, weight in load_file(out / "weights.safetensors").items():
        expected = model.get_parameter(name).detach()
        torch.testing.assert_close(weight, expected, rtol=1e-10, atol=1e-10)
    # fp32: sums in another order round differently, and AdamW divides by the root of small ones.
    narrow, losses, _, _ = train(ALONE, dtype=torch.float32)
    torch.testing.assert_close(facts[0]["losses_fp32"], losses, rtol=1e-5, atol=0)
    for name, weight in load_file(out / "weights_fp32.safetensors").items():
        expected = narrow.get_parameter(name).detach()
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-4)
    return facts, statuses


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return check_equal_to_one(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture
def two(both):
    return both[0]


def test_two_processes_train_as_one(two):
    """Losses, norms and weights of 20 steps are those of one process: to 1e-10 in float64; in fp32
    losses to 1e-5 and weights to 1e-4."""
    assert two[0]["losses"] == two[1]["losses"]
    assert two[0]["norms"] == two[1]["norms"]  # bitwise: ranks must agree on skipping a step


def test_recomputing_sharded_blocks_changes_no_bit(two):
    """Activation checkpointing under FSDP2 trains to the same bits."""
    for facts in two:
        assert facts["recomputed"] == {"selective": True, "full": True}


def test_an_error_on_one_rank_ends_all(both):
    """Ranks waiting in a collective end within seconds, with the failing rank's message."""
    (waiting, waiting_text), (failing, failing_text) = both[1]
    assert waiting == 1 and failing == 1
    assert "rank 1: ValueError: the reward of prompt 17 broke" in waiting_text
    assert failing_text.rstrip().endswith("ValueError: the reward of prompt 17 broke")


@pytest.mark.slow
def test_four_processes_train_as_one(tmp_path):
    """The same on four, where some ranks hold no row of a weight and some no token to train."""
    check_equal_to_one(tmp_path, 4)


def test_copies_of_sharded_weights(two):
    """Reference and replica compute exactly what the policy computes, also after an update."""
    for facts in two:
        assert facts["copied"] == 0.0
        assert facts["refreshed"] == 0.0
        assert facts["moved"] > 0.1
        assert facts["same_addresses"]
        assert not facts["replica_grads"]
        assert facts["unsharded"] > 0  # the state that copy_weights has to see through occurred


def test_messages_between_ranks(two):
    """Every rank gets the same JSON, flags and sums."""
    for facts in two:
        assert facts["gathered"] == [{"rank": 0, "pad": ""}, {"rank": 1, "pad": "x"}]
        assert facts["broadcast"] == [0, "\u00e9"]
        assert facts["ok"] == [True, False]
        assert facts["sum"] == {"a": 1.0 + 2e-17, "b": -2.0}
        assert facts["stop"] == [False, True]


def test_one_process_is_not_wrapped():
    """World size 1 on a CPU keeps the model as it is, without a process group."""
    dist = nd.setup("cpu", 1)
    model = build_model()
    assert dist == ALONE and dist.is_main and dist.mesh is None
    assert not torch.distributed.is_initialized()
    assert nd.shard(model, dist) is model and type(model) is Transformer
    assert nd.make_replica(model, dist) is model
    nd.refresh_replica(model, model, dist)
    nd.microbatch_sync(model, False)
    nd.set_timeout(dist, 1)
    with failures.raise_together(dist):
        pass


def test_sums_of_one_process():
    """Without other ranks sums are the values, and JSON comes back as JSON would."""
    assert nd.all_reduce_sum({"a": 0.1, "b": 2}, ALONE) == {"a": 0.1, "b": 2.0}
    assert nd.all_reduce_sum({}, ALONE) == {}
    assert nd.broadcast_json({"a": (1, 2)}, ALONE) == {"a": [1, 2]}
    with pytest.raises(ValueError, match="JSON"):
        nd.broadcast_json(float("nan"), ALONE)


def test_clip_grad_norm():
    """The norm is the joint 2-norm; gradients shrink to max_norm only when above it."""
    weights = [
        nn.Parameter(torch.zeros(3)),
        nn.Parameter(torch.zeros(2, 2)),
        nn.Parameter(torch.zeros(1)),
    ]
    weights[0].grad = torch.tensor([1.0, 2.0, 2.0])
    weights[1].grad = torch.full((2, 2), 2.0)
    assert nd.clip_grad_norm(weights, 6.0, ALONE) == pytest.approx(5.0, rel=1e-7)
    assert weights[0].grad.tolist() == [1.0, 2.0, 2.0]
    assert nd.clip_grad_norm(iter(weights), 1.0, ALONE) == pytest.approx(5.0, rel=1e-7)
    torch.testing.assert_close(weights[0].grad, torch.tensor([0.2, 0.4, 0.4]))
    assert nd.clip_grad_norm(weights[2:], 1.0, ALONE) == 0.0
    big = nn.Parameter(torch.zeros(2))
    big.grad = torch.tensor([3e30, 4e30])  # squares overflow fp32
    assert nd.clip_grad_norm([big], 1e31, ALONE) == pytest.approx(5e30, rel=1e-6)
    large = nn.Parameter(torch.zeros(20_000, 64))  # one fp32 sum over all of it would be 1e-5 off
    large.grad = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    exact = float(large.grad.double().norm())
    assert nd.clip_grad_norm([large], 1e9, ALONE) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_clip_leaves_non_finite_gradients(value):
    """A norm that is not finite is reported, and no gradient is touched."""
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([value, 7.0])
    norm = nd.clip_grad_norm([weight], 1.0, ALONE)
    assert not torch.isfinite(torch.tensor(norm))
    assert weight.grad[1] == 7.0


def test_stop_signal_once_and_twice():
    """The first signal is a question, copies of it are ignored, a later one ends the process."""
    before = signal.getsignal(signal.SIGUSR1)
    with failures.StopSignal() as stop:
        assert not stop.requested(ALONE)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(ALONE)
        child = os.fork()
        if child == 0:
            stop.SAME_SIGNAL_S = 0.0  # as if the second had passed
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGUSR1) is before


def test_bad_device_is_one_line():
    """A device that does not exist is named with the flag."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="--device cuda: process 0 .* needs a GPU .* sees 0"):
        nd.setup("cuda")


def test_default_threads(monkeypatch):
    """Processes on one machine share its cores; a lone process follows OMP_NUM_THREADS."""
    monkeypatch.setattr(processes, "_physical_cores", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert processes.default_threads(1) == 5
    assert processes.default_threads(2) == 3
    assert processes.default_threads(16) == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert processes.default_threads(1) == 6


if __name__ == "__main__":
    globals()[f"worker_{sys.argv[1]}"](Path(sys.argv[2]))


def test_no_limit_scales_nothing():
    """max_norm None leaves gradients of any norm as they are, and still returns the norm."""
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([300.0, 400.0])
    assert nd.clip_grad_norm([weight], None, ALONE) == 500.0
    assert weight.grad.tolist() == [300.0, 400.0]
