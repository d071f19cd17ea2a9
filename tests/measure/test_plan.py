"""The planner's bytes against measured peaks, its FLOPs and parameters against counts."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import linear_cross_entropy
from nanomath.activations import wrap_blocks
from nanomath.data import TrainBatch
from nanomath.dist import setup, shard
from nanomath.engine.stream import sample_groups
from nanomath.grpo import Objective, policy_update, response_logprobs
from nanomath.hub.hf_config import make_config
from nanomath.measure import plan
from nanomath.model import MODEL_PRESETS, ModelConfig, Transformer
from nanomath.optim import make_adamw, supervised_step
from nanomath.rollouts import make_batch

ROOT = Path(__file__).resolve().parents[2]
STEP = {"lr": 1e-4, "max_grad_norm": 1.0}


# ---------------------------------------------------------------------------- the measured process


def memory_mb(key: str) -> float:
    """Return VmRSS or VmHWM, its peak, of this process in MB of 1e6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) * 1024 / 1e6


def run_steps(cfg: plan.PlanConfig, stage: str) -> None:
    """Take two steps of a stage as the trainers do, on random tokens."""
    dist = setup("cpu", 1)
    policy = Transformer(replace(cfg.model, max_context=10_000))
    policy.init_weights(0)
    policy = shard(policy, dist, cfg.activation_checkpointing)
    optimizer = make_adamw(policy, lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # the second holds the optimizer's state from the start
        if stage == "grpo":
            grpo_step(cfg, policy, optimizer, dist, generator)
            continue
        rows = cfg.pretrain_rows if stage == "pretrain" else cfg.sft_rows
        shape = (rows, cfg.context + 1)
        tokens_BT = torch.randint(cfg.model.vocab_size, shape, generator=generator)
        weights_BT = torch.full(shape, 1 / tokens_BT.numel())
        weights_BT[:, -1] = 0.0
        packed = ()
        if stage == "sft":  # four examples to a row
            place_BT = torch.arange(shape[1]).expand(shape)
            packed = (place_BT * 4 // shape[1], place_BT % (shape[1] // 4))
        batch = TrainBatch(tokens_BT, weights_BT, *packed)
        supervised_step(
            policy, optimizer, batch, micro_batch_size=cfg.micro_batch_size, dist=dist, **STEP
        )


def grpo_step(cfg, policy, optimizer, dist, generator) -> None:
    if not hasattr(optimizer, "reference"):
        optimizer.reference = Transformer(policy.cfg).requires_grad_(False)
        optimizer.reference.load_state_dict(policy.state_dict())
    shape = (cfg.batch_size, cfg.prompt_tokens)
    prompts = torch.randint(cfg.model.vocab_size, shape, generator=generator).tolist()
    new = cfg.max_new_tokens
    rollouts = sample_groups(policy, prompts, cfg.group_size, max_new_tokens=new, eos_ids=())
    size = (cfg.batch_size, cfg.group_size)
    weights_PG = torch.full(size, 1 / new, dtype=torch.float64)
    batch = make_batch(
        prompts, rollouts, torch.randn(size, generator=generator), weights_PG,
        num_prompts=cfg.batch_size, world_size=1,
    )  # fmt: skip
    scoring = {"temperature": 1.0, "micro_batch_size": cfg.micro_batch_size, "device": dist.device}
    if cfg.kl_coef:
        batch.ref_logp_N = response_logprobs(optimizer.reference, batch, **scoring)
    objective = Objective(0.2, 0.2, cfg.kl_coef, 1.0)
    policy_update(
        policy,
        optimizer,
        batch,
        objective,
        micro_batch_size=cfg.micro_batch_size,
        dist=dist,
        **STEP,
    )


TINY = {"context": 16, "prompt_tokens": 8, "max_new_tokens": 8}

if __name__ == "__main__":
    config, chosen, sizes = plan.PlanConfig(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[3]
    plan.SHAPES["tiny"] = ModelConfig(64, 1, 16, 2, 2, 16)
    plan.SHAPES["small"] = ModelConfig(**json.loads(sizes))
    # Libraries load parts of themselves on first use.
    run_steps(replace(config, shape="tiny", **TINY), chosen)
    imported = memory_mb("VmRSS")
    run_steps(config, chosen)
    print(memory_mb("VmHWM") - imported)


# ---------------------------------------------------------------------------- tests

SMALL = plan.PlanConfig(
    shape="small", context=256, pretrain_rows=8, sft_rows=8, batch_size=4, group_size=8,
    prompt_tokens=32, max_new_tokens=96, device="cpu", num_gpus=1,
)  # fmt: skip


def check_peak(stage: str, shape: dict, **changes) -> None:
    cfg, model = replace(SMALL, **changes), replace(ModelConfig(8_000, 4, 256, 4, 4, 688), **shape)
    # glibc keeps what is freed in pieces, a third more at these sizes; this gives it all back.
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, json.dumps(asdict(cfg)), stage, json.dumps(asdict(model))]
    out = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.SHAPES, "small", model)
        measured, column = float(out.stdout), plan.memory(cfg, stage)
    planned = sum(column.values()) / 1e6
    parts = ", ".join(f"{kind} {value / 1e6:.0f}" for kind, value in column.items())
    print(f"{stage} {shape} {changes}: measured {measured:.0f} MB, planned {planned:.0f} ({parts})")
    assert planned == pytest.approx(measured, rel=0.15), parts


reads_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads /proc/self/status, which only Linux has"
)


@reads_proc
def test_planned_memory_is_within_15_percent_of_a_measured_peak():
    """Steps in a process of their own: peak resident memory above what importing takes."""
    check_peak("pretrain", {})


