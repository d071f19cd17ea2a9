"""Save and resume: everything a run needs, in files that are either whole or not believed.

    run_dir/checkpoints/step-000100/
        policy-00000.safetensors    rank 0's rows of module `policy`
        policy-00001.safetensors    the rows after them, from rank 1
        optim-00000.safetensors     MODULE/NAME/exp_avg, .../exp_avg_sq, .../step
        state.json                  step, data cursor, whatever a stage adds
        config.json                 the model's configuration
        tokenizer.json, tokenizer_config.json
        COMMIT                      sha256 of every file above

A folder is written under a temporary name, every file and the folder are fsynced, COMMIT is written
last, then the folder gets its name: a kill at any instant leaves the newest whole checkpoint
loadable. COMMIT covers every byte, so one flipped bit is found when a run resumes: that folder is
set aside as damaged-step-000100 and the checkpoint before it is used. A weight is the rows of all
files in the order of ranks, so another number of ranks concatenates and slices. Nothing is pickled.
Hyper-parameters of the optimizer are not state: they come from the run's configuration.

Left to others: what is state (train_*.py), cutting logs back on resume (log.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanomath.base.files import file_sha256, fsync
from nanomath.dist import Dist, broadcast_json, gather_json, local
from nanomath.hub.weights import StoredTensors, module_tensors, write_tensors
from nanomath.text.tokenizer import Tokenizer

STEP_NAME = re.compile(r"step-\d+")
OPTIM = "optim"


class SaveFailed(OSError):
    """The disk refused a checkpoint. Older ones are untouched; training can go on and try again."""


@dataclass
class Checkpoints:
    """The checkpoints of a run, and what they are made of."""

    run_dir: str | Path
    modules: dict[str, nn.Module]  # each under a name without "-"
    optimizer: torch.optim.Optimizer | None
    tokenizer: Tokenizer | None
    dist: Dist

    @property
    def root(self) -> Path:
        return Path(self.run_dir) / "checkpoints"

    # ------------------------------------------------------------------------ what is stored

    def trained(self) -> dict[str, Tensor]:
        """Return the optimizer's parameters as MODULE/NAME, in the order of its groups."""
        names = {
            id(tensor): f"{key}/{name}"
            for key, module in self.modules.items()
            for name, tensor in module_tensors(module).items()
        }
        groups = self.optimizer.param_groups
        return {
            names[id(parameter)]: parameter for group in groups for parameter in group["params"]
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all that is stored, by module: weights, buffers, the optimizer's moments."""
        stored = {name: module_tensors(module) for name, module in self.modules.items()}
        if self.optimizer is not None:
            stored[OPTIM] = {
                f"{name}/{key}": value
                for name, parameter in self.trained().items()
                for key, value in self.optimizer.state.get(parameter, {}).items()
            }
        return stored

    # ------------------------------------------------------------------------ writing

    def save(self, step: int, state: dict, keep: int = 2) -> Path:
        """Write checkpoint `step`, then delete all but the newest `keep`; every rank must call it.

        state: strict JSON, rank 0's is stored, with `step` added. Raises SaveFailed on all ranks
        alike when the disk refuses any.
        """
        final, temporary = (self.root / f"{kind}step-{step:06d}" for kind in ("", ".tmp-"))
        try:
            agree(lambda: temporary.mkdir(parents=True), self.dist, main_only=True)
            hashes = agree(lambda: self._write(temporary, {**state, "step": step}), self.dist)
            agree(lambda: _commit(temporary, final, hashes), self.dist, main_only=True)
        except SaveFailed as error:
            if self.dist.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise SaveFailed(f"could not save {final}: {error}") from None
        if self.dist.is_main:
            _tidy(self.root, keep)
        return final

    def _write(self, folder: Path, state: dict) -> dict[str, str]:
        """Write this rank's files; return their hashes. What is not sharded is rank 0's."""
        for stem, tensors in self.tensors().items():
            mine = {
                name: local(tensor).detach().contiguous()
                for name, tensor in tensors.items()
                if self.dist.is_main or isinstance(tensor, DTensor)
            }
            write_tensors(mine, folder / f"{stem}-{self.dist.rank:05d}.safetensors")
        if self.dist.is_main:
            model_cfg = next(iter(self.modules.values())).cfg
            _write_json(folder / "state.json", state)
            _write_json(folder / "config.json", dataclasses.asdict(model_cfg))
            if self.tokenizer is not None:
                self.tokenizer.save(folder)
        kinds = [f"*-{self.dist.rank:05d}.safetensors", *(["*.json"] if self.dist.is_main else [])]
        files = [path for kind in kinds for path in folder.glob(kind)]
        for path in files:
            fsync(path)
        return {path.name: file_sha256(path) for path in files}

    # ------------------------------------------------------------------------ reading

    @torch.no_grad()
    def load_latest(self) -> dict | None:
        """Restore modules and optimizer from the newest sound checkpoint and return its state.

        None if the run has none. Damaged ones are set aside with a warning that names file and
        reason; if all are, or if the checkpoint is of another shape, raises ValueError before any
        weight changes. Any number of ranks may load what any other number saved; all must call it.
        """
        if self.dist.is_main:
            _tidy(self.root)
        folder = newest_sound(self.root, self.dist, set_aside=True)
        if folder is None:
            return None
        stored = {name: StoredTensors(folder, name) for name in self.modules}
        wanted = {name: module_tensors(module) for name, module in self.modules.items()}
        for name, module in self.modules.items():
            stored[name].check(wanted[name])
            _check_config(folder, name, module)
        if self.optimizer is not None:
            self._restore_optimizer(StoredTensors(folder, OPTIM))
        for name, tensors in wanted.items():
            stored[name].restore(tensors, self.dist)
        return json.loads((folder / "state.json").read_text())

    def _restore_optimizer(self, moments: StoredTensors) -> None:
        """Put back moments, sharded like their parameters, and step counts."""
        trained = self.trained()
        state = {name: {} for name in trained}
        for key in moments.pieces:
            name, _, kind = key.rpartition("/")
            if name not in trained:
                raise ValueError(
                    f"{moments.where}/{key} belongs to no parameter that is trained here"
                )
            value = moments.read(key, trained[name], self.dist)
            if value.ndim:
                rows, value = value, torch.empty_like(trained[name], requires_grad=False)
                local(value).copy_(rows)
            state[name][kind] = value
        numbered = {number: values for number, values in enumerate(state.values()) if values}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": numbered})


def agree(action: Callable, dist: Dist, main_only: bool = False) -> list:
    """Run action on every rank (or rank 0); return all results.

    Raises SaveFailed on all ranks alike, with every message, where the disk refused it on any.
    """
    result = problem = None
    try:
        if dist.is_main or not main_only:
            result = action()
    except (OSError, SafetensorError) as error:
        problem = f"rank {dist.rank}: {type(error).__name__}: {error}"
    answers = gather_json([result, problem], dist)
    problems = [problem for _, problem in answers if problem is not None]
    if problems:
        raise SaveFailed("; ".join(problems))
    return [result for result, _ in answers]


def _write_json(path: Path, obj: object) -> None:
    path.write_text(json.dumps(obj, allow_nan=False, indent=1))


def _commit(temporary: Path, final: Path, hashes: list[dict[str, str]]) -> None:
    """Make the folder count: COMMIT, names on the disk, rename, names on the disk."""
    _write_json(temporary / "COMMIT", {name: sha for part in hashes for name, sha in part.items()})
    fsync(temporary / "COMMIT")
    fsync(temporary)
    os.rename(temporary, final)
    fsync(final.parent)


def _tidy(root: Path, keep: int = sys.maxsize) -> None:
    """Delete all but the newest `keep`, and what killed runs left."""
    try:
        for stale in root.glob(".tmp-*"):
            shutil.rmtree(stale)
        for folder in _newest_first(root)[keep:]:
            doomed = folder.with_name(f".tmp-{folder.name}")
            os.rename(folder, doomed)  # a kill half-way through leaves no folder that looks damaged
            shutil.rmtree(doomed)
    except OSError as error:  # the newest checkpoint stands
        _warn(f"could not delete all that is not needed any more under {root}: {error}")


def _newest_first(root: Path) -> list[Path]:
    folders = [path for path in root.glob("step-*") if STEP_NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest_name(run_dir: str | Path) -> str | None:
    """Return the name of a run's newest checkpoint, unread; None if it has none."""
    return next((path.name for path in _newest_first(Path(run_dir) / "checkpoints")), None)


def damage(folder: Path, part: slice = slice(None)) -> str | None:
    """Return what is wrong with (this rank's part of) the files of a checkpoint, or None.

    A file that is there and cannot be read (no rights, a disk or network error) proves nothing
    about the checkpoint: that OSError is the caller's.
    """
    path = folder / "COMMIT"
    try:
        hashes = json.loads(path.read_bytes())
        for name in sorted(hashes)[part]:
            path = folder / name
            if file_sha256(path) != hashes[name]:
                return f"{path} does not match its checksum in COMMIT"
    except (FileNotFoundError, ValueError) as error:
        return f"{path}: {error}"
    return None


def newest_sound(root: Path, dist: Dist, set_aside: bool = False) -> Path | None:
    """Return the newest whole checkpoint, None if there is none; warn about those passed over.

    set_aside: also rename those, so that they no longer count. Raises ValueError if all are
    damaged, rather than let a run train from the start.
    """
    names = broadcast_json([path.name for path in _newest_first(root)], dist)
    for name in names:
        folder = root / name
        answers = gather_json(damage(folder, slice(dist.rank, None, dist.world_size)), dist)
        problems = [problem for problem in answers if problem is not None]
        if not problems:
            return folder
        if dist.is_main:
            renamed = f", and renamed damaged-{name}" if set_aside else ""
            _warn(f"checkpoint {folder} is damaged and skipped{renamed}: {problems[0]}")
            if set_aside:
                shutil.rmtree(root / f"damaged-{name}", ignore_errors=True)
                os.rename(folder, root / f"damaged-{name}")
    if names or any(root.glob("damaged-*")):
        raise ValueError(
            f"every checkpoint under {root} is damaged; move that folder away to start again"
        )
    return None


def _check_config(folder: Path, name: str, module: nn.Module) -> None:
    """Raise ValueError where only shapes agree, as with another number of heads."""
    stored = json.loads((folder / "config.json").read_text())
    for field, value in dataclasses.asdict(module.cfg).items():
        if field != "max_context" and stored.get(field, value) != value:
            raise ValueError(
                f"{folder}: {name} was trained with {field} {stored[field]}, not {value}; use the "
                f"model settings of the checkpoint, or another --run_dir"
            )


def _warn(message: str) -> None:
    print(f"nanomath: warning: {message}", file=sys.stderr, flush=True)
