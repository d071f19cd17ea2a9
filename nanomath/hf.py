"""Hugging Face folders, in and out: Llama, DeepSeek in Llama's layout, Qwen2 / 2.5, Qwen3 dense.

    model, tokenizer = load_hf("downloads/deepseek-math-7b-base")
    python -m nanomath.hf --checkpoint runs/grpo --out exported

Every command that takes a checkpoint takes such a folder too (`checkpoint.load_model`). Reading is
exact or refused: every tensor is used once, and a setting that `model.py` does not have is an error
that names file and field, raised before any weight is read. Files of code (.py) and pickles (.bin)
are never opened. Weights stream tensor by tensor, each rank reads only its own rows.

Written are the rope keys of transformers 4 (`rope_theta`, `rope_scaling`), which every version of
transformers and vLLM reads; read are those and the `rope_parameters` of transformers 5.
Tokenizer files are tokenizer.py's, chat templates are not written.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanomath.checkpoint import _fsync, _module_tensors, empty_model, load_model, read_rows
from nanomath.config import one_line_errors, opt, parse, write_json
from nanomath.dist import Dist, barrier, local
from nanomath.model import ModelConfig, Transformer
from nanomath.tokenizer import Tokenizer
from nanomath.tokenizer_json import read_json

ARCHITECTURES = {  # model_type -> what it must be a model of
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What model.py has no other value of; the first is what a config without the key means.
FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


# ---------------------------------------------------------------------------- config.json


def read_config(path: str | Path) -> ModelConfig:
    """Read config.json; raise ValueError naming the field for what model.py is not exactly."""
    path = Path(path)
    config = read_json(path)
    family = config.get("model_type")
    if config.get("auto_map"):
        raise ValueError(
            f"{path}: auto_map: the model needs Python code of its own, never run here"
        )
    if family not in tuple(ARCHITECTURES):
        raise ValueError(f"{path}: model_type is {family!r}; known are {', '.join(ARCHITECTURES)}")
    if config.get("architectures", [ARCHITECTURES[family]]) != [ARCHITECTURES[family]]:
        raise ValueError(
            f"{path}: architectures is {config['architectures']}; "
            f"{family} is read as {ARCHITECTURES[family]} only"
        )
    for key, allowed in FIXED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{path}: {key} is {config[key]!r}; only {allowed[0]!r} is supported")
    layer_types = config.get("layer_types") or []
    if layer_types != ["full_attention"] * len(
        layer_types if isinstance(layer_types, list) else []
    ):
        raise ValueError(f"{path}: layer_types: only full_attention is supported")
    if type(config.setdefault("tie_word_embeddings", False)) is not bool:
        raise ValueError(f"{path}: tie_word_embeddings must be true or false")
    if family == "llama" and config.get("num_key_value_heads") is None:  # Llama 1
        config["num_key_value_heads"] = config.get("num_attention_heads")

    def size(key: str) -> int:
        return _number(path, config, key, int)

    shape = {
        "vocab_size": size("vocab_size"),
        "num_layers": size("num_hidden_layers"),
        "width": size("hidden_size"),
        "num_heads": size("num_attention_heads"),
        "num_kv_heads": size("num_key_value_heads"),
        "ffn_width": size("intermediate_size"),
        "rms_eps": _number(path, config, "rms_norm_eps", float),
        "max_context": size("max_position_embeddings"),
        "tied_head": config["tie_word_embeddings"],
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        **_read_rope(path, config),
    }
    if family == "qwen3" or config.get("head_dim") is not None:
        shape["head_width"] = size("head_dim")
    try:
        return ModelConfig(**shape)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _number(path: Path, values: Mapping, key: str, kind: type) -> int | float:
    value = values.get(key)
    if kind is int and type(value) is int and 1 <= value < 2**31:
        return value
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    wanted = "an integer >= 1" if kind is int else "a finite number"
    raise ValueError(f"{path}: {key} is {json.dumps(value)} or missing; it must be {wanted}")


def _read_rope(path: Path, config: dict) -> dict[str, float | int]:
    """Return ModelConfig's rope fields from the keys of transformers 4 or 5."""
    if config.get("rope_scaling") and config.get("rope_parameters"):
        raise ValueError(f"{path}: rope_scaling and rope_parameters: give one of the two")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: the rope settings must be an object, not {rope!r}")
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **rope}  # Llama 1 has no such key
    kind = rope.pop("rope_type", rope.get("type", "default"))
    needed = {
        "default": {},
        "linear": {"rope_factor": ("factor", float)},
        "llama3": {
            "rope_factor": ("factor", float),
            "rope_low_freq": ("low_freq_factor", float),
            "rope_high_freq": ("high_freq_factor", float),
            "rope_original_context": ("original_max_position_embeddings", int),
        },
    }
    if kind not in tuple(needed):
        raise ValueError(f"{path}: rope type {kind!r}; known are {', '.join(needed)}")
    fields = {"rope_theta": ("rope_theta", float), **needed[kind]}
    unknown = rope.keys() - {key for key, _ in fields.values()} - {"type", "partial_rotary_factor"}
    if rope.get("partial_rotary_factor", 1) != 1 or any(rope[key] is not None for key in unknown):
        raise ValueError(f"{path}: rope settings {rope} are more than {kind} rope has")
    return {name: _number(path, rope, *source) for name, source in fields.items()}


