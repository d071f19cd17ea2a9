"""Hugging Face folders, in and out: Llama, DeepSeek in Llama's layout, Qwen2 / 2.5, Qwen3 dense.

    model, tokenizer = load_hf("models/deepseek-math-7b-base")

Every command that takes a checkpoint takes such a folder too (run/load.py). Reading is
exact or refused: every tensor is used once, and a setting that `model.py` does not have is an error
that names file and field, raised before any weight is read. Files of code (.py) and pickles (.bin)
are never opened. Weights stream tensor by tensor, each rank reads only its own rows.

Left to others: what config.json means (hf_config.py), tokenizer files with their chat template
(tokenizer.py).
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanomath.base.files import fsync, read_json, write_json
from nanomath.dist import Dist, barrier, local
from nanomath.hub.hf_config import make_config, read_config
from nanomath.hub.weights import empty_model, module_tensors, read_rows, write_tensors
from nanomath.model import Transformer
from nanomath.text.tokenizer import Tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


# ---------------------------------------------------------------------------- weights


def llama_name(name: str) -> str:
    """Return what Hugging Face's Llama, Qwen2 and Qwen3 call the parameter `name` of model.py."""
    for ours, theirs in (
        ("embedding.", "model.embed_tokens."),
        ("final_norm.", "model.norm."),
        ("head.", "lm_head."),
        ("blocks.", "model.layers."),
        ("attention_norm.", "input_layernorm."),
        ("ffn_norm.", "post_attention_layernorm."),
        ("attention.", "self_attn."),
        ("ffn.", "mlp."),
    ):
        name = name.replace(ours, theirs)
    return name


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that a folder names."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} holds neither {SINGLE} nor {INDEX}; pickled weights (.bin, .pt) are never "
            "read: save them again as safetensors"
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{folder / INDEX}: weight_map is missing, or no object")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(
                f"{folder / INDEX}: weight_map sends {tensor} to {name!r}; only the plain name "
                "of a .safetensors file beside it is followed"
            )
    return [folder / name for name in sorted({*weight_map.values()})]


def _open_weights(folder: Path) -> dict[str, tuple[Path, object]]:
    """Return file and slice, not read yet, of every tensor in the folder's safetensors files."""
    found = {}
    for path in _weight_files(folder):
        try:
            file = safe_open(path, framework="pt")
            pieces = {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
        for tensor, piece in pieces.items():
            if tensor in found:
                raise ValueError(f"{path}: tensor {tensor} is also in {found[tensor][0].name}")
            if piece.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(f"{path}: tensor {tensor} is of type {piece.get_dtype()}")
            found[tensor] = path, piece
    return found


def _match(folder: Path, found: dict[str, tuple[Path, object]], wanted: dict[str, Tensor]) -> None:
    """Drop what is no weight; raise ValueError unless names and shapes are those wanted."""
    for tensor in [name for name in found if name.endswith("rotary_emb.inv_freq")]:
        del found[tensor]  # computed from rope_theta; old files hold it
    for tensor in sorted(found.keys() | wanted.keys()):
        if tensor not in found:
            raise ValueError(f"{folder}: tensor {tensor} is missing, which config.json asks for")
        path, piece = found[tensor]
        if tensor not in wanted:
            raise ValueError(f"{path}: tensor {tensor} has no place in the model of config.json")
        stored, here = piece.get_shape(), list(wanted[tensor].shape)
        if stored != here:
            raise ValueError(f"{path}: tensor {tensor} has shape {stored}, config.json asks {here}")


@torch.no_grad()
def load_hf(
    folder: str | Path,
    dist: Dist | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **sharding: str,
) -> tuple[Transformer, Tokenizer | None]:
    """Build the model in a Hugging Face folder and its tokenizer, None if it has no tokenizer.json.

    dist: shard over its ranks, all of which must call, with the options `sharding` of
    `dist.shard`; None: the whole model on `device`. dtype: of the weights, whatever the files'.
    A tied model may bring its head too, if it is the embedding bit by bit. Raises FileNotFoundError
    or ValueError, naming file and field, before any weight is copied.
    """
    folder = Path(folder)
    dist = dist or Dist(0, 0, 1, torch.device(device))
    cfg = read_config(folder / "config.json")
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    if tokenizer is not None and tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"{folder / 'tokenizer.json'} has ids up to {tokenizer.vocab_size - 1}, but the "
            f"vocab_size of config.json is {cfg.vocab_size}"
        )
    found = _open_weights(folder)
    stored = sum(math.prod(piece.get_shape()) for _, piece in found.values())
    if cfg.num_parameters > 4 * stored:  # before building: a wrong number could take all memory
        raise ValueError(
            f"{folder / 'config.json'} asks for {cfg.num_parameters:.4g} parameters, the files "
            f"hold {stored:.4g}"
        )
    model = empty_model(cfg, dist, dtype, **sharding)
    wanted = {llama_name(name): tensor for name, tensor in module_tensors(model).items()}
    head = found.pop("lm_head.weight", None) if cfg.tied_head else None
    _match(folder, found, wanted)
    if head is not None:
        embedding, like = found["model.embed_tokens.weight"][1], model.embedding.weight
        if head[1].get_shape() != embedding.get_shape() or not torch.equal(
            read_rows([head[1]], like, dist), read_rows([embedding], like, dist)
        ):
            raise ValueError(
                f"{head[0]}: tensor lm_head.weight is not model.embed_tokens.weight, though "
                "config.json says tie_word_embeddings"
            )
    for name, tensor in wanted.items():  # a file is closed when its last tensor is taken out
        local(tensor).copy_(read_rows([found.pop(name)[1]], tensor, dist))
    return model, tokenizer


