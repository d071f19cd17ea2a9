"""Time one whole GRPO step beside trl's GRPOTrainer: sampling, rewards, reference pass, update.

    python bench/grpo_step.py                        # the CPU table: all samples 128 tokens long
    python bench/grpo_step.py --mean_length 0.4      # ids that end a sample: 0.4 of that on average
    python bench/grpo_step.py --device cuda --preset deepseek_llm_1b3     # one GPU, ours alone

Needs the extra [peers]. Both start from the same weights and answer the same prompts with as many
outputs, judged by the same function of their text: the share of even numbers. Both do one fused
AdamW step of GRPO (Eq. 3 with std, k3 KL of beta 0.04 to a reference, no sampling tricks) with the
same micro-batch size, in fp32. trl samples by transformers' generate (no vLLM), without gradient
checkpointing, which would save it memory and cost time. Each lives in a process of its own, so that
peak memory is its own; their steps take turns. What each sampled must have the same number of
outputs, the same lengths where no sample ends early, and the same mean reward up to chance; that
losses agree on the same rollouts is a test's. A GPU's floor: the bytes of every decoding step at
--bandwidth_tb_s, and the FLOPs of reference pass and update at --tflops. Writes a JSON file.
"""

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import peak_bytes, record, save

from kernels import Objective
from nanomath.advantages import outcome_advantages, output_weights
from nanomath.base.config import opt, parse, to_json
from nanomath.dist import cleanup, make_replica, refresh_replica, setup, shard
from nanomath.engine.stream import sample_groups
from nanomath.grpo import policy_update, response_logprobs
from nanomath.hub.hf import load_hf, save_hf
from nanomath.measure.plan import flops_per_token
from nanomath.model import MODEL_PRESETS, ModelConfig, Transformer
from nanomath.optim import make_adamw
from nanomath.rollouts import make_batch
from nanomath.run.metrics import Clock

LR, BETAS, MAX_GRAD_NORM, CLIP_EPS, KL_COEF = 1e-6, (0.9, 0.95), 1.0, 0.2, 0.04


@dataclass(frozen=True)
class BenchConfig:
    num_layers: int = opt(4, "transformer blocks", low=1)
    width: int = opt(256, "model width D", low=1)
    num_heads: int = opt(4, "query heads H, and as many key and value heads", low=1)
    ffn_width: int = opt(688, "feed-forward width F", low=1)
    vocab_size: int = opt(32_000, "vocabulary V", low=2)
    num_prompts: int = opt(8, "questions per step P", low=1)
    group_size: int = opt(16, "outputs per question G", low=2)
    prompt_tokens: tuple[int, ...] = opt((64, 128), "shortest and longest prompt", low=1)
    new_tokens: int = opt(128, "tokens per output at most", low=2)
    mean_length: float = opt(1.0, "mean length as a share of that; 1: no sample ends", high=1.0)
    micro_batch_size: int = opt(16, "outputs per forward and backward pass", low=1)
    max_rows: int = opt(512, "outputs sampled at a time (ours)", low=1)
    device: str = opt("cpu", "cpu: fp32, beside trl; cuda: bf16, alone", choices=("cpu", "cuda"))
    threads: int = opt(2, "torch threads of each process", low=1)
    num_steps: int = opt(5, "timed steps of each side", low=2)
    num_warmup: int = opt(1, "steps of each side before timing", low=1)
    bandwidth_tb_s: float = opt(3.0, "of the GPU's memory, as a copy measures it", low=0.1)
    tflops: float = opt(800.0, "bf16 products of the GPU, as measured", low=0.1)
    out: str = opt("bench/results", "folder of the JSON file")
    worker: str = opt("", "internal: which side this process is", choices=("", "nanomath", "trl"))
    weights: str = opt("", "internal: the Hugging Face folder both sides start from")


