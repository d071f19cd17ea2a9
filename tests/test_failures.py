"""Runs that nothing can spoil: kills, disk errors and signals at every moment of a small real run.

Each run here goes through nanomath.run.loop, as the trainers do, on a model of 3,000 weights. A
fault is one moment of one call that touches the disk: before it, half-way through a write, or after
it. Several processes: this file run as a script (`worker_*`), see nanomath/test_dist.py.
"""

import errno
import importlib.util
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from nanomath import dist, optim
from nanomath.base import log
from nanomath.base.config import RunConfig
from nanomath.data import PackedExamples, TrainBatch
from nanomath.hub import weights
from nanomath.model import Block, ModelConfig, Transformer
from nanomath.optim import make_adamw, supervised_step
from nanomath.run import checkpoint, load
from nanomath.run import metrics as monitor
from nanomath.run.loop import Run, open_run
from nanomath.text.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location(
    "dist_tests", ROOT / "tests" / "nanomath" / "test_dist.py"
)
dist_tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dist_tests)
CFG = ModelConfig(31, 2, 12, 2, 1, 20, max_context=16)
NUM_STEPS = 4
tqdm.monitor_interval = 0  # its thread must not hold a lock while a test forks


@pytest.fixture(autouse=True)
def no_events(monkeypatch):
    """Without TensorBoard: its writer is a thread of its own, and the tests fork."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def make_batch(step, num_rows=5):
    generator = torch.Generator().manual_seed(step)
    tokens_BT = torch.randint(0, CFG.vocab_size, (num_rows, 9), generator=generator)
    weights_BT = (torch.rand(num_rows, 9, generator=generator) < 0.6).double()
    weights_BT[1], weights_BT[:, -1] = 0.0, 0.0  # a row without a trained token
    return TrainBatch(tokens_BT, weights_BT / weights_BT.sum())


def train(run_dir, num_steps=NUM_STEPS, dtype=torch.float32, each_step=None, **settings):
    """Train a small model to the end, continuing what is there; each_step(run, step) may spoil."""
    settings = {"checkpoint_interval": 1, "micro_batch_size": 2} | settings
    cfg = RunConfig(run_dir=str(run_dir), device="cpu", threads=1, **settings)
    with open_run(cfg) as (here, lock):
        model = Transformer(CFG).to(dtype)
        model.init_weights(0, std=0.2)
        model = dist.shard(model, here)
        optimizer = make_adamw(model, lr=1e-2)
        run = Run(cfg, here, lock, {"model": model}, optimizer, tokenizer=None)
        for step in run.steps(num_steps, desc="test"):
            if each_step is not None:
                each_step(run, step)
            metrics = supervised_step(
                model, optimizer, make_batch(step).to(here.device), lr=1e-2, max_grad_norm=0.1,
                micro_batch_size=cfg.micro_batch_size, dist=here,
            )  # fmt: skip
            run.samples(step, [f"loss {metrics['loss']}"])
            run.log(step, metrics, batch=("rows", range(5)))
        run.close()


def files_of(run_dir, num_steps=NUM_STEPS):
    """Return the bytes of all that a run must leave the same, however it was cut."""
    newest = run_dir / "checkpoints" / f"step-{num_steps:06d}"
    paths = [run_dir / "metrics.jsonl", run_dir / "samples.txt", *newest.glob("*.safetensors")]
    state = json.loads((newest / "state.json").read_text())
    assert checkpoint.damage(newest) is None
    return {path.name: path.read_bytes() for path in paths} | {"state": {**state, "seconds": 0}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of an uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        train(run_dir)
    files = files_of(run_dir)
    assert len(files) == 5 and len(files["metrics.jsonl"].splitlines()) == NUM_STEPS
    return files


# ------------------------------------------------------------------------------- faults


class Faults:
    """Count the moments of all calls that touch the disk, and `act` at one of them."""

    CALLS = ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")

    def __init__(self, at, act):
        self.at, self.act, self.count, self.seen = at, act, 0, set()

    def moment(self, what):
        self.count += 1
        self.seen.add(what)
        if self.count - 1 == self.at:
            self.act()

    def install(self, patch):
        patch.setattr(os, "fsync", os.fstat)  # half of a run's time, and no process sees the effect
        for name in self.CALLS:
            patch.setattr(os, name, self.wrapped(name, getattr(os, name)))
        patch.setattr(pathlib.Path, "write_text", self.torn_text(pathlib.Path.write_text))
        patch.setattr(weights, "save_file", self.torn_tensors(weights.save_file))
        patch.setattr(log._Lines, "_write", self.torn_line(log._Lines._write))

    def wrapped(self, name, real):
        def call(*args, **kwargs):
            self.moment(f"before {name}")
            result = real(*args, **kwargs)
            self.moment(f"after {name}")
            return result

        return call

    def torn_text(self, real):
        def write_text(path, text, **kwargs):
            self.moment("before write")
            real(path, text[: len(text) // 2], **kwargs)
            self.moment("half a write")
            real(path, text, **kwargs)
            self.moment("after write")

        return write_text

    def torn_tensors(self, real):
        def save_file(tensors, path):
            self.moment("before tensors")
            real(tensors, path)
            raw = path.read_bytes()
            path.write_bytes(raw[: len(raw) // 2])
            self.moment("half the tensors")
            path.write_bytes(raw)
            self.moment("after tensors")

        return save_file

    def torn_line(self, real):
        def _write(lines):
            self.moment("before line")
            half = lines._file.write(lines._waiting[: len(lines._waiting) // 2])
            lines._waiting = lines._waiting[half:]
            self.moment("half a line")
            real(lines)
            self.moment("after line")

        return _write


EVERY_KIND = {f"{side} {name}" for side in ("before", "after") for name in Faults.CALLS} | {
    f"{part} {what}"
    for part, what in [("half a", "write"), ("half the", "tensors"), ("half a", "line")]
}


def in_fork(action):
    """Run action in a forked process; return its exit status (negative: signal)."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except SystemExit as end:
            print(end.code, file=sys.stderr, flush=True)
            os._exit(end.code if isinstance(end.code, int) else 1)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def faulty_run(run_dir, faults):
    with pytest.MonkeyPatch.context() as patch:
        faults.install(patch)
        train(run_dir)