def _write_config(cfg: ModelConfig, tokenizer: Tokenizer | None, dtype: torch.dtype) -> dict:
    """Return config.json of the family that has cfg's shape; ValueError where none has."""
    if cfg.qk_norm and cfg.qkv_bias:
        raise ValueError("no known architecture has both qk_norm and qkv_bias")
    family = "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "llama"
    if family == "llama" and cfg.width % cfg.num_heads:
        raise ValueError(
            f"{ARCHITECTURES[family]} wants width {cfg.width} to be a multiple of num_heads "
            f"{cfg.num_heads}, whatever head_width is"
        )
    if family == "qwen2" and cfg.head_size * cfg.num_heads != cfg.width:
        raise ValueError(
            f"{ARCHITECTURES[family]} has no head_width: its heads share width {cfg.width} evenly"
        )
    config = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": cfg.vocab_size,
        "num_hidden_layers": cfg.num_layers,
        "hidden_size": cfg.width,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "intermediate_size": cfg.ffn_width,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.rms_eps,
        "max_position_embeddings": cfg.max_context,
        "tie_word_embeddings": cfg.tied_head,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **_special_ids(tokenizer),
    }
    if cfg.rope_original_context is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": cfg.rope_factor,
            "low_freq_factor": cfg.rope_low_freq,
            "high_freq_factor": cfg.rope_high_freq,
            "original_max_position_embeddings": cfg.rope_original_context,
        }
    elif cfg.rope_factor != 1:
        config["rope_scaling"] = {"type": "linear", "factor": cfg.rope_factor}
    if family != "qwen2":
        config |= {"head_dim": cfg.head_size, "attention_bias": False}
    if family == "llama":
        config["mlp_bias"] = False
    else:
        config |= {"use_sliding_window": False, "sliding_window": None}
        config["max_window_layers"] = cfg.num_layers
    return config


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    kinds = ("bos", "eos", "pad")
    return {f"{kind}_token_id": getattr(tokenizer, f"{kind}_id", None) for kind in kinds}


# ---------------------------------------------------------------------------- weights


def llama_name(name: str) -> str:
    """Return what Hugging Face's Llama, Qwen2 and Qwen3 call the parameter `name` of model.py."""
    whole = {
        "embedding.weight": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    if name in whole:
        return whole[name]
    for ours, theirs in (
        ("blocks.", "model.layers."),
        ("attention_norm.", "input_layernorm."),
        ("ffn_norm.", "post_attention_layernorm."),
        ("attention.", "self_attn."),
        ("ffn.", "mlp."),
    ):
        name = name.replace(ours, theirs)
    return name


def _open_weights(folder: Path) -> dict[str, tuple[Path, object]]:
    """Return file and slice, not read yet, of every tensor in the folder's safetensors files."""
    weight_map = None
    if (folder / SINGLE).is_file():
        paths = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder / INDEX}: weight_map is missing, or no object")
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
                raise ValueError(
                    f"{folder / INDEX}: weight_map sends {tensor} to {name!r}; only the plain name "
                    "of a .safetensors file beside it is followed"
                )
        paths = [folder / name for name in sorted({*weight_map.values()})]
    else:
        raise FileNotFoundError(
            f"{folder} holds neither {SINGLE} nor {INDEX}; pickled weights (.bin, .pt) are never "
            "read: save them again as safetensors"
        )
    found = {}
    for path in paths:
        for tensor, piece in _slices(path).items():
            if tensor in found:
                raise ValueError(f"{path}: tensor {tensor} is also in {found[tensor][0].name}")
            if piece.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(f"{path}: tensor {tensor} is of type {piece.get_dtype()}")
            found[tensor] = path, piece
    for tensor, name in (weight_map or {}).items():
        if tensor not in found or found[tensor][0].name != name:
            raise ValueError(f"{folder / name}: tensor {tensor} is not in it, as {INDEX} says")
    return found


