"""Time one training step beside transformers' LlamaForCausalLM: tokens/s, peak memory, MFU.

    python bench/pretrain_step.py --threads 2                                   # the CPU table
    python bench/pretrain_step.py --device cuda --preset deepseek_llm_1b3       # one GPU, bf16

Both start from the same weights, see the same tokens and do what their trainers do: forward,
backward, clipping, fused AdamW. Each lives in a process of its own, so that peak memory is its own;
the steps take turns, so that whatever else the machine does hits both alike, and CPU seconds (of
all threads) stand beside wall time. The losses of every step must agree. Writes a JSON file.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import peak_bytes, record, save
from safetensors.torch import load_file, save_file

from nanomath.base.config import opt, parse, to_json
from nanomath.data import TrainBatch
from nanomath.dist import cleanup, setup, shard
from nanomath.hub.hf import llama_name
from nanomath.measure.plan import PEAK_FLOPS, flops_per_token
from nanomath.model import MODEL_PRESETS, ModelConfig, Transformer
from nanomath.optim import make_adamw, supervised_step

LR, BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, (0.9, 0.95), 0.1, 1.0
SIDES = ("nanomath", "transformers")


@dataclass(frozen=True)
class BenchConfig:
    num_layers: int = opt(4, "transformer blocks", low=1)
    width: int = opt(256, "model width D", low=1)
    num_heads: int = opt(4, "query heads H, and as many key and value heads", low=1)
    ffn_width: int = opt(688, "feed-forward width F", low=1)
    vocab_size: int = opt(32_000, "vocabulary V", low=2)
    batch_size: int = opt(8, "rows per step", low=1)
    context: int = opt(512, "tokens per row", low=1)
    micro_batch_size: int = opt(8, "rows per forward and backward pass", low=1)
    device: str = opt("cpu", "cpu: fp32; cuda: bf16 products", choices=("cpu", "cuda"))
    threads: int = opt(2, "torch threads of each process", low=1)
    compile: bool = opt(False, "torch.compile: our blocks, their model")
    num_steps: int = opt(15, "timed steps of each side", low=3)
    num_warmup: int = opt(3, "steps of each side before timing", low=1)
    out: str = opt("bench/results", "folder of the JSON file")
    worker: str = opt("", "internal: which side this process is", choices=("", *SIDES))
    weights: str = opt("", "internal: file of the weights both sides start from")


PRESETS = {
    name: {
        "num_layers": shape.num_layers, "width": shape.width, "num_heads": shape.num_heads,
        "ffn_width": shape.ffn_width, "vocab_size": shape.vocab_size,
        "context": 4096, "batch_size": 4, "micro_batch_size": 4, "device": "cuda",
    }
    for name, shape in MODEL_PRESETS.items()
}  # fmt: skip


def model_config(cfg: BenchConfig) -> ModelConfig:
    heads = (cfg.num_heads, cfg.num_heads)
    return ModelConfig(
        cfg.vocab_size, cfg.num_layers, cfg.width, *heads, cfg.ffn_width, max_context=cfg.context
    )


def step_tokens(cfg: BenchConfig, step: int) -> torch.Tensor:
    """Return the tokens [B, T + 1] of a step; small ids are frequent, as in text."""
    generator = torch.Generator().manual_seed(step)
    uniform = torch.rand(cfg.batch_size, cfg.context + 1, generator=generator)
    return (cfg.vocab_size**uniform).long().clamp(max=cfg.vocab_size) - 1


# ---------------------------------------------------------------------------- the two sides


def our_step(cfg: BenchConfig):
    dist = setup(cfg.device, cfg.threads)
    model = Transformer(model_config(cfg))
    model.load_state_dict(load_file(cfg.weights))
    model = shard(model.to(dist.device), dist, compile="on" if cfg.compile else "off")
    optimizer = make_adamw(model, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    # The last token is a target only, and the first is none.
    weights_BT = torch.full((cfg.batch_size, cfg.context + 1), 1 / (cfg.batch_size * cfg.context))
    weights_BT[:, -1] = 0.0

    def step(tokens_BT: torch.Tensor) -> float:
        return supervised_step(
            model, optimizer, TrainBatch(tokens_BT, weights_BT), lr=LR,
            max_grad_norm=MAX_GRAD_NORM, micro_batch_size=cfg.micro_batch_size, dist=dist,
        )["loss"]  # fmt: skip

    return step, lambda: cleanup(dist)


def their_step(cfg: BenchConfig):
    import transformers

    torch.set_num_threads(cfg.threads)
    shape = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size, num_hidden_layers=cfg.num_layers, hidden_size=cfg.width,
        num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_heads,
        intermediate_size=cfg.ffn_width, rms_norm_eps=1e-6, max_position_embeddings=cfg.context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(shape)
    model.load_state_dict({llama_name(k): v for k, v in load_file(cfg.weights).items()})
    model.to(cfg.device).train()
    if cfg.compile:
        model.compile()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    # Ours does not decay norms; at this rate and these few steps the losses cannot show it.

    def step(tokens_BT: torch.Tensor) -> float:
        total = 0.0
        for part_BT in tokens_BT.to(cfg.device).split(cfg.micro_batch_size):
            share = part_BT.shape[0] / cfg.batch_size
            with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.device == "cuda"):
                targets_BT = part_BT[:, 1:].contiguous()
                out = model(part_BT[:, :-1], labels=targets_BT, shift_labels=targets_BT)
            (out.loss * share).backward()
            total = total + out.loss.detach() * share
            del out
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return step, lambda: None


def work(cfg: BenchConfig) -> None:
    """Answer each line `STEP` on stdin with one JSON line: seconds, loss, peak bytes so far."""
    if cfg.worker == "transformers":
        import transformers.models.llama.modeling_llama  # noqa: F401  # counts as importing
    imported = peak_bytes(cfg.device)
    step, close = (our_step if cfg.worker == "nanomath" else their_step)(cfg)
    for line in sys.stdin:
        tokens_BT = step_tokens(cfg, int(line))
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = step(tokens_BT)  # reads the loss: waits for the device
        answer = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_start,
            "loss": loss,
            "peak": peak_bytes(cfg.device),
            "imported": imported,
        }
        print(json.dumps(answer), flush=True)
    close()


# ---------------------------------------------------------------------------- the table


def measure(cfg: BenchConfig) -> dict[str, list[dict]]:
    """Run both sides in turn; return one row per timed step and side."""
    rows = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "weights.safetensors")
        model = Transformer(model_config(cfg))
        model.init_weights(0)
        save_file(model.state_dict(), path)
        del model
        internal = ("worker", "weights", "compile")
        flags = [f"--{k}={v}" for k, v in asdict(cfg).items() if k not in internal]
        flags += [f"--weights={path}"] + ["--compile"] * cfg.compile
        workers = {
            side: subprocess.Popen(
                [sys.executable, __file__, *flags, f"--worker={side}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                # Threads of one side must not spin while the other side has its turn.
                env={**os.environ, "GOMP_SPINCOUNT": "20000", "OMP_NUM_THREADS": str(cfg.threads)},
            )
            for side in SIDES
        }  # fmt: skip
        for step in range(cfg.num_warmup + cfg.num_steps):
            for side in SIDES if step % 2 else SIDES[::-1]:
                workers[side].stdin.write(f"{step}\n")
                workers[side].stdin.flush()
                rows[side].append(json.loads(workers[side].stdout.readline()))
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    for step, (ours, theirs) in enumerate(zip(*rows.values())):
        # Both start from the same weights; Adam lets what rounding differs in grow with the steps.
        tolerance = 2e-5 * (step + 1) if cfg.device == "cpu" else 2e-2
        if abs(ours["loss"] - theirs["loss"]) > tolerance:
            raise SystemExit(f"step {step}: losses {ours['loss']} and {theirs['loss']} differ")
    return {side: values[cfg.num_warmup :] for side, values in rows.items()}


def summary(cfg: BenchConfig, rows: dict[str, list[dict]]) -> dict:
    tokens = cfg.batch_size * cfg.context
    result = {}
    for side, values in rows.items():
        seconds = statistics.median(row["seconds"] for row in values)
        result[side] = {
            "seconds": seconds,
            "cpu_seconds": statistics.median(row["cpu_seconds"] for row in values),
            "tokens_per_s": tokens / seconds,
            "peak_mb": values[-1]["peak"] / 1e6,
            "peak_above_import_mb": (values[-1]["peak"] - values[-1]["imported"]) / 1e6,
            "loss": values[-1]["loss"],
        }
        if cfg.device == "cuda":
            flops = flops_per_token(model_config(cfg), cfg.context) * tokens
            result[side]["mfu"] = flops / seconds / PEAK_FLOPS
    ratios = sorted(theirs["seconds"] / ours["seconds"] for ours, theirs in zip(*rows.values()))
    ours, theirs = result.values()
    result["ratio"] = {
        "tokens_per_s": theirs["seconds"] / ours["seconds"],
        "of_each_pair_p10_p50_p90": [ratios[round(q * (len(ratios) - 1))] for q in (0.1, 0.5, 0.9)],
        "cpu_seconds": theirs["cpu_seconds"] / ours["cpu_seconds"],
        "peak": ours["peak_mb"] / theirs["peak_mb"],
        "peak_above_import": ours["peak_above_import_mb"] / theirs["peak_above_import_mb"],
    }
    return result


def main() -> None:
    cfg = parse(BenchConfig, PRESETS, description=__doc__)
    if cfg.worker:
        return work(cfg)
    result = summary(cfg, measure(cfg)) | record(cfg.device, "transformers")
    settings = {k: v for k, v in to_json(cfg).items() if k not in ("worker", "weights")}
    result["settings"] = settings
    print(
        f"{'':14}{'tokens/s':>10}{'seconds':>10}{'CPU s':>8}{'peak MB':>10}{'above import':>14}"
        f"{'MFU':>7}"
    )
    for side in SIDES:
        row = result[side]
        mfu = f"{row['mfu']:7.1%}" if "mfu" in row else f"{'-':>7}"
        print(
            f"{side:14}{row['tokens_per_s']:10.0f}{row['seconds']:10.3f}{row['cpu_seconds']:8.3f}{row['peak_mb']:10.0f}"
            f"{row['peak_above_import_mb']:14.0f}{mfu}"
        )
    ratio = result["ratio"]
    low, middle, high = ratio["of_each_pair_p10_p50_p90"]
    print(
        f"tokens/s {ratio['tokens_per_s']:.2f}x (pairs: {middle:.2f}, 80% in {low:.2f} to"
        f" {high:.2f}),"
        f" CPU seconds {ratio['cpu_seconds']:.2f}x,"
        f" peak memory {ratio['peak']:.2f}x, above importing {ratio['peak_above_import']:.2f}x"
    )
    save(result, Path(cfg.out) / f"pretrain_step_{cfg.device}.json")
    return None


if __name__ == "__main__":
    main()