PRESETS = {
    name: {
        "num_layers": shape.num_layers, "width": shape.width, "num_heads": shape.num_heads,
        "ffn_width": shape.ffn_width, "vocab_size": shape.vocab_size, "num_prompts": 16,
        "group_size": 64, "prompt_tokens": (128, 128), "new_tokens": 1024, "mean_length": 0.5,
        "device": "cuda", "num_steps": 3,
    }
    for name, shape in MODEL_PRESETS.items()
}  # fmt: skip


def model_config(cfg: BenchConfig) -> ModelConfig:
    heads = (cfg.num_heads, cfg.num_heads)
    context = max(cfg.prompt_tokens) + cfg.new_tokens + 1  # one to spare: transformers warns
    sizes = (cfg.vocab_size, cfg.num_layers, cfg.width, *heads, cfg.ffn_width)
    return ModelConfig(*sizes, max_context=context)


def step_prompts(cfg: BenchConfig, step: int) -> list[list[int]]:
    """Return the prompts of a step; id 0 is trl's padding."""
    rng = random.Random(step)
    lengths = [rng.randint(*cfg.prompt_tokens) for _ in range(cfg.num_prompts)]
    return [[rng.randrange(1, cfg.vocab_size) for _ in range(length)] for length in lengths]


def end_ids(cfg: BenchConfig) -> list[int]:
    """Return so many ids that end a sample that its length is mean_length on average."""
    # E[min(length, n)] = (1 - exp(-r)) / r n where the chance to end is r / n per token.
    low, high = 0.0, 100.0
    for _ in range(60):
        rate = (low + high) / 2
        share = (1 - 2.718281828**-rate) / rate
        low, high = (rate, high) if share > cfg.mean_length else (low, rate)
    count = round(cfg.vocab_size * rate / cfg.new_tokens) if cfg.mean_length < 1 else 0
    return random.Random(0).sample(range(1, cfg.vocab_size), count)


def reward(text: str) -> float:
    """Return the share of even numbers in an output: each id is written as itself."""
    words = text.split()
    return sum(int(word) % 2 == 0 for word in words) / max(len(words), 1)


# ---------------------------------------------------------------------------- the two sides


def run_ours(cfg: BenchConfig, begin, end) -> None:
    """Make steps as train_grpo.train does; `begin` waits for the turn, `end` reports a step."""
    dist = setup(cfg.device, cfg.threads)
    policy, reference = (shard(load_hf(cfg.weights)[0].to(dist.device), dist) for _ in range(2))
    reference.requires_grad_(False)
    sampling_model = make_replica(policy, dist)
    optimizer = make_adamw(policy, lr=LR, betas=BETAS, weight_decay=0.0)
    objective = Objective(CLIP_EPS, CLIP_EPS, KL_COEF, temperature=1.0)
    passes = {"micro_batch_size": cfg.micro_batch_size}
    ends = end_ids(cfg)
    for step in range(cfg.num_warmup + cfg.num_steps):
        begin()
        clock = Clock(dist.device)
        prompts = step_prompts(cfg, step)
        refresh_replica(sampling_model, policy, dist)
        rollouts = sample_groups(
            sampling_model, prompts, cfg.group_size, max_new_tokens=cfg.new_tokens, eos_ids=ends,
            seed=0, step=step, max_rows=cfg.max_rows,
        )  # fmt: skip
        clock.lap("sampling")
        lengths = rollouts.lengths_PG.flatten().tolist()
        tokens = rollouts.tokens_PGT.flatten(0, 1).tolist()
        texts = [" ".join(map(str, row[:length])) for row, length in zip(tokens, lengths)]
        rewards_PG = torch.tensor([*map(reward, texts)]).view(rollouts.lengths_PG.shape)
        weights_PG = output_weights(rewards_PG, rollouts, max_new_tokens=cfg.new_tokens, dist=dist)
        batch = make_batch(
            prompts, rollouts, outcome_advantages(rewards_PG), weights_PG,
            num_prompts=cfg.num_prompts, world_size=1,
        )  # fmt: skip
        clock.lap("rewards")
        batch.ref_logp_N = response_logprobs(
            reference, batch, temperature=1.0, device=dist.device, **passes
        )
        clock.lap("logprobs")
        policy_update(
            policy, optimizer, batch, objective, lr=LR, max_grad_norm=MAX_GRAD_NORM, dist=dist,
            **passes,
        )  # fmt: skip
        clock.lap("update")
        end(lengths, rewards_PG.mean().item(), clock.seconds)
    cleanup(dist)