@torch.no_grad()
def save_hf(
    model: Transformer,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    dist: Dist | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Write a folder that transformers and vLLM load; it appears whole or not at all.

    dtype: bf16, what published weights come in, takes half the room; float32 keeps every bit.
    dist: of a sharded model, all of whose ranks must call; one tensor at a time is gathered, rank 0
    writes. Raises FileExistsError, or ValueError for a shape that no known architecture has.
    """
    folder, dist = Path(folder), dist or Dist(0, 0, 1, torch.device("cpu"))
    if folder.exists():
        raise FileExistsError(f"{folder} exists; export to a new folder, or remove that one first")
    config = make_config(model.cfg, tokenizer, dtype)
    if tokenizer is not None and tokenizer.vocab_size > model.cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.cfg.vocab_size}"
        )
    tensors = {llama_name(name): tensor for name, tensor in module_tensors(model).items()}
    sharded = isinstance(tensors["model.norm.weight"], DTensor)
    files = _plan_files(tensors, dtype.itemsize, max_file_bytes)
    temporary = folder.with_name(f".tmp-{folder.name}")
    if dist.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        for file, names in files.items():
            part = {}
            for name in names:
                whole = tensors[name].full_tensor() if sharded else tensors[name]
                if dist.is_main:
                    part[name] = whole.detach().to("cpu", dtype).contiguous()
            if dist.is_main:
                write_tensors(part, temporary / file, metadata={"format": "pt"})
        if dist.is_main:
            write_json(temporary / "config.json", config)
            if tokenizer is not None:
                tokenizer.save(temporary)
            if len(files) > 1:
                total = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
                weight_map = {name: file for file, names in files.items() for name in names}
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                write_json(temporary / INDEX, index)
            for path in (*temporary.iterdir(), temporary):
                fsync(path)
            os.rename(temporary, folder)
            fsync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"could not write {folder}: {error}") from None
    barrier(dist)


def _plan_files(tensors: Mapping[str, Tensor], itemsize: int, limit: int) -> dict[str, list[str]]:
    """Return the tensors of each file: at most `limit` bytes, or one tensor."""
    parts, used = [[]], 0
    for name, tensor in tensors.items():
        size = tensor.numel() * itemsize
        if parts[-1] and used + size > limit:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {
        f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)
    }
