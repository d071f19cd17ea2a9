"""Save and resume: everything a run needs, in files that are either whole or not believed.

    run_dir/checkpoints/latest      name of the newest folder, for people and scripts
    run_dir/checkpoints/step-000100/
        policy-00000.safetensors    rank 0's rows of module `policy`
        policy-00000.json           for each tensor the shape of the whole and the first row here
        optim-00000.safetensors     MODULE/NAME/exp_avg, .../exp_avg_sq, .../step
        optim-00000.json
        state.json                  step, data cursor, whatever a stage adds
        config.json                 the model's configuration
        tokenizer.json
        COMMIT                      size and sha256 of every file above

A folder is written under a temporary name, every file and the folder are fsynced, COMMIT is written
last, then the folder is renamed: a kill at any instant leaves the newest committed one loadable.
COMMIT covers every byte, itself included, so one flipped bit is found on loading and the checkpoint
before is used. Rows are global positions: another number of ranks concatenates and slices. Nothing
is pickled. Hyper-parameters of the optimizer are not state: they come from the run's configuration.

Left to others: what is state (train_*.py), cutting logs back on resume (log.py).
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanomath.dist import Dist, all_ok, broadcast_json, gather_json, local
from nanomath.model import ModelConfig, Transformer
from nanomath.tokenizer import Tokenizer

STEP_NAME = re.compile(r"step-(\d+)(?:\.old-(\d+))?")
OPTIM = "optim"
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class SaveFailed(OSError):
    """The disk refused a checkpoint. Older ones are untouched; training can go on and try again."""


class Damaged(ValueError):
    """A checkpoint folder is not what its COMMIT says."""


class Mismatch(ValueError):
    """A sound checkpoint of another model or optimizer."""


class RunInUse(ValueError):
    """Another trainer holds the run folder, or took it from this one."""


# ---------------------------------------------------------------------------- what is stored


def _module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return sharded weights and persistent buffers by name; a tied weight once, by first name."""
    tensors, seen = {}, set()
    for name, tensor in module.state_dict(keep_vars=True).items():  # FSDP2 reshards in here
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def _parameter_names(modules: dict[str, nn.Module], optimizer) -> dict[Tensor, str]:
    """Map the optimizer's parameters to MODULE/NAME, in the order of its groups."""
    names = {
        id(tensor): f"{key}/{name}"
        for key, module in modules.items()
        for name, tensor in _module_tensors(module).items()
    }
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(id(parameter) not in names for parameter in trained):
        raise ValueError("the optimizer holds a parameter of no module given to the checkpoint")
    return {parameter: names[id(parameter)] for parameter in trained}


