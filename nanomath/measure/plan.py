"""Will it fit, and how long will it take: memory, FLOPs, time and communication as plain formulas.

    python -m nanomath.measure.plan --preset deepseekmath_7b --num_gpus 8 --gpu_memory_gb 80
    python -m nanomath.measure.plan --preset gsm8k_qwen_0b5 --gpu_memory_gb 16
    python -m nanomath.measure.plan --shape models/NAME/config.json --num_gpus 4

Prints a column each for pretraining, SFT and GRPO (--stages): what one GPU holds when it holds
most, the seconds of a step, the bytes it receives, and what to change where it does not fit. The
bytes are those of nanomath's own code, without torch.compile, which keeps less
(tests/measure/test_plan.py measures them); rates such as `--mfu` are inputs.

Sources: states of 16 bytes per parameter, ZeRO (arXiv:1910.02054 section 3.1); FLOPs, PaLM
(arXiv:2204.02311 appendix B) with causal attention counted once; activations, in the manner of
Korthikanti et al. (arXiv:2205.05198 section 4) for the tensors that autograd keeps here; decoding
time from bytes read, Pope et al. (arXiv:2211.05102 section 2.1). Shape letters: __init__.py.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanomath.base.config import one_line_errors, opt, parse
from nanomath.engine.cache import cache_bytes_per_token, fit_rows
from nanomath.hub.hf_config import read_config
from nanomath.measure.figures import markdown_table
from nanomath.model import MODEL_PRESETS, ModelConfig
from nanomath.run import presets

PEAK_FLOPS = 989e12  # H100 SXM, dense bf16 (NVIDIA's data sheet)
STAGES = ("pretrain", "sft", "grpo")
POLICIES = ("none", "selective", "full")
HEAD_CHUNK_ROWS = {"cuda": 8192, "cpu": 256}  # kernels/linear.py


SHAPES = {
    **MODEL_PRESETS,
    # Qwen2.5 (arXiv:2412.15115, table 1); its biases, 0.01%, do not count.
    "qwen2.5_0.5b": ModelConfig(151_936, 24, 896, 14, 2, 4864, tied_head=True),
    "qwen2.5_1.5b": ModelConfig(151_936, 28, 1536, 12, 2, 8960, tied_head=True),
    "qwen2.5_3b": ModelConfig(151_936, 36, 2048, 16, 2, 11008, tied_head=True),
}


@dataclass(frozen=True)
class PlanConfig:
    stages: tuple[str, ...] = opt(STAGES, "columns", choices=STAGES)
    shape: str = opt(
        "deepseek_llm_1b3", f"{', '.join(SHAPES)}, or config.json of a Hugging Face folder"
    )
    context: int = opt(4096, "tokens per row, pretraining and SFT, Sec. 2.2 and 3", low=1)
    pretrain_rows: int = opt(1024, "rows per step, all GPUs: 4M tokens, Sec. 2.2", low=1)
    sft_rows: int = opt(256, "packed rows per step, all GPUs, Sec. 3", low=1)
    batch_size: int = opt(16, "GRPO questions per step P, all GPUs, Sec. 4.2", low=1)
    group_size: int = opt(64, "GRPO outputs per question G, Sec. 4.2", low=1)
    prompt_tokens: int = opt(256, "tokens of the longest prompt", low=1)
    max_new_tokens: int = opt(1024, "tokens per output at most, Sec. 4.2", low=1)
    mean_length: float = opt(0.5, "mean length of outputs, as a share of that", low=0.0, high=1.0)
    max_rows: int = opt(512, "outputs sampled at a time, per GPU: stream.py", low=1)
    cache_gb: float = opt(0.0, "GB for keys and values, fewer rows if need be; 0: any", low=0.0)
    kl_coef: float = opt(0.04, "GRPO's, Sec. 4.2; 0: without a reference model", low=0.0)
    micro_batch_size: int = opt(8, "rows of one forward and backward pass", low=1)
    activation_checkpointing: str = opt(
        "none", "what blocks recompute: see activations.py", choices=POLICIES
    )
    device: str = opt("cuda", "cuda: bf16 under FSDP2; cpu: fp32", choices=("cuda", "cpu"))
    num_gpus: int = opt(8, "GPUs (or processes on CPUs) W", low=1)
    gpus_per_node: int = opt(8, "GPUs joined by NVLink", low=1)
    gpu_memory_gb: float = opt(80.0, "memory of a GPU, GB of 1e9 bytes", low=0.0)
    reserve: float = opt(0.08, "share of it for CUDA, NCCL and fragments", low=0.0, high=0.9)
    mfu: float = opt(0.5, "share of the peak that training reaches", low=0.01, high=1.0)
    mbu: float = opt(0.6, "share of the memory bandwidth that decoding reaches", low=0.01, high=1.0)
    peak_tflops: float = opt(PEAK_FLOPS / 1e12, "peak of a GPU: H100 SXM, dense bf16", low=0.001)
    memory_tb_per_s: float = opt(3.35, "memory bandwidth of a GPU: H100 SXM", low=0.001)
    nvlink_gb_per_s: float = opt(450.0, "per GPU and direction: H100 SXM", low=0.001)
    network_gb_per_s: float = opt(50.0, "per GPU between nodes: 400 Gb/s InfiniBand", low=0.001)

    @property
    def model(self) -> ModelConfig:
        if self.shape not in SHAPES and not Path(self.shape).is_file():
            raise ValueError(f"--shape {self.shape}: no such file, nor one of {', '.join(SHAPES)}")
        return SHAPES.get(self.shape) or read_config(self.shape)

    @property
    def sharded(self) -> bool:
        return self.device == "cuda" or self.num_gpus > 1

    @property
    def compute_bytes(self) -> int:
        return 2 if self.device == "cuda" else 4


# The settings of a run are train_grpo.py's, by the same names; its shape and its machines, those of
# runs/*.sh, are here.
RL = {"stages": ("grpo",)}  # of a model that others have trained
PRESETS = {
    "deepseekmath_7b": {"shape": "deepseek_llm_7b", "pretrain_rows": 2560},  # Sec. 2.3 and 4.2
    "gsm8k_qwen_0b5": {**RL, "shape": "qwen2.5_0.5b", "num_gpus": 1, "gpu_memory_gb": 24.0},
    "gsm8k_qwen_1b5": {**RL, "shape": "qwen2.5_1.5b", "num_gpus": 1},
    "countdown_qwen_3b": {**RL, "shape": "qwen2.5_3b", "num_gpus": 4},
}
PRESETS = {
    name: {key: run for key, run in presets.GRPO[name].items() if key in vars(PlanConfig())} | here
    for name, here in PRESETS.items()
}


# ---------------------------------------------------------------------------- FLOPs


def flops_per_token(model: ModelConfig, context: int) -> float:
    """Return the FLOPs of a forward and backward pass per token of rows of `context` tokens.

    2 per weight forward and 4 backward (the embedding is looked up, not multiplied), and as much
    for the two products of attention, whose causal half is counted.
    """
    projections = 2 * model.width * model.head_size * (model.num_heads + model.num_kv_heads)
    attention = model.num_heads * model.head_size * context  # 2 products of 2 H E T, half, by 2
    blocks = model.num_layers * (projections + attention + 3 * model.width * model.ffn_width)
    return 6.0 * (blocks + model.width * model.vocab_size)


# ---------------------------------------------------------------------------- memory


def kept_bytes(model: ModelConfig, policy: str, size: int) -> float:
    """Return the bytes that one block keeps per token until its backward pass.

    size: bytes of a number, 4 for fp32 and 2 for bf16, where norms keep their input in fp32.
    """
    width, ffn = model.width, model.ffn_width
    heads = model.num_heads * model.head_size  # H E
    kv_heads = model.num_kv_heads * model.head_size  # K E
    log_sums = 4 * model.num_heads  # of attention, fp32
    if policy == "full":  # the input
        return size * width
    if policy == "selective":  # the input and every product: q, k, v, attention, o, gate, up, down
        return size * (3 * width + 2 * heads + 2 * kv_heads + 2 * ffn) + log_sums
    # Two norms: input (fp32), normalised, scaled. Attention: q, k, v, its output. SwiGLU: gate, up,
    # SiLU(gate), their product.
    norms = 2 * (4 + 2 * size) * width + 8
    if model.qk_norm:  # input and normalised; the scaled goes into the rotation, which keeps none
        norms += (4 + size) * (heads + kv_heads) + 4 * (model.num_heads + model.num_kv_heads)
    return norms + size * (2 * heads + 2 * kv_heads + 4 * ffn) + log_sums


def state_bytes(cfg: PlanConfig, stage: str) -> dict[str, float]:
    """Return what is held between steps, bytes per GPU by kind."""
    parameters = cfg.model.num_parameters
    share = parameters / cfg.num_gpus
    state = {"weights, fp32": 4 * share, "optimizer": 8 * share}
    if stage == "grpo":
        state["reference"] = 4 * share * (cfg.kl_coef > 0)
        state["sampling replica"] = cfg.compute_bytes * parameters * cfg.sharded
    return state


def rows_per_step(cfg: PlanConfig, stage: str) -> int:
    outputs = cfg.batch_size * cfg.group_size
    return {"pretrain": cfg.pretrain_rows, "sft": cfg.sft_rows, "grpo": outputs}[stage]


def micro_batch(cfg: PlanConfig, stage: str) -> tuple[int, int, int, int]:
    """Return rows of a micro-batch, tokens of a row, tokens of a row with loss, micro-batches."""
    mine = math.ceil(rows_per_step(cfg, stage) / cfg.num_gpus)
    length, trained = cfg.context, cfg.context
    if stage == "grpo":
        length, trained = cfg.prompt_tokens + cfg.max_new_tokens, cfg.max_new_tokens
    size = min(cfg.micro_batch_size, mine)
    return size, length, trained, math.ceil(mine / size)


def training_moments(cfg: PlanConfig, stage: str) -> list[dict[str, float]]:
    """Return bytes per GPU by kind, above the state, at the moments that may hold most.

    They are the head (the last block's results and the logits' chunk), the start of the backward
    pass (all activations) and its end (all gradients). Between, gradients come as activations go.
    """
    model, size = cfg.model, cfg.compute_bytes
    rows, length, trained, num_micro = micro_batch(cfg, stage)
    tokens, head_rows = rows * length, rows * trained
    policy = cfg.activation_checkpointing
    table = model.vocab_size * model.width
    tables = table * (2 - model.tied_head)
    block = (model.num_parameters - model.width - tables) / model.num_layers
    all_gradients = 4.0 * model.num_parameters / cfg.num_gpus
    # FSDP2 keeps whole fp32 gradients on every GPU until the step's last micro-batch reduces them.
    held = (4.0 * model.num_parameters if cfg.sharded else all_gradients) * (num_micro > 1)
    # The root stays gathered; of the blocks the current and the next one.
    gathered = size * (tables + 2 * block) * cfg.sharded
    head_gradient = 4.0 * table  # fp32, whole
    kept = kept_bytes(model, policy, size) * tokens * model.num_layers
    kept += (4 + 2 * size) * model.width * tokens  # the final norm
    one_block = kept_bytes(model, "none", size) * tokens
    recomputed = one_block * (policy != "none")
    gradient_of_hidden = size * model.width * head_rows
    if stage == "sft":  # segments: which token sees which, one bias for all layers
        kept += size * rows * length**2
    if stage == "grpo":  # response positions are picked out of the rows
        kept += size * model.width * head_rows
    chunk_rows = min(HEAD_CHUNK_ROWS[cfg.device], head_rows)
    chunk = size * chunk_rows * model.vocab_size
    # In a block's backward pass: gradients of SiLU, gate, up; of its input twice.
    passing = size * tokens * (2 * model.ffn_width + 2 * model.width)
    block_gradient = 8.0 * block * cfg.sharded  # whole, and the buffer it is reduced from, fp32
    new_table = head_gradient * (num_micro > 1)  # the embedding's, before it is added

    kinds = ("gradients", "activations", "logits chunk")
    moments = (
        (held + head_gradient, kept + gradient_of_hidden, chunk),
        (held + head_gradient + block_gradient, kept + recomputed + passing, 0.0),
        (max(held, all_gradients) + new_table + block_gradient, one_block + passing, 0.0),
    )
    return [dict(zip(kinds, m, strict=True)) | {"weights, gathered": gathered} for m in moments]


def sampled_at_a_time(cfg: PlanConfig) -> tuple[int, int]:
    """Return the outputs that a GPU samples at a time, and the prompts held for them."""
    prompts, size = math.ceil(cfg.batch_size / cfg.num_gpus), cache_per_token(cfg)
    needs = (cfg.cache_gb or math.inf, size * cfg.prompt_tokens, size * cfg.max_new_tokens)
    return fit_rows(prompts, cfg.group_size, cfg.max_rows, *needs)


def sampling_bytes(cfg: PlanConfig) -> dict[str, float]:
    """Return bytes per GPU of the sampler's cache and logits."""
    rows, prompts = sampled_at_a_time(cfg)
    # A prompt's keys and values are held once for its group.
    whole = cache_per_token(cfg) * (prompts * cfg.prompt_tokens + rows * cfg.max_new_tokens)
    # Logits: themselves, their probabilities, and those summed, in fp32; on a GPU once more in the
    # pool of the CUDA graphs.
    logits = 12.0 * rows * cfg.model.vocab_size * (1 + (cfg.device == "cuda"))
    return {"cache": whole, "logits chunk": logits}


