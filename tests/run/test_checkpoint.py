"""Checkpoints: what is saved comes back bit by bit, and what is damaged is never believed.

Kills at every moment of a save are tests/test_failures.py's.
Two-process checks run this file as a script (`worker_*`), see test_dist.py.
"""

import errno
import importlib.util
import json
import os
import pickletools
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nanomath import dist as nd
from nanomath.model import ModelConfig, Transformer
from nanomath.run import checkpoint as ck
from nanomath.run import guard as failures
from nanomath.run import load as load_module
from nanomath.run.guard import RunInUse, run_lock
from nanomath.text.tokenizer import Tokenizer

spec = importlib.util.spec_from_file_location(
    "dist_tests", Path(__file__).parents[1] / "nanomath" / "test_dist.py"
)
dist_tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dist_tests)
ALONE, CFG, full = dist_tests.ALONE, dist_tests.CFG, dist_tests.full


class Run:
    """A small trainer: policy, reference, AdamW, and a cursor as state."""

    def __init__(self, run_dir, dist=ALONE, cfg=CFG, seed=0, dtype=torch.float32):
        self.run_dir, self.dist, self.cfg, self.step = Path(run_dir), dist, cfg, 0
        self.modules = {}
        for name in ("model", "reference"):
            model = Transformer(cfg).to(dtype)
            model.init_weights(seed, std=0.2)
            self.modules[name] = nd.shard(model, dist)
        parameters = list(self.modules["model"].parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=0.01,
            fused=True,
        )

    def train(self, num_steps):
        model = self.modules["model"]
        for _ in range(num_steps):
            generator = torch.Generator().manual_seed(self.step)
            tokens = torch.randint(0, self.cfg.vocab_size, (4, 6), generator=generator)
            mine = tokens[self.dist.rank :: self.dist.world_size]
            (model(mine).square().sum() / 50).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1

    def checkpoints(self):
        return ck.Checkpoints(self.run_dir, self.modules, self.optimizer, None, self.dist)

    def save(self, keep=2):
        return self.checkpoints().save(self.step, {"cursor": self.step * 7, "note": "x"}, keep)

    def load(self):
        state = self.checkpoints().load_latest()
        self.step = 0 if state is None else state["step"]
        return state

    def tensors(self):
        """Return all weights and moments, whole, by name."""
        stored = self.checkpoints().tensors()
        return {f"{stem}/{k}": full(v) for stem, some in stored.items() for k, v in some.items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints 2 and 4, and at step 5."""
    run = Run(tmp_path)
    for _ in range(2):
        run.train(2)
        run.save()
    run.train(1)
    return run


def folder_of(run, step):
    return run.run_dir / "checkpoints" / f"step-{step:06d}"


def names(run):
    return names_in(run.run_dir)


def names_in(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# ---------------------------------------------------------------------------- resume


def test_resume_is_bit_exact(run):
    """Training 2N steps equals training N, loading into a fresh run, training N: every bit."""
    resumed = Run(run.run_dir, seed=3)
    assert resumed.load() == {"step": 4, "cursor": 28, "note": "x"}
    assert str(run.run_dir) not in Path("/proc/self/maps").read_text()  # pruned files free space
    resumed.train(3)
    run.train(2)
    assert len(run.tensors()) == 21 * 5  # weights of two models, two moments and a step of one
    assert_same(run.tensors(), resumed.tensors())
    reference = resumed.modules["reference"].embedding.weight
    assert not torch.equal(reference, resumed.modules["model"].embedding.weight)


def test_nothing_saved_is_none(tmp_path):
    """A run without checkpoints starts from the beginning, and its weights stay."""
    run = Run(tmp_path)
    before = run.tensors()
    assert run.load() is None
    assert_same(before, run.tensors())


def test_state_other_than_adamw_moments(tmp_path):
    """Weights of mixed types, buffers and an optimizer that has not stepped come back."""

    def build(value):
        module = nn.Module()
        module.narrow = nn.Parameter(torch.full((3, 2), value, dtype=torch.bfloat16))
        module.scalar = nn.Parameter(torch.tensor(value, dtype=torch.float64))
        module.register_buffer("count", torch.tensor([int(value)]))
        module.register_buffer("scratch", torch.tensor([value]), persistent=False)
        module.tied = module.narrow
        module.cfg = CFG
        return module, torch.optim.SGD(module.parameters(), momentum=0.5)

    module, optimizer = build(1.25)
    folder = ck.Checkpoints(tmp_path, {"m": module}, optimizer, None, ALONE).save(1, {})
    assert set(load_file(folder / "m-00000.safetensors")) == {"narrow", "scalar", "count"}
    again, other = build(7.5)
    ck.Checkpoints(tmp_path, {"m": again}, other, None, ALONE).load_latest()
    assert torch.equal(again.narrow, module.narrow) and torch.equal(again.scalar, module.scalar)
    assert again.count.item() == 1 and again.scratch.item() == 7.5
    assert not other.state


# ---------------------------------------------------------------------------- what is on the disk


def test_layout(run):
    """The folder holds what the docstring says, hashed, none of it a pickle."""
    folder = folder_of(run, 4)
    stems = ["optim-00000", "model-00000", "reference-00000"]
    files = {f"{stem}.safetensors" for stem in stems} | {"state.json", "config.json"}
    assert {path.name for path in folder.iterdir()} == files | {"COMMIT"}
    assert set(json.loads((folder / "COMMIT").read_text())) == files
    weights = load_file(folder / "model-00000.safetensors")
    assert weights["embedding.weight"].shape == (33, 12)
    for path in folder.iterdir():
        raw = path.read_bytes()
        assert not raw.startswith((b"\x80", b"PK", b"\x1f\x8b"))
        with pytest.raises(ValueError):
            list(pickletools.genops(raw))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_follow_the_umask(run, umask):
    """Whoever may read other new files may read all of a checkpoint, and nobody else may."""
    before = os.umask(umask)
    try:
        run.save()
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder_of(run, run.step).iterdir()}
    assert len(modes) == 6 and {*modes.values()} == {0o666 & ~umask}, modes


def test_newest_are_kept(run):
    """Only the newest `keep` stay; temporary folders of dead runs go."""
    (run.run_dir / "checkpoints" / ".tmp-step-000009-1").mkdir()
    for _ in range(3):
        run.train(1)
        run.save(keep=3)
    assert names(run) == ["step-000006", "step-000007", "step-000008"]
    run.train(1)
    run.save(keep=1)
    assert names(run) == ["step-000009"]


def test_a_name_is_never_used_twice(run):
    """Saving a step that stands already fails, and what stands stays."""
    run.step = 4
    with pytest.raises(ck.SaveFailed, match="step-000004.*not empty"):
        run.save()
    assert names(run) == ["step-000002", "step-000004"]
    assert run.load()["cursor"] == 28


def test_damaged_ones_do_not_count_as_kept(run):
    """A damaged checkpoint is set aside on resuming: an older sound one is kept to fall back on."""
    (folder_of(run, 4) / "state.json").unlink()
    assert run.load()["step"] == 2
    run.train(2)
    run.save(keep=2)
    assert names(run) == ["damaged-step-000004", "step-000002", "step-000004"]


# ---------------------------------------------------------------------------- damage


def flip(path, position):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1 << random.Random(position).randrange(8)
    path.write_bytes(raw)


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "first bit": lambda path: flip(path, 0),
    "middle bit": lambda path: flip(path, path.stat().st_size // 2),
    "last bit": lambda path: flip(path, path.stat().st_size - 1),
}
FILES = ["model-00000.safetensors", "optim-00000.safetensors", "state.json", "config.json"]
FILES += ["COMMIT"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, capsys, kind):
    """Any damage to any file is found, named with its file, and costs one interval, not the run."""
    run = Run(tmp_path)
    run.train(1)
    run.save()
    kept = run.tensors()
    run.train(1)
    sound = run.save()
    shutil.copytree(sound, tmp_path / "sound")
    for name in FILES:
        DAMAGE[kind](sound / name)
        resumed = Run(tmp_path, seed=1)
        assert resumed.load()["step"] == 1
        assert_same(kept, resumed.tensors())
        warning = capsys.readouterr().err
        assert warning.startswith(f"nanomath: warning: checkpoint {sound} is damaged")
        assert name in warning and len(warning.splitlines()) == 1
        assert sound.with_name("damaged-step-000002").is_dir() and not sound.exists()
        shutil.copytree(tmp_path / "sound", sound)
    assert resumed.load()["step"] == 2


def test_every_byte_of_commit_counts(run):
    """A flipped bit in any byte of COMMIT is seen."""
    path = folder_of(run, 4) / "COMMIT"
    raw = path.read_bytes()
    for position in range(len(raw)):
        flip(path, position)
        assert ck.damage(path.parent) is not None, position
        path.write_bytes(raw)
    assert ck.damage(path.parent) is None


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(run, monkeypatch):
    """Too many open files or no rights prove nothing: the error is raised, no folder renamed."""
    before = names(run)
    for number in (errno.EMFILE, errno.EACCES, errno.EIO):

        def fail(path, number=number):
            raise OSError(number, os.strerror(number), str(path))

        with monkeypatch.context() as patch:
            patch.setattr(ck, "file_sha256", fail)
            with pytest.raises(OSError, match=os.strerror(number)):
                run.load()
        assert names(run) == before
    assert run.load()["step"] == 4


def test_only_damaged_ones_is_an_error(run):
    """A run whose every checkpoint is damaged does not start again by itself."""
    for step in (2, 4):
        flip(folder_of(run, step) / "COMMIT", 5)
    for _ in range(2):
        with pytest.raises(ValueError, match="every checkpoint under .* is damaged"):
            run.load()


def test_another_shape_is_refused(run):
    """A checkpoint of another model names tensor, both shapes, and changes nothing."""
    other = Run(run.run_dir, cfg=ModelConfig(34, 2, 12, 2, 1, 20))
    before = other.tensors()
    message = r"model/embedding.weight has shape \[33, 12\] in the checkpoint but \[34, 12\]"
    with pytest.raises(ValueError, match=message):
        other.load()
    assert_same(before, other.tensors())
    for cfg, message in [
        (ModelConfig(33, 3, 12, 2, 1, 20), "model/blocks.2.* has shape none"),
        (ModelConfig(33, 1, 12, 2, 1, 20), "model/blocks.1.* but none in this model"),
        (ModelConfig(33, 2, 12, 6, 3, 20), "num_heads 2, not 6"),
    ]:
        with pytest.raises(ValueError, match=message):
            Run(run.run_dir, cfg=cfg).load()
    run.modules = {"model": run.modules["reference"]}
    run.optimizer = torch.optim.SGD(list(run.modules["model"].parameters())[1:])
    with pytest.raises(ValueError, match="optim/model/embedding.weight/.* belongs to no parameter"):
        run.load()


def test_state_must_be_strict_json(run):
    """What could not be loaded again is refused, and no checkpoint comes of it."""
    with pytest.raises(ValueError, match="JSON"):
        run.checkpoints().save(5, {"x": float("nan")})
    assert "step-000005" not in names(run)


# ---------------------------------------------------------------------------- bad disks and kills


def in_fork(action):
    """Run action in a forked process; return its exit status (negative: signal)."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_full_disk_fails_the_save_only(run):
    """When the disk refuses, SaveFailed is raised, older checkpoints and the run stay usable."""

    def full_disk():
        size = (folder_of(run, 4) / "model-00000.safetensors").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
        with pytest.raises(ck.SaveFailed, match=r"could not save .*step-000005: rank 0.*too large"):
            run.save()
        assert names(run) == ["step-000002", "step-000004"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        run.save()  # the next try, with room again
        assert names(run) == ["step-000004", "step-000005"]

    assert in_fork(full_disk) == 0
    assert Run(run.run_dir).load()["step"] == 5


@pytest.mark.parametrize("target", ["fsync", "rename", "mkdir"])
def test_io_errors_at_every_call(run, monkeypatch, target, capsys):
    """Wherever the disk says ENOSPC, a sound checkpoint remains and no temporary folder does."""
    real, newest, num_saved = getattr(os, target), 4, 0
    for failing_call in range(100):
        calls = []

        def faulty(*arguments, failing_call=failing_call, calls=calls, **options):
            calls.append(arguments)
            if len(calls) == failing_call + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)

        monkeypatch.setattr(os, target, faulty)
        try:
            run.save()
            newest, num_saved = run.step, num_saved + 1  # from here on, errors are warnings
        except ck.SaveFailed as error:
            assert "No space left on device" in str(error) and num_saved == 0
            assert not [name for name in names(run) if name.startswith(".tmp")]
        monkeypatch.setattr(os, target, real)
        assert Run(run.run_dir).load()["step"] in (newest, run.step)
        run.step += 1
        if len(calls) <= failing_call:
            break
    assert num_saved > 0
    assert failing_call >= {"fsync": 8, "rename": 2, "mkdir": 1}[target]


# ---------------------------------------------------------------------------- models for others


def test_load_model_from_every_kind_of_path(run, capsys):
    """A run folder, its checkpoints and one step give the model that was saved."""
    tokens = torch.arange(8).reshape(2, 4)
    run.load()
    expected = run.modules["model"](tokens)
    for path in (run.run_dir, str(run.run_dir / "checkpoints"), folder_of(run, 4)):
        model, tokenizer, state = load_module.load_model(path, device="cpu")
        assert torch.equal(model(tokens), expected)
        assert tokenizer is None and state["step"] == 4 and model.cfg == CFG
    wide = load_module.load_model(run.run_dir, device="cpu", dtype=torch.float64)[0]
    torch.testing.assert_close(wide(tokens), expected.double(), rtol=1e-4, atol=1e-5)
    flip(folder_of(run, 4) / "model-00000.safetensors", 5000)
    assert load_module.load_model(run.run_dir, device="cpu")[2]["step"] == 2
    assert "step-000004 is damaged" in capsys.readouterr().err


def test_load_model_says_what_is_wrong(run, tmp_path):
    """No checkpoint names the command that makes one; damage is named."""
    (tmp_path / "empty").mkdir()
    for name, found in (("nowhere", "is not a folder"), ("empty", "and no Hugging Face model")):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint under .*{found}; .*: bash"):
            load_module.load_model(tmp_path / name, device="cpu")
    flip(folder_of(run, 4) / "COMMIT", 9)
    with pytest.raises(ValueError, match="step-000004 is damaged: .*COMMIT"):
        load_module.load_model(folder_of(run, 4), device="cpu")


def test_tied_model_and_tokenizer(tmp_path):
    """A tied head is stored once and stays tied; the tokenizer travels with the model."""
    cfg = ModelConfig(300, 1, 8, 2, 2, 12, tied_head=True)
    tokenizer = Tokenizer.train(["12 + 30 = 42"] * 3, 300)
    model = Transformer(cfg)
    model.init_weights(0)
    folder = ck.Checkpoints(tmp_path, {"model": model}, None, tokenizer, ALONE).save(1, {})
    assert "head.weight" not in load_file(folder / "model-00000.safetensors")
    loaded, again, _ = load_module.load_model(tmp_path, device="cpu")
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(loaded.head.weight, model.embedding.weight)
    assert again.encode("3 + 4 = 7") == tokenizer.encode("3 + 4 = 7")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        flip(folder / name, 30)
        with pytest.raises(ValueError, match=f"{name} does not match"):
            load_module.load_model(folder, device="cpu")
        flip(folder / name, 30)


# ---------------------------------------------------------------------------- one trainer a folder


def test_second_trainer_is_refused(tmp_path):
    """A held folder is refused with folder and pid; free once the holder ends, even by kill."""
    with run_lock(tmp_path / "run") as lock:
        lock.check(ALONE)
        message = f"run is in use .*pid {os.getpid()} on"
        with pytest.raises(RunInUse, match=message), run_lock(tmp_path / "run", ALONE):
            pass

        def second_process():
            with pytest.raises(RunInUse), run_lock(tmp_path / "run"):
                pass

        assert in_fork(second_process) == 0
    with run_lock(tmp_path / "run"):
        pass

    def killed():
        with run_lock(tmp_path / "run"):
            if os.fork() == 0:  # a worker that outlives its trainer must not keep the folder
                time.sleep(5)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_fork(killed) == -signal.SIGKILL
    with run_lock(tmp_path / "run"):
        pass


def test_stolen_lock_stops_saving(run):
    """A trainer whose lock file was removed, and taken by another, is told so before it saves."""
    with run_lock(run.run_dir) as lock:
        lock.check(ALONE)
        (run.run_dir / ".lock").unlink()
        with run_lock(run.run_dir), pytest.raises(RunInUse, match="removed or replaced"):
            lock.check(ALONE)


# ---------------------------------------------------------------------------- two processes


def worker_reshard(out):
    """Continue what one process saved, save from two, fail a save on rank 1, share the lock."""
    dist = nd.setup("cpu", 1, timeout_s=60)
    with failures.raise_together(dist):
        facts = {}
        run = Run(out / "one", dist, seed=5, dtype=torch.float64)
        facts["state"] = run.load()
        loaded = run.tensors()
        run.run_dir = out / "two"
        with run_lock(run.run_dir, dist) as lock:
            lock.check(dist)
            run.save()
            run.train(2)
            real = os.fsync
            if dist.rank == 1:
                os.fsync = lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
            try:
                run.save()
            except ck.SaveFailed as error:
                facts["failed"] = str(error)
            os.fsync = real
            nd.barrier(dist)
            facts["after_failure"] = names(run)
            nd.barrier(dist)  # both have looked
            run.save()
            other = nd.Dist(0, 0, 1, dist.device)
            try:
                run_lock(run.run_dir, other).__enter__()
            except RunInUse as error:
                facts["in_use"] = str(error)
            nd.barrier(dist)  # rank 0 holds the lock until both have tried
        trained = run.tensors()
        if dist.is_main:
            save_file(loaded, out / "loaded.safetensors")
            save_file(trained, out / "trained.safetensors")
            path = out / "two" / "checkpoints" / f"step-{run.step:06d}" / "model-00001.safetensors"
            shutil.copytree(out / "two", out / "damaged")
            flip(out / "damaged" / path.relative_to(out / "two"), 3000)
        nd.barrier(dist)
        run.run_dir = out / "damaged"
        facts["fallback"] = run.load()["step"]
        (out / f"facts-{dist.rank}.json").write_text(json.dumps(facts))
        raise SystemExit(0)  # as after an agreed stop: cleans up like the end of a run


def test_reshard_one_to_two_to_one(tmp_path):
    """Two ranks load what one saved, one loads what two saved: bit by bit; failures are shared."""
    one = Run(tmp_path / "one", dtype=torch.float64)
    one.train(2)
    one.save()
    statuses = dist_tests.launch("reshard", tmp_path, 2, file=__file__)
    assert [status for status, _ in statuses] == [0, 0], statuses
    assert_same(one.tensors(), load_file(tmp_path / "loaded.safetensors"))

    back = Run(tmp_path / "two", seed=7, dtype=torch.float64)
    assert back.load()["step"] == 4
    assert_same(back.tensors(), load_file(tmp_path / "trained.safetensors"))
    one.train(2)
    for name, tensor in back.tensors().items():
        torch.testing.assert_close(tensor, one.tensors()[name], rtol=1e-10, atol=1e-10)

    folder = folder_of(back, 4)
    parts = [load_file(folder / f"model-0000{rank}.safetensors") for rank in (0, 1)]
    assert [len(part["embedding.weight"]) for part in parts] == [17, 16]
    for rank in (0, 1):
        facts = json.loads((tmp_path / f"facts-{rank}.json").read_text())
        assert facts["state"] == {"step": 2, "cursor": 14, "note": "x"}
        assert "rank 1: OSError: [Errno 28] full" in facts["failed"]
        assert facts["after_failure"] == ["step-000002"]
        assert "in use by another trainer" in facts["in_use"]
        assert facts["fallback"] == 2
    assert "damaged-step-000004" in names_in(tmp_path / "damaged")
    assert "model-00001.safetensors does not match its checksum" in statuses[0][1]


if __name__ == "__main__":
    globals()[f"worker_{sys.argv[1]}"](Path(sys.argv[2]))
