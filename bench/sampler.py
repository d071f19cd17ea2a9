"""The group sampler beside transformers' generate: same weights, prompts, lengths, one process.

    python bench/sampler.py                                   # CPU: 4,096 and 32,000 ids
    python bench/sampler.py --device cuda --preset deepseek_llm_1b3 --prompts 1 --group 64 \
        --prompt_tokens 512 512 --new_tokens 512              # one GPU, bf16

The two take turns; the first turn warms up and is not counted. Peer: LlamaForCausalLM.generate,
sampling at temperature 1, no top-k or top-p, dynamic cache, num_return_sequences, left padding.
Rows "mean 0.4": so many ids end a sample that lengths are 0.4 of the maximum on average; there
tokens per second count the tokens of samples, not the padding behind them.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
import transformers
from common import ROOT, record, save

from nanomath.engine.stream import sample_groups
from nanomath.hub.hf import llama_name
from nanomath.model import MODEL_PRESETS, ModelConfig, Transformer


def llama(model: Transformer) -> transformers.LlamaForCausalLM:
    """Return transformers' Llama on the same weights (shared, not copied)."""
    cfg = model.cfg
    peer_cfg = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.width,
        intermediate_size=cfg.ffn_width,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        max_position_embeddings=cfg.max_context,
        rms_norm_eps=cfg.rms_eps,
        rope_theta=cfg.rope_theta,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(model.embedding.weight.device):
        peer = transformers.LlamaForCausalLM(peer_cfg).to(model.embedding.weight.dtype).eval()
    state = {llama_name(name): weight for name, weight in model.state_dict().items()}
    peer.load_state_dict(state, strict=True, assign=True)
    return peer


def run_peer(peer, prompts, args, eos_ids: list[int]) -> int:
    """Generate with the peer; return the number of tokens up to and with each sample's end."""
    width, device = max(map(len, prompts)), peer.device
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    out = peer.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=args.group,
        max_new_tokens=args.new_tokens,
        eos_token_id=eos_ids or None,
        pad_token_id=0,
    )
    ends = torch.isin(out[:, width:], torch.tensor(eos_ids, device=device))
    after = ends.cumsum(1) - ends.long() > 0
    return int((~after).sum())


def launches_per_step(model, prompts, args, settings: dict, steps: int = 64) -> dict:
    """Return kernels run and launches by the host per decode step, over a short profiled call."""
    settings = settings | {"max_new_tokens": steps, "eos_ids": []}
    with torch.profiler.profile() as profile:
        sample_groups(model, prompts, args.group, **settings)
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    calls = {event.key: event.count for event in profile.key_averages()}
    launches = sum(n for name, n in calls.items() if "Launch" in name and name.startswith("cu"))
    return {"kernels_per_step": len(on_gpu) / steps, "launches_per_step": launches / steps}


def compare(cfg: ModelConfig, args, eos_share: float) -> dict:
    """Time both in turns on one model; return the row of the table."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    with torch.device(args.device):
        model = Transformer(cfg).to(dtype).requires_grad_(False)
    model.init_weights(0)
    peer = llama(model)
    rng = random.Random(0)
    prompts = [
        [rng.randrange(cfg.vocab_size) for _ in range(rng.randint(*args.prompt_tokens))]
        for _ in range(args.prompts)
    ]
    eos_ids = rng.sample(range(cfg.vocab_size), round(eos_share * cfg.vocab_size))
    settings = {"max_new_tokens": args.new_tokens, "eos_ids": eos_ids, "max_rows": args.rows}
    seconds: dict[str, list] = {"nanomath": [], "transformers": []}
    tokens: dict[str, list] = {"nanomath": [], "transformers": []}
    for turn in range(args.turns + 1):
        for name in seconds:
            if args.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            if name == "nanomath":
                rollouts = sample_groups(model, prompts, args.group, seed=turn, **settings)
                count = int(rollouts.lengths_PG.sum())
                if args.device == "cuda":
                    peak_gb = torch.cuda.max_memory_allocated() / 1e9
            else:
                count = run_peer(peer, prompts, args, eos_ids)
            if args.device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - began)
                tokens[name].append(count)
    rates = {
        name: [n / s for n, s in zip(tokens[name], seconds[name], strict=True)] for name in seconds
    }
    ratios = [a / b for a, b in zip(rates["nanomath"], rates["transformers"], strict=True)]
    row = {
        "vocabulary": cfg.vocab_size,
        "lengths": "mean 0.4" if eos_ids else "equal",
        "mean_tokens": statistics.mean(tokens["nanomath"]) / (args.prompts * args.group),
        "tokens_per_s": {name: statistics.median(rates[name]) for name in rates},
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratio_low_high": [min(ratios), max(ratios)],
    }
    if args.device == "cuda":
        own = statistics.mean(tokens["nanomath"]) / args.new_tokens  # rows alive in a mean step
        kv = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_size * dtype.itemsize
        weights = cfg.num_parameters - cfg.vocab_size * cfg.width  # the embedding is looked up
        step_bytes = weights * dtype.itemsize + kv * sum(map(len, prompts))
        step_bytes += kv * own * row["mean_tokens"] / 2
        floor_s = args.new_tokens * step_bytes / (args.bandwidth_tb_s * 1e12)
        row["share_of_floor"] = floor_s / statistics.median(seconds["nanomath"])
        row["peak_gb"] = peak_gb
        row |= launches_per_step(model, prompts, args, settings)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=sorted(MODEL_PRESETS), help="else the small model")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 32000])
    parser.add_argument("--eos_shares", type=float, nargs="+", default=None)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--prompt_tokens", type=int, nargs=2, default=(64, 128))
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bandwidth_tb_s", type=float, default=3.0, help="measured by a copy")
    parser.add_argument("--out", type=Path, help="bench/results/sampler-DEVICE.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.preset:
        shapes = [MODEL_PRESETS[args.preset]]
    else:
        shapes = [ModelConfig(size, 4, 256, 8, 4, 688) for size in args.vocabularies]
    # E[min(length, max)] is 0.4 max where the chance to end is 2.23 / max per token.
    eos_shares = [0.0, 2.23 / args.new_tokens] if args.eos_shares is None else args.eos_shares
    rows = [compare(cfg, args, share) for cfg in shapes for share in eos_shares]
    for row in rows:
        low, high = row["ratio_low_high"]
        print(
            f"vocabulary {row['vocabulary']}, lengths {row['lengths']}: "
            f"{row['tokens_per_s']['nanomath']:.0f} against "
            f"{row['tokens_per_s']['transformers']:.0f} tokens/s, "
            f"{row['ratio']:.2f} times ({low:.2f} to {high:.2f})"
        )
        if args.device == "cuda":
            print(
                f"  {100 * row['share_of_floor']:.0f}% of the bandwidth floor, peak "
                f"{row['peak_gb']:.1f} GB, {row['kernels_per_step']:.0f} kernels and "
                f"{row['launches_per_step']:.1f} launches a step"
            )
    result = {**record(args.device, "transformers"), "threads": args.threads, "rows": rows}
    save(result, args.out or ROOT / "bench" / "results" / f"sampler-{args.device}.json")


if __name__ == "__main__":
    main()