def _optim_tensors(modules: dict[str, nn.Module], optimizer) -> dict[str, Tensor]:
    tensors = {}
    for parameter, name in _parameter_names(modules, optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def _first_row(num_rows: int, dist: Dist) -> int:
    """Return where this rank's rows begin: FSDP2 cuts like torch.chunk, the last ranks get less."""
    return min(num_rows, -(-num_rows // dist.world_size) * dist.rank)


def _my_rows(tensors: dict[str, Tensor], dist: Dist) -> tuple[dict[str, Tensor], dict]:
    """Return the rows that this rank writes and their places; rank 0 writes what is not sharded."""
    rows, places = {}, {}
    for name, tensor in tensors.items():
        mine, first = local(tensor).detach(), 0
        if isinstance(tensor, DTensor):
            first = _first_row(tensor.shape[0], dist)
        elif not dist.is_main:
            continue
        if mine.ndim == 0 or len(mine) or dist.is_main:
            rows[name] = mine
            places[name] = {"shape": list(tensor.shape), "offset": first}
    return rows, places


# ---------------------------------------------------------------------------- writing


class _Writer:
    """Write files into one folder, hashing what passes; each is fsynced when its call returns."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, dict] = {}  # name -> {bytes, sha256}, for COMMIT

    def blocks(self, name: str, blocks: Iterator[bytes | memoryview]) -> None:
        digest, size = hashlib.sha256(), 0
        with open(self.folder / name, "xb") as file:
            for block in blocks:
                file.write(block)
                digest.update(block)
                size += len(block)
            file.flush()
            os.fsync(file.fileno())
        self.files[name] = {"bytes": size, "sha256": digest.hexdigest()}

    def json(self, name: str, obj: object) -> None:
        self.blocks(name, [json.dumps(obj, allow_nan=False, indent=1).encode()])

    def existing(self, name: str) -> None:
        """Take in a file that someone else wrote."""
        with open(self.folder / name, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            self.files[name] = {"bytes": file.tell(), "sha256": digest}

    def tensors(self, stem: str, tensors: dict[str, Tensor], dist: Dist) -> None:
        """Write this rank's rows, one tensor in memory at a time, and their places."""
        rows, places = _my_rows(tensors, dist)
        stem = f"{stem}-{dist.rank:05d}"
        self.blocks(f"{stem}.safetensors", _safetensors(rows))
        self.json(f"{stem}.json", places)


def _safetensors(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file: length of header, header, values one after another."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        if tensor.numel():
            values = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
            yield memoryview(values.numpy())


def _commit_text(body: dict) -> bytes:
    """Return COMMIT's bytes: a JSON line and the sha256 of that line."""
    line = json.dumps(body, allow_nan=False, sort_keys=True)
    return f"{line}\n{hashlib.sha256(line.encode()).hexdigest()}\n".encode()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(
    run_dir: str | Path,
    step: int,
    *,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer | None,
    state: dict,
    model_cfg: ModelConfig | dict,
    tokenizer: Tokenizer | None,
    dist: Dist,
    keep: int = 2,
    lock: RunLock | None = None,
) -> Path:
    """Write checkpoint `step`, then delete all but the newest `keep`; every rank must call it.

    state: strict JSON, rank 0's is stored, with `step` added. An existing folder of this step is
    moved aside and deleted once the new one stands. With `lock`, refuse to write after the run
    folder was taken over. Raises SaveFailed on all ranks alike when any rank meets an OSError.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: at least one checkpoint must stay")
    if OPTIM in modules or any("-" in name for name in modules):
        raise ValueError(f"module names must not be {OPTIM!r} nor hold '-': {sorted(modules)}")
    if state.get("step", step) != step:
        raise ValueError(f"state says step {state['step']} but the checkpoint is of step {step}")
    json.dumps(state, allow_nan=False)  # fail on every rank, and before anything is written
    root = Path(run_dir) / "checkpoints"
    final = root / f"step-{step:06d}"
    if lock is not None:
        lock.check(dist)
    answers = _agree(lambda: _new_temporary(root, final.name), final, dist, main_only=True)
    temporary = Path(answers[0])

    def write() -> dict:
        writer = _Writer(temporary)
        for name, module in modules.items():
            writer.tensors(name, _module_tensors(module), dist)
        if optimizer is not None:
            writer.tensors(OPTIM, _optim_tensors(modules, optimizer), dist)
        if dist.is_main:
            writer.json("state.json", {**state, "step": step})
            is_dict = isinstance(model_cfg, dict)
            writer.json("config.json", model_cfg if is_dict else dataclasses.asdict(model_cfg))
            if tokenizer is not None:
                tokenizer.save(temporary)
                writer.existing("tokenizer.json")
        return writer.files

    try:
        parts = _agree(write, final, dist)
        files = {name: entry for part in parts for name, entry in part.items()}
        body = {"format": 1, "step": step, "world_size": dist.world_size, "files": files}
        _agree(lambda: _commit(temporary, final, body), final, dist, main_only=True)
    except SaveFailed:
        if dist.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if dist.is_main:
        try:
            _point_latest(final)
            _prune(root, final, keep)
        except OSError as error:  # the checkpoint itself stands
            _warn(f"{final} is saved, but tidying up beside it failed: {error}")
    return final


def _agree(action, final: Path, dist: Dist, main_only: bool = False) -> list:
    """Run action on every rank (or rank 0); return all results, or raise SaveFailed on all."""
    result, problem = None, None
    try:
        result = action() if dist.is_main or not main_only else None
    except OSError as error:
        problem = f"{type(error).__name__}: {error}"
    answers = gather_json([result, problem], dist)
    problems = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(answers) if text]
    if problems:
        raise SaveFailed(f"could not save {final}: {'; '.join(problems)}")
    return [result for result, _ in answers]


def _new_temporary(root: Path, name: str) -> str:
    root.mkdir(parents=True, exist_ok=True)
    _remove_temporaries(root)
    temporary = root / f".tmp-{name}-{os.getpid()}"
    temporary.mkdir()
    return str(temporary)


def _remove_temporaries(root: Path) -> None:
    for stale in root.glob(".tmp-*"):
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)


def _commit(temporary: Path, final: Path, body: dict) -> None:
    """Make the folder count: names on the disk, COMMIT, rename, names on the disk."""
    _sync_folder(temporary)
    _Writer(temporary).blocks("COMMIT", [_commit_text(body)])
    _sync_folder(temporary)
    if final.exists():
        number = 1 + max(aside for step, aside in _folders(final.parent) if step == body["step"])
        os.rename(final, final.with_name(f"{final.name}.old-{number}"))
    os.rename(temporary, final)
    _sync_folder(final.parent)


def _point_latest(final: Path) -> None:
    draft = final.parent / ".tmp-latest"
    with open(draft, "w") as file:
        file.write(f"{final.name}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, final.parent / "latest")
    _sync_folder(final.parent)


def _prune(root: Path, newest: Path, keep: int) -> None:
    """Delete what is older than the newest `keep` whole ones, and earlier versions of this step."""
    kept = 1
    for folder in _newest_first(root):
        if folder == newest:
            continue
        replaced = folder.name.startswith(f"{newest.name}.old-")
        if not replaced and kept < keep:
            # Damaged ones do not count among those to fall back on; sizes tell, hashing costs.
            kept += _damage(folder, hashes=False) is None
        else:
            doomed = folder.with_name(f".tmp-{folder.name}")
            os.rename(folder, doomed)  # a kill half-way through leaves no folder that looks damaged
            shutil.rmtree(doomed)


# ---------------------------------------------------------------------------- reading


def _folders(root: Path) -> dict[tuple[int, float], Path]:
    """Return the checkpoint folders by (step, version); the one not moved aside sorts last."""
    found = {}
    for path in root.iterdir() if root.is_dir() else ():
        match = STEP_NAME.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1]), -1 if match[2] is None else int(match[2])] = path
    return found


def _newest_first(root: Path) -> list[Path]:
    folders = _folders(root)
    return [folders[key] for key in sorted(folders, key=lambda k: (k[0], k[1] < 0, k[1]))][::-1]


def _read_commit(folder: Path) -> dict:
    """Return COMMIT's body; raise Damaged if it is not exactly what was written."""
    path = folder / "COMMIT"
    try:
        raw = path.read_bytes()
        body = json.loads(raw.split(b"\n")[0])
        if _commit_text(body) != raw:
            raise ValueError("its checksum does not match")
        if body["format"] != 1:
            raise ValueError(f"format {body['format']} is not known to this version")
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"{path}: {error}") from None
    return body


def _damage(folder: Path, *, hashes: bool = True, part: tuple[int, int] = (0, 1)) -> str | None:
    """Return what is wrong with a checkpoint folder, or None; part: this rank, number of ranks."""
    try:
        body = _read_commit(folder)
        for name in sorted(body["files"])[part[0] :: part[1]]:
            path, entry = folder / name, body["files"][name]
            if not path.is_file():
                return f"{path} is missing"
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{path} has {size:,} bytes instead of {entry['bytes']:,}"
            if hashes:
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                        return f"{path} does not match its checksum"
    except Damaged as error:
        return str(error)
    except OSError as error:
        return f"{folder}: {error}"
    return None


class _Rows:
    """The tensors of one module (or the optimizer) in a checkpoint, whatever ranks wrote them."""

    def __init__(self, folder: Path, stem: str):
        self.folder, self.stem = folder, stem
        self.shapes: dict[str, list[int]] = {}
        self.pieces: dict[str, list[tuple[int, Path]]] = {}  # name -> [(first row, file)]
        for places in sorted(folder.glob(f"{stem}-*.json")):
            for name, place in json.loads(places.read_text()).items():
                self.shapes[name] = place["shape"]
                file = places.with_suffix(".safetensors")
                self.pieces.setdefault(name, []).append((place["offset"], file))

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Return `count` rows from `first` on, concatenated from the files that hold them."""
        shape, parts = self.shapes[name], []
        last = first + (shape[0] if shape and count is None else count or 0)
        for offset, path in sorted(self.pieces[name]):
            with safe_open(path, framework="pt") as file:
                if not shape:
                    return file.get_tensor(name)
                rows = file.get_slice(name)
                begin, end = max(first - offset, 0), min(last - offset, rows.get_shape()[0])
                if begin < end or (begin == end and not parts):
                    parts.append(rows[begin:end])
        tensor = torch.cat(parts)
        if len(tensor) != last - first:
            raise Damaged(f"{self.folder}: {self.stem} holds not all rows of {name}")
        return tensor

    def read_like(self, name: str, like: Tensor, dist: Dist) -> Tensor:
        """Return this rank's rows of a tensor sharded as `like` is."""
        if not isinstance(like, DTensor):
            return self.read(name)
        return self.read(name, _first_row(like.shape[0], dist), len(local(like)))

    def check(self, wanted: dict[str, Tensor]) -> None:
        """Raise Mismatch unless names and shapes are those wanted."""
        for name in sorted(self.shapes.keys() | wanted.keys()):
            where = f"{self.folder}: {self.stem}/{name}"
            if name not in wanted:
                raise Mismatch(f"{where} is not part of this model; use the checkpoint's settings")
            if name not in self.shapes:
                raise Mismatch(f"{where} is missing; use the checkpoint's model settings")
            if self.shapes[name] != list(wanted[name].shape):
                raise Mismatch(
                    f"{where} has shape {self.shapes[name]} in the checkpoint but "
                    f"{list(wanted[name].shape)} in this model; use the model settings of the "
                    f"checkpoint, or another --run_dir"
                )


@torch.no_grad()
def load_latest(
    run_dir: str | Path,
    *,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer | None,
    dist: Dist,
) -> dict | None:
    """Restore modules and optimizer from the newest sound checkpoint and return its state.

    None if the run has none. Damaged ones are skipped with a warning that names file and reason;
    if all are, raises ValueError rather than train from the start. A checkpoint of another shape
    raises Mismatch. Any number of ranks may load what any other number saved; all must call it.
    """
    root = Path(run_dir) / "checkpoints"
    if dist.is_main:
        _remove_temporaries(root)
    names = broadcast_json([path.name for path in _newest_first(root)], dist)
    for name in names:
        folder = root / name
        answers = gather_json(_damage(folder, part=(dist.rank, dist.world_size)), dist)
        problem = next((answer for answer in answers if answer is not None), None)
        if problem is None:
            return _restore(folder, modules, optimizer, dist)
        if dist.is_main:
            _warn(f"checkpoint {folder} is damaged and skipped: {problem}")
    if names:
        raise ValueError(
            f"every checkpoint under {root} is damaged; move that folder away to start again"
        )
    return None


def _restore(folder: Path, modules: dict[str, nn.Module], optimizer, dist: Dist) -> dict:
    stored = {name: _Rows(folder, name) for name in modules}
    wanted = {name: _module_tensors(module) for name, module in modules.items()}
    for name, rows in stored.items():  # all checks before the first weight changes
        rows.check(wanted[name])
        _check_config(folder, name, modules[name])
    moments = _Rows(folder, OPTIM)
    if optimizer is not None:
        parameters = _parameter_names(modules, optimizer)
        _check_moments(moments, parameters)
    for name, rows in stored.items():
        for key, tensor in wanted[name].items():
            local(tensor).copy_(rows.read_like(key, tensor, dist))
    if optimizer is not None:
        optimizer.state.clear()
        for parameter, name in parameters.items():
            _restore_moments(optimizer, parameter, name, moments, dist)
    return json.loads((folder / "state.json").read_text())


def _check_config(folder: Path, name: str, module: nn.Module) -> None:
    """Raise Mismatch where shapes agree but the model does not, as with another number of heads."""
    if not dataclasses.is_dataclass(cfg := getattr(module, "cfg", None)):
        return
    stored = json.loads((folder / "config.json").read_text())
    for field, value in dataclasses.asdict(cfg).items():
        if field != "max_context" and stored.get(field, value) != value:
            raise Mismatch(
                f"{folder}: {name} was trained with {field} {stored[field]}, not {value}; use the "
                f"model settings of the checkpoint, or another --run_dir"
            )


def _check_moments(moments: _Rows, parameters: dict[Tensor, str]) -> None:
    shapes = {name: list(parameter.shape) for parameter, name in parameters.items()}
    for key, shape in moments.shapes.items():
        name = key.rpartition("/")[0]
        if name not in shapes or shape not in ([], shapes[name]):
            raise Mismatch(
                f"{moments.folder}: optimizer state {key} of shape {shape} fits no trained "
                f"parameter (shape {shapes.get(name)}); use the checkpoint's settings"
            )


def _restore_moments(optimizer, parameter, name: str, moments: _Rows, dist: Dist) -> None:
    """Rebuild one parameter's state as AdamW lays it out: moments like the parameter, a step."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    on_device = group.get("fused") or group.get("capturable")
    for key, shape in moments.shapes.items():
        if key.rpartition("/")[0] != name:
            continue
        if shape:
            value = torch.empty_like(parameter, requires_grad=False)
            rows = moments.read_like(key, parameter, dist)
            local(value).copy_(rows)
        else:
            value = moments.read(key).to(parameter.device if on_device else "cpu")
        optimizer.state[parameter][key.rpartition("/")[2]] = value


@torch.no_grad()
def load_model(
    path: str | Path,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    module: str | None = None,
    made_by: str = "bash speedrun.sh",
) -> tuple[Transformer, Tokenizer | None, dict]:
    """Build the model a checkpoint holds, unsharded, and its tokenizer; return them and the state.

    path: a run folder (its newest sound checkpoint), a checkpoints folder or one step folder.
    dtype: of the weights, None = as stored. module: which one, None = policy, model or the only
    one. made_by: the command named when there is none.
    """
    folder = _find(Path(path), made_by)
    names = {match[1] for name in _read_commit(folder)["files"] if (match := _module_file(name))}
    likely = [name for name in (module, "policy", "model") if name in names]
    if module is None and not likely and len(names) == 1:
        likely = list(names)
    if not likely or module not in (None, likely[0]):
        raise ValueError(f"{folder} holds no module {module or 'policy or model'}: {sorted(names)}")
    cfg = ModelConfig(**json.loads((folder / "config.json").read_text()))
    with torch.random.fork_rng([]), torch.device(device):
        model = Transformer(cfg)
    rows, wanted = _Rows(folder, likely[0]), _module_tensors(model)
    rows.check(wanted)
    for name, tensor in wanted.items():
        tensor.data = rows.read(name).to(device=device, dtype=dtype)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer = Tokenizer.load(folder) if has_tokenizer else None
    return model, tokenizer, json.loads((folder / "state.json").read_text())


def _module_file(name: str) -> re.Match | None:
    return re.fullmatch(rf"(?!{OPTIM}-)([^-]+)-\d+\.safetensors", name)


def _find(path: Path, made_by: str) -> Path:
    """Return the sound step folder that path means."""
    if STEP_NAME.fullmatch(path.resolve().name) and path.is_dir():
        if problem := _damage(path):
            raise Damaged(f"checkpoint {path} is damaged: {problem}")
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    folders = _newest_first(root)
    for folder in folders:
        if (problem := _damage(folder)) is None:
            return folder
        _warn(f"checkpoint {folder} is damaged and skipped: {problem}")
    if folders:
        raise Damaged(f"every checkpoint under {root} is damaged; make a new one: {made_by}")
    raise FileNotFoundError(f"no checkpoint under {path}; make one with: {made_by}")


def _warn(message: str) -> None:
    print(f"nanomath: warning: {message}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- one trainer a folder


class RunLock:
    """A held lock on a run folder (rank 0), or the knowledge that rank 0 holds it."""

    def __init__(self, path: Path):
        self.path = path
        self._handle: int | None = None

    def take(self) -> None:
        """Lock the file or raise RunInUse, naming folder and holder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        # A lock lives as long as any copy of its handle: workers forked from here must not keep it.
        os.register_at_fork(after_in_child=self._close)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._handle, 200, 0).decode(errors="replace").strip()
            self._close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise RunInUse(
                f"{self.path.parent} is in use by another trainer ({holder or 'pid unknown'}); "
                f"end that one first, or choose another --run_dir"
            ) from None
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def check(self, dist: Dist) -> None:
        """Raise RunInUse on every rank if the lock file is no longer the one locked here."""
        held = True
        if self._handle is not None:
            try:
                now, mine = os.stat(self.path), os.fstat(self._handle)
                held = (now.st_dev, now.st_ino) == (mine.st_dev, mine.st_ino)
            except OSError:
                held = False
        if not all_ok(held, dist):
            raise RunInUse(
                f"{self.path} was removed or replaced while this trainer ran; another one may be "
                f"writing to {self.path.parent}, so this one saves nothing more"
            )

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


@contextmanager
def run_lock(run_dir: str | Path, dist: Dist | None = None) -> Iterator[RunLock]:
    """Hold a run folder for one trainer; raise RunInUse on every rank if another one has it.

    The kernel drops the lock when the process ends, however it ends. Only rank 0 locks.
    """
    lock, problem = RunLock(Path(run_dir) / ".lock"), None
    if dist is None or dist.is_main:
        try:
            lock.take()
        except RunInUse as error:
            problem = str(error)
    if dist is not None:
        problem = broadcast_json(problem, dist)
    if problem is not None:
        raise RunInUse(problem)
    try:
        yield lock
    finally:
        lock._close()