def test_faults_cover_every_kind_of_call(tmp_path):
    """Every write, fsync, rename and deletion of a run is a moment that can be spoilt."""
    faults = Faults(-1, None)
    faulty_run(tmp_path, faults)
    assert faults.seen >= EVERY_KIND
    assert faults.count > 60 * NUM_STEPS


@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_run_resumes_to_the_same_bits(tmp_path, whole, stride):
    """SIGKILL at a moment of a run, then the same command: weights, moments, metrics and samples
    equal the uninterrupted run's, byte for byte."""
    for at in range(0, 10_000, stride):
        run_dir = tmp_path / str(at)
        status = in_fork(lambda: faulty_run(run_dir, Faults(at, kill_self)))  # noqa: B023
        assert status in (0, -signal.SIGKILL)
        train(run_dir)
        assert files_of(run_dir) == whole, at
        temporary = [p.name for p in (run_dir / "checkpoints").iterdir() if p.name[0] == "."]
        assert temporary == []
        if status == 0:
            break
    assert at > 60 * NUM_STEPS


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("stride", [31, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_error_at_any_moment_costs_a_save_at_most(tmp_path, whole, capsys, number, stride):
    """The run goes on and ends with the same bits. Only where nothing can be tried again, before
    the first step or in the last save, it ends with the error's text and the next call completes
    it."""
    spoilt_steps = {}
    for at in range(0, 10_000, stride):
        run_dir, now = tmp_path / str(at), {"step": "start"}

        def fail():
            spoilt_steps[at] = now["step"]  # noqa: B023
            raise OSError(number, os.strerror(number))

        def each_step(run, step):
            now["step"] = step  # noqa: B023

        faults = Faults(at, fail)
        ended = None
        with pytest.MonkeyPatch.context() as patch:
            faults.install(patch)
            try:
                train(run_dir, each_step=each_step)
            except SystemExit as end:
                ended = str(end.code)
            except OSError as error:
                ended = str(error)
        if ended is not None:
            assert os.strerror(number) in ended
            assert spoilt_steps[at] in ("start", NUM_STEPS - 1), (at, ended)
        train(run_dir)  # the same command again completes it, or finds all done
        assert files_of(run_dir) == whole, at
        if faults.count <= at:
            break
    steps = list(spoilt_steps.values())
    assert all(steps.count(step) > 40 // stride for step in range(NUM_STEPS))
    capsys.readouterr()


def test_all_is_on_the_disk_before_a_checkpoint_gets_its_name(tmp_path, monkeypatch):
    """A power cut loses what was not fsynced: at the rename every file, the folder and the logs
    are; its new name is, after it."""
    synced, order, real_fsync, real_rename = set(), [], os.fsync, os.rename

    def fsync(handle):
        path = pathlib.Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced.add(path)
        order.append(path.name)
        real_fsync(handle)

    def rename(source, target):
        if pathlib.Path(target).name.startswith("step-"):
            needed = {pathlib.Path(source), *pathlib.Path(source).iterdir()}
            needed |= {tmp_path / "metrics.jsonl", tmp_path / "samples.txt"}
            assert needed <= synced and len(needed) == 8
            assert order[-2:] == ["COMMIT", pathlib.Path(source).name]
            order.clear()
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    train(tmp_path, num_steps=1)
    assert order == ["checkpoints"]


def failing(real, steps):
    """Return each_step that lets the saves of these steps fail."""

    def each_step(run, step):
        def refuse(tensors, path):
            raise OSError(errno.ENOSPC, "No space left on device")

        weights.save_file = refuse if step in steps else real

    return each_step


def test_saves_that_keep_failing_end_the_run(tmp_path, whole, capsys, monkeypatch):
    """Two failed saves are warnings, the third in a row ends the run with its message; what was
    saved before stays, and with room again the same command ends at the same bits."""
    real = weights.save_file
    monkeypatch.setattr(weights, "save_file", real)  # puts it back at the end
    with pytest.raises(SystemExit, match=r"cannot be saved \(3 in a row failed\): .*No space left"):
        train(tmp_path, num_steps=8, each_step=failing(real, range(1, 8)))
    assert capsys.readouterr().out.count("warning: could not save") == 3
    assert names_in(tmp_path) == {"step-000001"}
    train(tmp_path, each_step=failing(real, ()))
    assert files_of(tmp_path) == whole


def test_only_failures_in_a_row_end_a_run(tmp_path, monkeypatch):
    """Two failed saves, a good one and two more do not end it."""
    real = weights.save_file
    monkeypatch.setattr(weights, "save_file", real)
    train(tmp_path, num_steps=7, each_step=failing(real, {1, 2, 4, 5}))
    assert names_in(tmp_path) == {"step-000004", "step-000007"}


@pytest.mark.parametrize("signalled", [False, True])
def test_the_last_save_must_succeed(tmp_path, monkeypatch, signalled):
    """At the end of a run, or when asked to stop, one failed save is an error, not a warning."""
    real = weights.save_file
    monkeypatch.setattr(weights, "save_file", real)
    fail = failing(real, {2})

    def each_step(run, step):
        fail(run, step)
        if signalled and step == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit, match=r"cannot be saved \(1 in a row failed\)"):
        train(tmp_path, num_steps=4 if signalled else 3, each_step=each_step)


def test_time_outs_are_short_after_the_first_step(tmp_path, monkeypatch):
    """Only the first step of each start, which compiles, may keep the others waiting for long."""
    calls, seen = [], []
    monkeypatch.setattr(
        "nanomath.run.loop.set_timeout", lambda dist, seconds: calls.append(seconds)
    )
    train(tmp_path, num_steps=3, each_step=lambda run, step: seen.append(list(calls)))
    assert seen == [[], [900], [900]]


def test_seconds_count_on_over_a_restart(tmp_path):
    """A run's seconds are those of all its starts together."""
    train(tmp_path, num_steps=2, each_step=lambda run, step: time.sleep(0.3))
    train(tmp_path, num_steps=3)
    state = json.loads((tmp_path / "checkpoints" / "step-000003" / "state.json").read_text())
    assert state["seconds"] > 0.6


def names_in(run_dir):
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def test_a_full_disk_by_file_size_limit(tmp_path, whole):
    """Under RLIMIT_FSIZE saves fail and the run goes on; with room again it saves and ends at the
    same bits."""
    sizes = [len(raw) for name, raw in whole.items() if name.endswith("safetensors")]

    def limit(run, step):
        size = max(sizes) // 2 if step < 2 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    assert in_fork(lambda: train(tmp_path, each_step=limit)) == 0
    assert files_of(tmp_path) == whole
    assert names_in(tmp_path) == {"step-000003", "step-000004"}


def test_a_full_disk_on_a_small_tmpfs(tmp_path, whole, capfd):
    """On a file system that really is full, logs included, a run waits for room: it saves the step
    after some is made and ends at the same bits."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {mounted.stderr.strip()}")

    def fill(run, step):
        if step == 1:
            with pytest.raises(OSError), open(disk / "ballast", "wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 512)
        if step == 3:
            (disk / "ballast").unlink()

    try:
        train(disk / "run", each_step=fill)
        said = capfd.readouterr()
        assert said.out.count("could not save") == 2 and "No space left on device" in said.out
        assert files_of(disk / "run") == whole
        assert names_in(disk / "run") == {"step-000001", "step-000004"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_lines_that_a_full_disk_refuses_are_kept(tmp_path, capsys):
    """Rows that cannot be written wait, with one warning that names the file, and follow in order;
    until then nothing may be checkpointed."""
    run_log = log.RunLog(tmp_path, start_step=0)

    class Full:
        def write(self, raw):
            raise OSError(errno.ENOSPC, "No space left on device")

    run_log.metrics(0, {"loss": 0.5})
    file, run_log._metrics._file = run_log._metrics._file, Full()
    for step in (1, 2):
        run_log.metrics(step, {"loss": 0.5})
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "metrics.jsonl'; its lines wait in memory" in warning
    with pytest.raises(OSError, match="No space left on device: .*metrics.jsonl"):
        run_log.sync()
    assert len(log.read_metrics(tmp_path)) == 1
    run_log._metrics._file = file
    run_log.sync()
    assert [row["step"] for row in log.read_metrics(tmp_path)] == [0, 1, 2]


def test_a_stolen_lock_ends_the_run(tmp_path):
    """A trainer whose run folder was taken over saves nothing more and says so."""

    def steal(run, step):
        if step == 1:
            (tmp_path / ".lock").unlink()

    with pytest.raises(SystemExit, match="lock was removed or replaced .* saves nothing more"):
        train(tmp_path, each_step=steal)
    assert names_in(tmp_path) == {"step-000001"}


# ------------------------------------------------------------------------------- signals


def during_save(number, times):
    """Return each_step that sends this process signals in the middle of the second save."""
    real = os.fsync

    def each_step(run, step):
        calls = []

        def fsync(handle):
            calls.append(1)
            for _ in range(times if len(calls) == 4 else 0):  # the first two are the logs'
                signal.raise_signal(number)
                time.sleep(1.1 if times > 1 else 0.0)
            real(handle)

        os.fsync = fsync if step == 1 else real

    return each_step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_a_save(tmp_path, whole, number):
    """The save is finished, the run stops after the step then begun, saves that and exits 0; the
    same command ends at the same bits."""
    assert in_fork(lambda: train(tmp_path, each_step=during_save(number, 1))) == 0
    assert names_in(tmp_path) == {"step-000002", "step-000003"}
    train(tmp_path)
    assert files_of(tmp_path) == whole


def test_a_second_signal_during_a_save_exits_at_once(tmp_path, whole):
    """A second signal, more than a second later, ends the process in the middle of the save with
    128 + its number; the checkpoint before is there."""
    status = in_fork(lambda: train(tmp_path, each_step=during_save(signal.SIGTERM, 2)))
    assert status == 128 + signal.SIGTERM
    assert names_in(tmp_path) == {"step-000001", ".tmp-step-000002"}
    train(tmp_path)
    assert files_of(tmp_path) == whole


# ------------------------------------------------------------------------------- bad gradients


def spoil(steps, seen, real=optim.linear_cross_entropy):
    """Return each_step that makes the loss of these steps NaN; seen: all tensors before a step."""

    def each_step(run, step):
        tensors = [*run.modules["model"].parameters()]
        for state in run.optimizer.state.values():
            tensors += state.values()
        seen.append([dist.local(tensor).detach().clone() for tensor in tensors])

        def not_finite(*args, **kwargs):
            return SimpleNamespace(loss=real(*args, **kwargs).loss * float("nan"))

        optim.linear_cross_entropy = not_finite if step in steps else real

    return each_step


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, monkeypatch, capsys):
    """Weights and moments stay to the last bit; the step is counted and names its batch."""
    monkeypatch.setattr(optim, "linear_cross_entropy", optim.linear_cross_entropy)
    seen = []
    train(tmp_path, num_steps=6, each_step=spoil({2, 3}, seen))
    assert same(seen[2], seen[3]) and same(seen[3], seen[4])
    assert not same(seen[1], seen[2]) and not same(seen[4], seen[5])
    rows = log.read_metrics(tmp_path)
    assert [row["stepped"] for row in rows] == [1, 1, 0, 0, 1, 1]
    assert [row.get("skipped_rows") for row in rows[1:4]] == [
        None,
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4],
    ]
    said = capsys.readouterr().out
    assert "step 2: the gradient is not finite (rows 0, 1, 2, 3, 4): that update is skipped" in said


def test_ten_bad_gradients_in_a_row_end_the_run(tmp_path, monkeypatch):
    """Nine in a row do not, ten do, with the step and its batch; resuming does not forget them."""
    monkeypatch.setattr(optim, "linear_cross_entropy", optim.linear_cross_entropy)
    train(tmp_path / "nine", num_steps=11, each_step=spoil(range(1, 10), []))
    message = r"step 10: .* not finite \(rows 0, 1.*, 10 in a row"
    with pytest.raises(SystemExit, match=message):
        train(tmp_path / "ten", num_steps=30, each_step=spoil(range(1, 30), []))
    train(tmp_path / "cut", num_steps=5, each_step=spoil(range(1, 30), []))
    with pytest.raises(SystemExit, match=message):
        train(tmp_path / "cut", num_steps=30, each_step=spoil(range(1, 30), []))


# ------------------------------------------------------------------------------- several processes


def worker_train(out):
    """Train as out/settings.json says."""
    settings = json.loads((out / "settings.json").read_text())
    dtype = getattr(torch, settings.pop("dtype"))
    train(out / "run", dtype=dtype, **settings)


def worker_nan(out):
    """Make the loss NaN on rank 1 only, in steps 2 and 3 and in ten from step 6 on."""
    rank, seen = int(os.environ["RANK"]), []
    spoil_step = spoil({2, 3, *range(6, 30)} if rank == 1 else {}, seen)

    def each_step(run, step):
        spoil_step(run, step)
        if step == 5:
            facts = {"kept": [same(seen[2], seen[3]), same(seen[3], seen[4])]}
            facts["moved"] = [not same(seen[1], seen[2]), not same(seen[4], seen[5])]
            (out / f"facts-{rank}.json").write_text(json.dumps(facts))

    train(out / "run", num_steps=30, each_step=each_step)


def worker_elastic(out):
    """Under torchrun: rank 1 is killed in the first life, rank 0 raises in the second."""
    life, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])

    def each_step(run, step):
        if (life, rank, step) == (0, 1, 1):
            kill_self()
        if (life, rank, step) == (1, 0, 2):
            raise ValueError("the second life ends here")

    train(out / "run", each_step=each_step)


def worker_killed(out):
    """Kill rank 1 while rank 0 goes on to the next collective."""

    def each_step(run, step):
        if step == 2 and run.dist.rank == 1:
            (out / "died").touch()
            kill_self()

    train(out / "run", each_step=each_step)


def raise_on_rank_1(out, module, name, *args):
    """Run a trainer whose function `name` raises on rank 1 in its third call."""
    import train_grpo
    import train_sft

    place = {"train_grpo": train_grpo, "PackedExamples": PackedExamples, "Block": Block}[module]
    real, calls = getattr(place, name), []

    def raising(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            (out / "died").touch()
            raise RuntimeError(f"{module}.{name} broke")
        return real(*args, **kwargs)

    setattr(place, name, raising)
    script = train_sft if module == "PackedExamples" else train_grpo
    sys.argv = [script.__name__, "--preset", "smoke", "--device", "cpu", "--threads", "1",
                "--init", str(out / "start"), "--run_dir", str(out / "run"), *args]  # fmt: skip
    script.main()


def worker_reward(out):
    raise_on_rank_1(out, "train_grpo", "judge", "--num_eval_problems", "4")


def worker_data(out):
    raise_on_rank_1(out, "PackedExamples", "batch", "--data", str(out / "sft.jsonl"))


def worker_model(out):
    raise_on_rank_1(out, "Block", "forward", "--num_eval_problems", "4")


def launch(worker, out, num_processes):
    return dist_tests.launch(worker, out, num_processes, file=__file__)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("worker", "message"),
    [
        ("reward", "train_grpo.judge broke"),
        ("data", "PackedExamples.batch broke"),
        ("model", "Block.forward broke"),
    ],
)
def test_a_rank_that_raises_ends_all(tmp_path, worker, message):
    """Wherever one rank raises, all end with status 1 and its message, in less than 30 s."""
    tokenizer = Tokenizer.train(["Numbers: 1 2 3\nTarget: 6\n<think>1+2=3</think>"] * 3, 280)
    cfg = ModelConfig(280, 1, 16, 2, 2, 16, max_context=64)
    alone, modules = dist.Dist(0, 0, 1, torch.device("cpu")), {"model": Transformer(cfg)}
    checkpoint.Checkpoints(tmp_path / "start", modules, None, tokenizer, alone).save(1, {})
    (tmp_path / "sft.jsonl").write_text('{"prompt": "1+1=", "solution": "2"}\n' * 9)
    (status_0, text_0), (status_1, text_1) = launch(worker, tmp_path, 2)
    assert time.time() - (tmp_path / "died").stat().st_mtime < 30
    assert (status_0, status_1) == (1, 1), (text_0, text_1)
    assert f"rank 1: RuntimeError: {message}" in text_0
    assert f"RuntimeError: {message}" in text_1


@pytest.mark.slow
def test_a_killed_rank_ends_all(tmp_path):
    """When a rank is killed the other one ends within 30 s, and the same command continues."""
    (status_0, text_0), (status_1, _) = launch("killed", tmp_path, 2)
    assert time.time() - (tmp_path / "died").stat().st_mtime < 30
    assert status_1 == -signal.SIGKILL and status_0 != 0, text_0
    (tmp_path / "settings.json").write_text(json.dumps({"num_steps": 4, "dtype": "float32"}))
    assert [status for status, _ in launch("train", tmp_path, 2)] == [0, 0]
    assert len(log.read_metrics(tmp_path / "run")) == NUM_STEPS


@pytest.mark.slow
def test_nan_on_one_rank_skips_the_step_on_all(tmp_path):
    """Weights and moments of both ranks stay to the last bit; ten in a row end both."""
    statuses = launch("nan", tmp_path, 2)
    assert [status for status, _ in statuses] == [1, 1]
    assert "step 15: the gradient is not finite (rows 0, 1, 2, 3, 4), 10 in a row" in str(statuses)
    for rank in (0, 1):
        facts = json.loads((tmp_path / f"facts-{rank}.json").read_text())
        assert facts == {"kept": [True, True], "moved": [True, True]}
    rows = log.read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if not row["stepped"]] == [2, 3, *range(6, 16)]
    assert all(row["skipped_rows"] == [*range(5)] for row in rows if not row["stepped"])


@pytest.mark.slow
def test_torchrun_restarts_resume_by_themselves(tmp_path):
    """A killed rank, then one that raises: torchrun starts all again, and the run ends at the bits
    of one that nothing disturbed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "--max-restarts=2", "--monitor-interval=0.2", __file__, "elastic", tmp_path],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the second life ends here" in done.stderr
    (tmp_path / "plain").mkdir()
    settings = {"num_steps": NUM_STEPS, "dtype": "float32"}
    (tmp_path / "plain" / "settings.json").write_text(json.dumps(settings))
    assert [status for status, _ in launch("train", tmp_path / "plain", 2)] == [0, 0]
    assert files_of(tmp_path / "run") == files_of(tmp_path / "plain" / "run")


# Rounding differs with the number of ranks, and AdamW divides a moment by the root of another: in
# fp32 the weights of 12 steps at lr 1e-2 agree to 3e-5 (1.2e-5 seen).
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 3e-5)])
def test_other_numbers_of_ranks_continue_a_run(tmp_path, dtype, bound):
    """Two ranks, then one, then four: the weights are those of one all the way, though rank 1 has
    a micro-batch without a trained token and one without a row."""
    for num_processes, num_steps in ((2, 4), (1, 8), (4, 12)):
        settings = {"num_steps": num_steps, "dtype": dtype, "micro_batch_size": 1}
        (tmp_path / "settings.json").write_text(json.dumps(settings))
        statuses = launch("train", tmp_path, num_processes)
        assert [status for status, _ in statuses] == [0] * num_processes, statuses
    train(tmp_path / "one", num_steps=12, dtype=getattr(torch, dtype))
    models = [load.load_model(tmp_path / name, device="cpu")[0] for name in ("run", "one")]
    pairs = zip(*(model.parameters() for model in models), strict=True)
    worst = max((left - right).abs().max().item() for left, right in pairs)
    assert worst < bound
    losses = [[row["loss"] for row in log.read_metrics(tmp_path / name)] for name in ("run", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=bound) and len(losses[0]) == 12


# ------------------------------------------------------------------------------- Slurm


def test_scripts_of_runs_parse():
    """bash reads every script under runs/."""
    scripts = sorted((ROOT / "runs").glob("*.sh"))
    assert len(scripts) >= 4
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("signalled", [True, False])
def test_the_slurm_script_saves_and_queues_again(tmp_path, signalled):
    """SIGUSR1 to the batch shell reaches the trainer, which exits 0, and the job is requeued; a
    run that ends by itself is not."""
    stubs = {
        "srun": 'shift; SLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"',
        "scancel": 'echo "$@" >> log; kill -USR1 "$(cat trainer.pid)"',
        "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> log; fi',
        "python": 'trap "echo saved >> log; exit 0" USR1; echo $$ > trainer.pid; echo "$@" >> log;'
        "echo $RANK $WORLD_SIZE $MASTER_ADDR >> log; for i in $(seq $WAIT); do sleep 0.1; done",
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    env |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n", "SLURM_NTASKS": "1"}
    env |= {"SLURM_NTASKS_PER_NODE": "1", "WAIT": "300" if signalled else "1"}
    shell = subprocess.Popen(["bash", ROOT / "runs" / "slurm.sh", "train.py", "--x"], env=env)
    if signalled:
        while not (tmp_path / "log").exists() or "localhost" not in (tmp_path / "log").read_text():
            time.sleep(0.05)
        shell.send_signal(signal.SIGUSR1)
    assert shell.wait(timeout=20) == 0
    end = ["--signal=USR1 17", "saved", "requeue 17"] if signalled else []
    assert (tmp_path / "log").read_text().splitlines() == ["train.py --x", "0 1 localhost", *end]


# ------------------------------------------------------------------------------- random kills


NUM_KILLS = 17  # of each trainer


def trainer_commands(folder):
    """Return [(script, argv)] of a short run of each trainer, on what this makes in folder."""
    import train_grpo
    import train_pretrain
    import train_sft

    pages = [{"text": "1+1=2, 1+2=3, 2+2=4, 3+3=6. " * 8} for _ in range(40)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))
    (folder / "sft.jsonl").write_text('{"prompt": "1+1=", "solution": "2"}\n' * 40)
    tokenizer = Tokenizer.train(["Numbers: 1 2 3\nTarget: 6\n<think>1+2=3</think>"] * 3, 280)
    tokenizer.save(folder / "tokenizer")
    cfg = ModelConfig(280, 1, 16, 2, 2, 16, max_context=64)
    alone, modules = dist.Dist(0, 0, 1, torch.device("cpu")), {"model": Transformer(cfg)}
    checkpoint.Checkpoints(folder / "start", modules, None, tokenizer, alone).save(1, {})
    common = ["--preset", "smoke", "--device", "cpu", "--threads", "1"]
    common += ["--checkpoint_interval", "1", "--num_steps", "12"]
    text = ["--corpus", folder / "corpus.jsonl", "--valid", folder / "corpus.jsonl"]
    pretrain = [*common, *text, "--tokenizer", folder / "tokenizer", "--context", "64"]
    start = [*common, "--init", folder / "start"]
    sft = [*start, "--data", folder / "sft.jsonl", "--context", "32", "--batch_size", "4"]
    grpo = [*start, "--max_new_tokens", "6", "--num_eval_problems", "4", "--num_problems", "40"]
    return [(train_pretrain, pretrain), (train_sft, sft), (train_grpo, grpo)]


def trainer_files(run_dir):
    files = {"samples.txt": (run_dir / "samples.txt").read_bytes()}
    files["metrics"] = [
        {k: v for k, v in row.items() if not any(fnmatch(k, name) for name in monitor.MEASURED)}
        for row in log.read_metrics(run_dir)
    ]
    newest = run_dir / "checkpoints" / "step-000012"
    return files | {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


@pytest.mark.soak
@pytest.mark.parametrize("number", range(3), ids=["pretrain", "sft", "grpo"])
def test_fifty_random_kills(tmp_path, number):
    """kill -9 at random times, the same command again, until it is done: final weights, moments,
    metrics and samples are those of a run that nothing disturbed."""
    script, argv = trainer_commands(tmp_path)[number]

    def start(run_dir):
        child = os.fork()
        if child == 0:
            try:
                sys.argv = [script.__name__, *map(str, argv), "--run_dir", str(run_dir)]
                sys.stdout = sys.stderr = open(os.devnull, "w")
                script.main()
                os._exit(0)
            finally:
                os._exit(1)
        return child

    started = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(start(tmp_path / "whole"), 0)[1]) == 0
    whole, duration = trainer_files(tmp_path / "whole"), time.monotonic() - started
    assert len(whole) > 3 and len(whole["metrics"]) == 12
    dice, num_kills, num_runs = random.Random(number), 0, 0
    while num_kills < NUM_KILLS:
        run_dir, status, num_runs = tmp_path / f"run-{num_runs}", None, num_runs + 1
        while status != 0:
            child = start(run_dir)
            if num_kills < NUM_KILLS:
                time.sleep(dice.uniform(0, duration / 3))
                os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status in (0, -signal.SIGKILL), status
            num_kills += status != 0
        assert trainer_files(run_dir) == whole
    print(f"{script.__name__}: {num_kills} kills in {num_runs} runs, each equal bit for bit")


if __name__ == "__main__":
    sys.modules["torch.utils.tensorboard"] = None
    globals()[f"worker_{sys.argv[1]}"](pathlib.Path(sys.argv[2]))
