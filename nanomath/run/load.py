"""Open a model, whatever folder it is in: a run, one checkpoint, a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from nanomath.dist import Dist
from nanomath.hub.hf import load_hf
from nanomath.hub.weights import StoredTensors, empty_model, module_tensors
from nanomath.model import ModelConfig, Transformer
from nanomath.run.checkpoint import STEP_NAME, damage, newest_sound
from nanomath.text.tokenizer import Tokenizer


@torch.no_grad()
def load_model(
    path: str | Path,
    dist: Dist | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    **sharding: str,
) -> tuple[Transformer, Tokenizer | None, dict]:
    """Build the model that a folder holds and its tokenizer; return them and the run's state.

    path: a run folder (its newest sound checkpoint), a checkpoints folder, one step folder, or a
    Hugging Face folder (hf.py; its state is {}). dist: shard over its ranks, all of which must
    call, with the options `sharding` of `dist.shard`; None: the whole model on `device`. dtype: of
    the weights; None = as stored, fp32 from a Hugging Face folder.
    """
    dist = dist or Dist(0, 0, 1, torch.device(device))
    if is_hf_folder(path := Path(path)):
        return (*load_hf(path, dist, dtype=dtype or torch.float32, **sharding), {})
    folder = find_checkpoint(path, dist)
    stored = StoredTensors(folder, "model")
    dtype = dtype or stored.pieces["embedding.weight"][0][:0].dtype
    cfg = ModelConfig(**json.loads((folder / "config.json").read_text()))
    model = empty_model(cfg, dist, dtype, **sharding)
    wanted = module_tensors(model)
    stored.check(wanted)
    stored.restore(wanted, dist)
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    return model, tokenizer, json.loads((folder / "state.json").read_text())


def is_hf_folder(path: Path) -> bool:
    """Return True for a folder in Hugging Face's layout, even one that is damaged."""
    if (path / "COMMIT").exists():
        return False
    if any((path / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
        return True
    text = config.read_bytes() if (config := path / "config.json").is_file() else b""
    return b'"model_type"' in text or b'"architectures"' in text


def find_checkpoint(path: Path, dist: Dist) -> Path:
    """Return the sound step folder that path means."""
    if STEP_NAME.fullmatch(path.resolve().name) and path.is_dir():
        if problem := damage(path):
            raise ValueError(f"checkpoint {path} is damaged: {problem}")
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    folder = newest_sound(root, dist)
    if folder is None:
        found = "and no Hugging Face model" if path.is_dir() else "because that is not a folder"
        raise FileNotFoundError(
            f"no checkpoint under {path}, {found}; name the folder of a run or of a model, or make "
            "a run with: bash speedrun.sh"
        )
    return folder
