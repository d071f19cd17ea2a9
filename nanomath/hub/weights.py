"""Weights on disk: the rows of a sharded tensor in safetensors files, read and written."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanomath.dist import Dist, local, shard
from nanomath.model import ModelConfig, Transformer


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return sharded weights and persistent buffers by name; a tied weight once, by first name."""
    tensors, seen = {}, set()
    for name, tensor in module.state_dict(keep_vars=True).items():  # FSDP2 reshards in here
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


class StoredTensors:
    """The tensors of one module (or the optimizer) in a checkpoint, whatever ranks wrote them."""

    def __init__(self, folder: Path, stem: str):
        self.where = f"{folder}: {stem}"
        self.pieces: dict[str, list] = {}  # name -> its rows in the order of ranks, not read yet
        for path in sorted(folder.glob(f"{stem}-*.safetensors")):
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 (not a dict)
                self.pieces.setdefault(name, []).append(file.get_slice(name))

    def shape(self, name: str) -> list[int]:
        shapes = [piece.get_shape() for piece in self.pieces[name]]
        return shapes[0] and [sum(shape[0] for shape in shapes), *shapes[0][1:]]

    def read(self, name: str, like: Tensor, dist: Dist) -> Tensor:
        """Return the rows that this rank holds of a tensor sharded as `like` is."""
        return read_rows(self.pieces[name], like, dist)

    def restore(self, tensors: dict[str, Tensor], dist: Dist) -> None:
        """Copy this rank's rows into tensors of these names, which `check` has seen."""
        for name, tensor in tensors.items():
            local(tensor).copy_(self.read(name, tensor, dist))

    def check(self, wanted: dict[str, Tensor]) -> None:
        """Raise ValueError unless names and shapes are those wanted."""
        for name in sorted(self.pieces.keys() | wanted.keys()):
            stored = self.shape(name) if name in self.pieces else "none"
            here = list(wanted[name].shape) if name in wanted else "none"
            if stored != here:
                raise ValueError(
                    f"{self.where}/{name} has shape {stored} in the checkpoint but {here} in this "
                    f"model; use the model settings of the checkpoint, or another --run_dir"
                )


def read_rows(pieces: list, like: Tensor, dist: Dist) -> Tensor:
    """Return this rank's rows of a tensor sharded as `like` is, from its slices in files."""
    if not pieces[0].get_shape():
        return pieces[0][...].clone()  # a view would keep the whole file mapped
    first, count = 0, len(local(like))
    if isinstance(like, DTensor):  # FSDP2 cuts like torch.chunk, the last ranks get less
        first = min(len(like), -(-len(like) // dist.world_size) * dist.rank)
    parts = []
    for piece in pieces:
        parts.append(piece[max(first, 0) : max(first + count, 0)])
        first -= piece.get_shape()[0]
    return torch.cat(parts)


def write_tensors(tensors: dict[str, Tensor], path: Path, **options) -> None:
    """Write a safetensors file that whoever may read the files beside it may read, too."""
    path.touch()
    mode = path.stat().st_mode  # what the umask leaves; save_file makes a file of its owner's alone
    save_file(tensors, path, **options)
    if path.stat().st_mode != mode:  # some file systems have one mode, and refuse to be asked
        path.chmod(mode)


def empty_model(cfg: ModelConfig, dist: Dist, dtype: torch.dtype, **sharding: str) -> Transformer:
    """Build a model on dist's device, sharded over its ranks, whose weights hold no values yet.

    No rank ever holds more than its own rows. sharding: options of `dist.shard`.
    """
    with torch.device("meta"):
        model = Transformer(cfg).to(dtype)
    if dist.mesh is None:
        model.to_empty(device=dist.device)
    model = shard(model, dist, **sharding)
    if dist.mesh is not None:
        model.to_empty(device=dist.device)
    if cfg.tied_head:
        model.head.weight = model.embedding.weight  # to_empty made two of one
    return model