def _slices(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {INDEX} names it")
    try:
        file = safe_open(path, framework="pt")
        return {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


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
    layers = {int(number) for number in re.findall(r"model\.layers\.(\d+)\.", " ".join(found))}
    if cfg.num_layers > len(layers):  # before building, which a number out of range makes endless
        raise ValueError(
            f"{folder / 'config.json'}: num_hidden_layers is {cfg.num_layers}, but the files hold "
            f"tensors of {len(layers)} layers"
        )
    model = empty_model(cfg, dist, dtype, **sharding)
    wanted = {llama_name(name): tensor for name, tensor in _module_tensors(model).items()}
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
    about: str = "",
) -> None:
    """Write a folder that transformers and vLLM load; it appears whole or not at all.

    dtype: bf16, what published weights come in, takes half the room; float32 keeps every bit.
    dist: of a sharded model, all of whose ranks must call; one tensor at a time is gathered, rank 0
    writes. about: how it was made, for the model card. Raises FileExistsError, or ValueError for a
    shape that no known architecture has.
    """
    folder, dist = Path(folder), dist or Dist(0, 0, 1, torch.device("cpu"))
    if folder.exists():
        raise FileExistsError(f"{folder} exists; export to a new folder, or remove that one first")
    config = _write_config(model.cfg, tokenizer, dtype)
    if tokenizer is not None and tokenizer.vocab_size > model.cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.cfg.vocab_size}"
        )
    tensors = {llama_name(name): tensor for name, tensor in _module_tensors(model).items()}
    files = _plan_files(tensors, dtype.itemsize, max_file_bytes)
    temporary = folder.with_name(f".tmp-{folder.name}")
    if dist.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        for file, names in files.items():
            part = {name: _gather(tensors[name]).to("cpu", dtype).contiguous() for name in names}
            if dist.is_main:
                save_file(part, temporary / file, metadata={"format": "pt"})
        if dist.is_main:
            _write_about(temporary, folder.name, model.cfg, tokenizer, config, about)
            if len(files) > 1:
                total = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
                weight_map = {name: file for file, names in files.items() for name in names}
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                write_json(temporary / INDEX, index)
            for path in (*temporary.iterdir(), temporary):
                _fsync(path)
            os.rename(temporary, folder)
            _fsync(folder.parent)
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


def _gather(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _write_about(
    folder: Path,
    name: str,
    cfg: ModelConfig,
    tokenizer: Tokenizer | None,
    config: dict,
    about: str,
) -> None:
    """Write everything but the weights."""
    write_json(folder / "config.json", config)
    if tokenizer is not None:
        tokenizer.save(folder)
        ids = {**_special_ids(tokenizer), "eos_token_id": list(tokenizer.stop_ids)}
        write_json(folder / "generation_config.json", ids)
    card = f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

Made with nanomath, a small reproduction of DeepSeekMath (arXiv:2402.03300). {about}

| | |
|---|---|
| architecture | {config["architectures"][0]}, {config["torch_dtype"]} |
| parameters | {cfg.num_parameters:,} |
| layers, width, feed-forward width | {cfg.num_layers}, {cfg.width}, {cfg.ffn_width} |
| heads, key/value heads, head width | {cfg.num_heads}, {cfg.num_kv_heads}, {cfg.head_size} |
| vocabulary, context | {cfg.vocab_size}, {cfg.max_context} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


# ---------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Config:
    checkpoint: str = opt("", "run folder, one step's folder or Hugging Face folder to export")
    out: str = opt("", "folder to write, in Hugging Face's layout; must not exist yet")
    dtype: str = opt("bf16", "of the weights; fp32 keeps every bit", choices=tuple(DTYPES))


def main(cfg: Config) -> None:
    """Export a checkpoint."""
    for flag in ("checkpoint", "out"):
        if not getattr(cfg, flag):
            raise ValueError(f"--{flag} FOLDER is missing")
    if Path(cfg.out).exists():  # before the weights are read
        raise FileExistsError(f"--out {cfg.out} exists; give a new folder, or remove that one")
    model, tokenizer, state = load_model(cfg.checkpoint, dtype=DTYPES[cfg.dtype])
    about = f"Step {state['step']} of its last stage." if "step" in state else ""
    save_hf(model, tokenizer, cfg.out, dtype=DTYPES[cfg.dtype], about=about)
    print(f"wrote {cfg.out}: {model.cfg.num_parameters:,} parameters")


if __name__ == "__main__":
    with one_line_errors():
        main(parse(Config, description=__doc__))