def run_theirs(cfg: BenchConfig, begin, end) -> None:
    """Let GRPOTrainer make the steps; a callback waits for the turn and reports."""
    import tokenizers
    import transformers
    import trl
    from datasets import Dataset

    torch.set_num_threads(cfg.threads)
    words = tokenizers.Tokenizer(
        # The id of its EOS is beyond the model's: no sample ends by it.
        tokenizers.models.WordLevel({str(i): i for i in range(cfg.vocab_size + 1)})
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=str(cfg.vocab_size), pad_token="0"
    )
    num_steps, micro = cfg.num_warmup + cfg.num_steps, cfg.micro_batch_size
    prompts = [prompt for step in range(num_steps) for prompt in step_prompts(cfg, step)]
    seen: dict = {}

    def judge(completions, completion_ids, **_) -> list[float]:
        rewards = [reward(text) for text in completions]
        seen.update(lengths=[*map(len, completion_ids)], reward=statistics.mean(rewards))
        return rewards

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            begin()

        def on_step_end(self, *_, **__):
            end(seen["lengths"], seen["reward"], {})

    args = trl.GRPOConfig(
        output_dir=cfg.weights, max_steps=num_steps, report_to="none", save_strategy="no",
        disable_tqdm=True, logging_strategy="no", use_cpu=True, bf16=False,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=cfg.num_prompts * cfg.group_size // micro,
        num_generations=cfg.group_size, max_completion_length=cfg.new_tokens, temperature=1.0,
        use_vllm=False, beta=KL_COEF, epsilon=CLIP_EPS, num_iterations=1, loss_type="grpo",
        scale_rewards="group", learning_rate=LR, lr_scheduler_type="constant", adam_beta1=BETAS[0],
        adam_beta2=BETAS[1], max_grad_norm=MAX_GRAD_NORM, optim="adamw_torch_fused",
        gradient_checkpointing=False, shuffle_dataset=False,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    rows = [{"prompt": " ".join(map(str, prompt))} for prompt in prompts]
    trl.GRPOTrainer(
        cfg.weights, judge, args, Dataset.from_list(rows), processing_class=tokenizer,
        callbacks=[Turns()],
    ).train()  # fmt: skip


def work(cfg: BenchConfig) -> None:
    """Make a step for each line on stdin; answer it with one JSON line."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a trainer prints
    if cfg.worker == "trl":
        import trl.trainer.grpo_trainer  # noqa: F401  # counts as importing
    imported = peak_bytes(cfg.device)
    start = [0.0, 0.0]

    def begin() -> None:
        if not sys.stdin.readline():
            raise SystemExit(1)
        start[:] = time.perf_counter(), time.process_time()

    def end(lengths: list[int], mean_reward: float, phases: dict[str, float]) -> None:
        answer = {
            "seconds": time.perf_counter() - start[0],
            "cpu_seconds": time.process_time() - start[1],
            "lengths": lengths,
            "reward": mean_reward,
            "phases": phases,
            "peak": peak_bytes(cfg.device),
            "imported": imported,
        }
        print(json.dumps(answer), file=replies, flush=True)

    (run_ours if cfg.worker == "nanomath" else run_theirs)(cfg, begin, end)


# ---------------------------------------------------------------------------- the table


def measure(cfg: BenchConfig) -> dict[str, list[dict]]:
    """Run the sides in turn; return one row per timed step and side."""
    sides = ("nanomath", "trl") if cfg.device == "cpu" else ("nanomath",)
    rows = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder) / "weights"
        model = Transformer(model_config(cfg))
        model.init_weights(0)
        save_hf(model, None, path, dtype=torch.float32)
        del model
        ends = {"eos_token_id": end_ids(cfg) or None, "pad_token_id": 0}
        (path / "generation_config.json").write_text(json.dumps(ends))
        values = {k: v for k, v in asdict(cfg).items() if k not in ("worker", "weights")}
        flags = [word for k, v in values.items() for word in _flag(k, v)]
        workers = {}
        for side in sides:
            command = [sys.executable, __file__, *flags, "--weights", path, "--worker", side]
            # Threads of one side must not spin while the other side has its turn.
            threads = {"GOMP_SPINCOUNT": "20000", "OMP_NUM_THREADS": str(cfg.threads)}
            workers[side] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, **threads, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            stack.callback(workers[side].kill)
        for step in range(cfg.num_warmup + cfg.num_steps):
            for side in sides if step % 2 else sides[::-1]:
                workers[side].stdin.write("\n")
                workers[side].stdin.flush()
                line = workers[side].stdout.readline()
                if not line:
                    raise SystemExit(f"{side} ended in step {step}: see above")
                rows[side].append(json.loads(line))
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    check(cfg, rows)
    return {side: values[cfg.num_warmup :] for side, values in rows.items()}


def _flag(name: str, value) -> list[str]:
    return [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]


def check(cfg: BenchConfig, rows: dict[str, list[dict]]) -> None:
    """Raise SystemExit unless every side sampled as many outputs, of like lengths and rewards."""
    for side, values in rows.items():
        for step, row in enumerate(values):
            lengths = row["lengths"]
            mean = statistics.mean(lengths) / cfg.new_tokens
            # Four standard deviations: a length has at most 0.5, a number of two kinds 0.5.
            spread = 2.0 / len(lengths) ** 0.5 if cfg.mean_length < 1 else 0.0
            if (
                len(lengths) != cfg.num_prompts * cfg.group_size
                or abs(mean - cfg.mean_length) > spread
                or abs(row["reward"] - 0.5) > 0.5 * 4 / len(lengths) ** 0.5
            ):
                raise SystemExit(
                    f"{side}, step {step}: {len(lengths)} outputs, mean length {mean:.3f} of the "
                    f"maximum, mean reward {row['reward']:.3f}: not the work that was asked for"
                )


def summary(cfg: BenchConfig, rows: dict[str, list[dict]]) -> dict:
    result: dict = {}
    for side, values in rows.items():
        tokens = [sum(row["lengths"]) for row in values]
        result[side] = {
            "seconds": statistics.median(row["seconds"] for row in values),
            "seconds_of_each_step": [row["seconds"] for row in values],
            "cpu_seconds": statistics.median(row["cpu_seconds"] for row in values),
            "tokens_per_s": statistics.median(
                count / row["seconds"] for count, row in zip(tokens, values)
            ),
            "mean_length": statistics.mean(tokens) / (cfg.num_prompts * cfg.group_size),
            "peak_mb": values[-1]["peak"] / 1e6,
            "peak_above_import_mb": (values[-1]["peak"] - values[-1]["imported"]) / 1e6,
        }
        if values[0]["phases"]:
            result[side]["phases"] = {
                name: statistics.median(row["phases"][name] for row in values)
                for name in values[0]["phases"]
            }
    if "trl" in rows:
        ours, theirs = result["nanomath"], result["trl"]
        # By tokens: where samples end by chance the two do not sample the same number.
        pairs = [
            (sum(a["lengths"]) / a["seconds"]) / (sum(b["lengths"]) / b["seconds"])
            for a, b in zip(rows["nanomath"], rows["trl"], strict=True)
        ]
        result["ratio"] = {
            "tokens_per_s": statistics.median(pairs),
            "of_pairs_low_high": [min(pairs), max(pairs)],
            "cpu_seconds": theirs["cpu_seconds"] / ours["cpu_seconds"],
            "peak": ours["peak_mb"] / theirs["peak_mb"],
            "peak_above_import": ours["peak_above_import_mb"] / theirs["peak_above_import_mb"],
        }
    else:
        result["nanomath"]["floor_seconds"] = floor_seconds(cfg, rows["nanomath"])
    return result


def floor_seconds(cfg: BenchConfig, rows: list[dict]) -> float:
    """Return the least seconds of a step: decoding reads weights, prompts and own keys and values
    of max_rows rows at a time; reference pass and update are 4/3 of a training pass."""
    shape = model_config(cfg)
    lengths = [length for row in rows for length in row["lengths"]]
    tokens, prompt = sum(lengths) / len(rows), max(cfg.prompt_tokens)
    kv = 2 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_size  # bf16
    num_steps = tokens / min(cfg.max_rows, cfg.num_prompts * cfg.group_size)
    weights = 2 * (shape.num_parameters - shape.vocab_size * shape.width)
    own = sum(length * length / 2 for length in lengths) / len(rows) * kv
    prompts = min(cfg.num_prompts, cfg.max_rows / cfg.group_size) * prompt * kv
    sampling = (num_steps * (weights + prompts) + own) / (cfg.bandwidth_tb_s * 1e12)
    scored = tokens + cfg.num_prompts * cfg.group_size * prompt
    context = prompt + round(tokens / (cfg.num_prompts * cfg.group_size))
    return sampling + 4 / 3 * scored * flops_per_token(shape, context) / (cfg.tflops * 1e12)


def main() -> None:
    cfg = parse(BenchConfig, PRESETS, description=__doc__)
    if cfg.worker:
        return work(cfg)
    if cfg.num_prompts * cfg.group_size % cfg.micro_batch_size:
        raise SystemExit("--micro_batch_size must divide num_prompts times group_size")
    result = summary(cfg, measure(cfg))
    result |= record(cfg.device, *(("trl", "transformers") if cfg.device == "cpu" else ()))
    settings = {k: v for k, v in to_json(cfg).items() if k not in ("worker", "weights")}
    result["settings"] = settings
    print(f"{'':10}{'seconds':>9}{'CPU s':>8}{'tokens/s':>10}{'length':>8}{'peak MB':>9}"
          f"{'above import':>14}")  # fmt: skip
    for side in (name for name in ("nanomath", "trl") if name in result):
        row = result[side]
        print(
            f"{side:10}{row['seconds']:9.2f}{row['cpu_seconds']:8.1f}{row['tokens_per_s']:10.0f}"
            f"{row['mean_length']:8.1f}{row['peak_mb']:9.0f}{row['peak_above_import_mb']:14.0f}"
        )
    phases = ", ".join(f"{k} {v:.2f}" for k, v in result["nanomath"]["phases"].items())
    print(f"seconds of nanomath's phases: {phases}")
    if "ratio" in result:
        ratio = result["ratio"]
        low, high = ratio["of_pairs_low_high"]
        print(
            f"tokens/s {ratio['tokens_per_s']:.2f}x (pairs: {low:.2f} to {high:.2f}), CPU seconds "
            f"{ratio['cpu_seconds']:.2f}x, peak memory {ratio['peak']:.2f}x, above importing "
            f"{ratio['peak_above_import']:.2f}x"
        )
    else:
        print(f"floor: {result['nanomath']['floor_seconds']:.1f} s")
    name = f"grpo_step_{cfg.device}" + (f"_length_{cfg.mean_length:g}" * (cfg.mean_length < 1))
    save(result, Path(cfg.out) / f"{name}.json")
    return None


if __name__ == "__main__":
    main()