@reads_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, shape, changes",
    [
        ("pretrain", {}, {"micro_batch_size": 2}),
        ("pretrain", {}, {"activation_checkpointing": "selective"}),
        ("pretrain", {"num_layers": 8}, {"activation_checkpointing": "full"}),
        ("pretrain", {"vocab_size": 40_000, "num_layers": 2}, {"pretrain_rows": 4}),
        ("pretrain", {"num_kv_heads": 1}, {"context": 512, "pretrain_rows": 4}),
        ("pretrain", {"width": 512, "ffn_width": 1376}, {"context": 128, "pretrain_rows": 2}),
        ("sft", {}, {}),
        ("sft", {}, {"context": 1024, "sft_rows": 2}),
        ("grpo", {}, {}),
        ("grpo", {}, {"kl_coef": 0.0, "micro_batch_size": 32}),
        ("grpo", {}, {"max_new_tokens": 192, "micro_batch_size": 2, "group_size": 16}),
    ],
)
def test_planned_memory_of_other_shapes_and_stages(stage, shape, changes):
    """The same with every stage, accumulation, checkpointing, and each kind the largest once."""
    check_peak(stage, shape, **changes)


def test_a_shape_is_a_name_or_a_file(tmp_path):
    """A name that is neither ends with the names there are; a folder's config.json is read."""
    with pytest.raises(ValueError, match="--shape gpt: no such file, nor one of deepseek_llm_1b3"):
        plan.memory(plan.PlanConfig(shape="gpt"), "sft")
    model = ModelConfig(64, 2, 32, 4, 2, 48, head_width=8)
    config = make_config(model, None, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan.PlanConfig(shape=str(tmp_path / "config.json")).model == model


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_kept_bytes_are_exactly_what_autograd_keeps(dtype, size, policy, qk_norm):
    """A block more keeps kept_bytes more per token, to the byte; grouped queries included."""

    def kept(num_layers: int) -> int:
        cfg = ModelConfig(50, num_layers, 32, 4, 2, 72, max_context=16, qk_norm=qk_norm)
        model = Transformer(cfg).to(dtype)
        wrap_blocks(model, policy, compiled=False)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held: not used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.zeros(2, 16, dtype=torch.int64), head_fn=lambda hidden, head: hidden)
        return sum(num_bytes for num_bytes, _ in storages.values())

    cfg = ModelConfig(50, 1, 32, 4, 2, 72, qk_norm=qk_norm)
    assert (kept(3) - kept(2)) / 32 == plan.kept_bytes(cfg, policy, size)


def test_flops_are_those_of_the_products_that_run():
    """Products are counted as they run; attention as its causal half, forward and twice back."""
    cfg = ModelConfig(100, 3, 32, 4, 2, 72, max_context=64)
    model, tokens_BT = Transformer(cfg), torch.zeros(2, 64, dtype=torch.int64)
    weights_N = torch.full((128,), 1 / 128)

    def head_fn(hidden_BTD, head_VD):
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1), head_VD, tokens_BT.flatten(), weights_N=weights_N
        ).loss

    with FlopCounterMode(display=False) as counter:
        model(tokens_BT, head_fn=head_fn).backward()
    counts = counter.get_flop_counts()["Global"].items()
    products = sum(count for op, count in counts if "mm" in str(op))
    causal_half = 2 * 2 * 64 * 64 / 2 * cfg.width  # of a row and layer: two products of 2 T T D
    attention = 3 * 2 * cfg.num_layers * causal_half
    assert plan.flops_per_token(cfg, 64) * 128 == products + attention


def test_known_models():
    """Parameters of DeepSeek-LLM 7B (arXiv:2401.02954) and its 42 GFLOP per token at 4,096."""
    model = MODEL_PRESETS["deepseek_llm_7b"]
    assert model.num_parameters == 6_910_365_696
    assert plan.flops_per_token(model, 4096) == pytest.approx(41.96e9, rel=1e-3)


def test_following_the_advice_makes_it_fit():
    """Where a stage does not fit, the flags that the advice names make it fit."""
    cfg = plan.PlanConfig(**plan.PRESETS["deepseekmath_7b"])
    assert [plan.advice(cfg, stage) for stage in ("pretrain", "sft")] == ["fits", "fits"]
    cfg = replace(cfg, activation_checkpointing="none")
    for stage in plan.STAGES:
        text = plan.advice(cfg, stage)
        assert text.startswith("NO; fits with --")
        words = text.split("with ")[1].split()
        flags = {name[2:]: value for name, value in zip(words[::2], words[1::2])}
        changed = replace(cfg, **{k: type(getattr(cfg, k))(v) for k, v in flags.items()})
        assert plan.advice(changed, stage) == "fits"
        assert sum(plan.memory(changed, stage).values()) <= plan.usable(changed)
    assert "smaller model" in plan.advice(replace(cfg, gpu_memory_gb=1.0), "pretrain")


def test_states_and_traffic_of_a_sharded_model():
    """12 bytes per parameter between steps, over W; two gathers a micro-batch, one reduction."""
    cfg = plan.PlanConfig(num_gpus=4, pretrain_rows=16, micro_batch_size=2)
    parameters = cfg.model.num_parameters
    assert sum(plan.state_bytes(cfg, "pretrain").values()) == 12 * parameters / 4
    received = plan.communication_bytes(cfg, "pretrain")
    share = parameters * 3 / 4
    assert received == {"gather": 2 * 2 * 2 * share, "reduce": 4 * share}