def cache_per_token(cfg: PlanConfig) -> int:
    dtype = torch.bfloat16 if cfg.device == "cuda" else torch.float32
    return cache_bytes_per_token(cfg.model, dtype)


def memory(cfg: PlanConfig, stage: str) -> dict[str, float]:
    """Return bytes per GPU by kind at the moment of the step that holds most."""
    moments = training_moments(cfg, stage)
    if stage == "grpo":
        moments.append(sampling_bytes(cfg))
    return state_bytes(cfg, stage) | max(moments, key=lambda moment: sum(moment.values()))


def usable(cfg: PlanConfig) -> float:
    return cfg.gpu_memory_gb * 1e9 * (1 - cfg.reserve)


def advice(cfg: PlanConfig, stage: str) -> str:
    """Say whether the stage fits, and if not what is the smallest change after which it does."""

    def fits(other: PlanConfig) -> bool:
        return sum(memory(other, stage).values()) <= usable(cfg)

    if fits(cfg):
        return "fits"
    sizes = [cfg.micro_batch_size >> shift for shift in range(cfg.micro_batch_size.bit_length())]
    start = POLICIES.index(cfg.activation_checkpointing)
    gpus = [cfg.num_gpus << doubling for doubling in range(8)]
    rows = [cfg.max_rows >> shift for shift in range(4 if stage == "grpo" else 1)]
    names = ("num_gpus", "max_rows", "micro_batch_size", "activation_checkpointing")
    for values in itertools.product(gpus, rows, sizes, POLICIES[start:]):
        changes = dict(zip(names, values, strict=True))
        if fits(replace(cfg, **changes)):
            flags = [f"--{k} {v}" for k, v in changes.items() if v != getattr(cfg, k)]
            return "NO; fits with " + " ".join(flags)
    return "NO; shorten --context, or a smaller model"


