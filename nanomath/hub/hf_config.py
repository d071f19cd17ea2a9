"""config.json of a Hugging Face folder: to a ModelConfig and back, exact or refused by field.

Read are the rope keys of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`);
written are the former, which every version of transformers and vLLM reads. Weights are hf.py's.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from nanomath.base.files import read_json
from nanomath.model import ModelConfig
from nanomath.text.tokenizer import Tokenizer

ARCHITECTURES = {  # model_type -> what it must be a model of
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SIZES = {  # ModelConfig's name -> theirs
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_width": "intermediate_size",
}
LLAMA3_ROPE = {
    "rope_factor": "factor",
    "rope_low_freq": "low_freq_factor",
    "rope_high_freq": "high_freq_factor",
    "rope_original_context": "original_max_position_embeddings",
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
    if not isinstance(layer_types, list) or {*map(str, layer_types)} - {"full_attention"}:
        raise ValueError(f"{path}: layer_types: only full_attention is supported")
    if type(config.setdefault("tie_word_embeddings", False)) is not bool:
        raise ValueError(f"{path}: tie_word_embeddings must be true or false")
    if family == "llama" and config.get("num_key_value_heads") is None:  # Llama 1
        config["num_key_value_heads"] = config.get("num_attention_heads")

    shape = {
        **{ours: _number(path, config, theirs, int) for ours, theirs in SIZES.items()},
        "rms_eps": _number(path, config, "rms_norm_eps", float),
        "max_context": _number(path, config, "max_position_embeddings", int),
        "tied_head": config["tie_word_embeddings"],
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        **_read_rope(path, config),
    }
    if family == "qwen3" or config.get("head_dim") is not None:
        shape["head_width"] = _number(path, config, "head_dim", int)
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
    needed = {"default": {}, "linear": {"rope_factor": "factor"}, "llama3": LLAMA3_ROPE}
    if kind not in tuple(needed):
        raise ValueError(f"{path}: rope type {kind!r}; known are {', '.join(needed)}")
    fields = {"rope_theta": "rope_theta", **needed[kind]}
    unknown = rope.keys() - {*fields.values(), "type", "partial_rotary_factor"}
    if rope.get("partial_rotary_factor", 1) != 1 or any(rope[key] is not None for key in unknown):
        raise ValueError(f"{path}: rope settings {rope} are more than {kind} rope has")
    kinds = {"rope_original_context": int}
    return {
        ours: _number(path, rope, theirs, kinds.get(ours, float)) for ours, theirs in fields.items()
    }


def make_config(cfg: ModelConfig, tokenizer: Tokenizer | None, dtype: torch.dtype) -> dict:
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
        **{theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": cfg.rms_eps,
        "max_position_embeddings": cfg.max_context,
        "tie_word_embeddings": cfg.tied_head,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    for kind in ("bos", "eos", "pad"):
        config[f"{kind}_token_id"] = getattr(tokenizer, f"{kind}_id", None)
    if cfg.rope_original_context is not None:
        scaling = {theirs: getattr(cfg, ours) for ours, theirs in LLAMA3_ROPE.items()}
        config["rope_scaling"] = {"rope_type": "llama3", **scaling}
    elif cfg.rope_factor != 1:
        config["rope_scaling"] = {"type": "linear", "factor": cfg.rope_factor}
    if family != "qwen2":
        config["head_dim"] = cfg.head_size
    return config