# ---------------------------------------------------------------------------- time


def step_times(cfg: PlanConfig, stage: str) -> dict[str, float]:
    """Return seconds of a step by phase, and of its communication, which overlaps with them."""
    is_grpo, speed = stage == "grpo", cfg.num_gpus * cfg.peak_tflops * 1e12 * cfg.mfu
    output = cfg.mean_length * cfg.max_new_tokens
    length = cfg.prompt_tokens + output if is_grpo else cfg.context
    training = rows_per_step(cfg, stage) * length * flops_per_token(cfg.model, length) / speed
    return {
        "sampling": sampling_seconds(cfg) if is_grpo else 0.0,
        "reference": is_grpo * (cfg.kl_coef > 0) * training / 3,  # forward only
        "training": training * (4 / 3 if cfg.activation_checkpointing == "full" else 1),
        "communication (overlaps)": sum(communication_bytes(cfg, stage).values()) / bandwidth(cfg),
    }


def sampling_seconds(cfg: PlanConfig) -> float:
    """Decoding waits for memory: every step reads the weights and what the cache holds by then."""
    model, prompts = cfg.model, math.ceil(cfg.batch_size / cfg.num_gpus)
    table = 0 if model.tied_head else model.vocab_size * model.width
    weights = cfg.compute_bytes * (model.num_parameters - table)
    mean = cfg.mean_length * cfg.max_new_tokens
    own = prompts * cfg.group_size * mean**2 / 2  # 1 + 2 + ... + mean, per row
    shared = prompts * cfg.prompt_tokens * cfg.max_new_tokens
    # Rows that end make room for others.
    rounds = max(1.0, prompts * cfg.group_size / sampled_at_a_time(cfg)[0])
    read = weights * cfg.max_new_tokens * rounds + cache_per_token(cfg) * (own + shared)
    return read / (cfg.memory_tb_per_s * 1e12 * cfg.mbu)


def communication_bytes(cfg: PlanConfig, stage: str) -> dict[str, float]:
    """Return the bytes a GPU receives per step (ring: a share (W - 1) / W of each tensor).

    FSDP2 gathers the weights for the forward and again for the backward pass of every micro-batch,
    and reduces fp32 gradients once a step (ZeRO-3, arXiv:1910.02054 section 7).
    """
    if not cfg.sharded:
        return {"gather": 0.0, "reduce": 0.0}
    ring = (cfg.num_gpus - 1) / cfg.num_gpus
    weights = cfg.compute_bytes * cfg.model.num_parameters * ring
    num_micro = micro_batch(cfg, stage)[3]
    gathers = 2 * num_micro
    if stage == "grpo":  # the replica, and the reference's forward passes
        gathers += 1 + (cfg.kl_coef > 0) * num_micro
    return {"gather": gathers * weights, "reduce": 4.0 * cfg.model.num_parameters * ring}


def bandwidth(cfg: PlanConfig) -> float:
    inside = cfg.num_gpus <= cfg.gpus_per_node
    return 1e9 * (cfg.nvlink_gb_per_s if inside else cfg.network_gb_per_s)


# ---------------------------------------------------------------------------- the page


def report(cfg: PlanConfig) -> str:
    """Return the whole plan as text."""
    model, columns = cfg.model, [memory(cfg, stage) for stage in cfg.stages]
    kinds = dict.fromkeys(kind for column in columns for kind in column if column[kind])
    held = {kind: [column.get(kind, 0.0) / 1e9 for column in columns] for kind in kinds}
    held["all"] = [sum(column.values()) / 1e9 for column in columns]
    held["usable"] = [usable(cfg) / 1e9] * len(columns)
    times = [step_times(cfg, stage) for stage in cfg.stages]
    spent = {phase: [column[phase] for column in times] for phase in times[0]}
    sent = [sum(communication_bytes(cfg, stage).values()) / 1e9 for stage in cfg.stages]
    spent[f"GB received, at {bandwidth(cfg) / 1e9:g} GB/s"] = sent

    def table(title: str, rows: dict[str, list[float]]) -> str:
        cells = [[k, *(f"{v:.1f}" if v else "-" for v in values)] for k, values in rows.items()]
        return markdown_table([title, *cfg.stages], cells)

    return "\n\n".join(
        [
            f"{model.num_parameters / 1e9:.2f}B parameters, "
            f"{flops_per_token(model, cfg.context) / 1e9:.1f} GFLOP per token at {cfg.context} "
            f"tokens, {cfg.num_gpus} x {cfg.gpu_memory_gb:g} GB",
            table("GB per GPU at its fullest", held),
            table(f"seconds per step at MFU {cfg.mfu:.0%}, bandwidth use {cfg.mbu:.0%}", spent),
            "\n".join(f"{stage}: {advice(cfg, stage)}" for stage in cfg.stages),
        ]
    )


def main() -> None:
    cfg = parse(PlanConfig, PRESETS, description=__doc__)
    with one_line_errors():
        print(report(cfg))


if __name__ == "__main__":
    main()
