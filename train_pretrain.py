r"""Pretrain a base model on the recalled corpus (Sec. 2.2, 2.3).

    python train_pretrain.py --preset cpu --corpus runs/corpus/corpus.jsonl \
        --tokenizer runs/tokenizer --run_dir runs/base
    torchrun --nproc_per_node 8 train_pretrain.py          # the paper's 1.3B ablation

Writes a run folder: checkpoints/, metrics.jsonl, plots/. The same command continues a run.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import linear_token_logprobs
from nanomath.base.config import RunConfig, one_line_errors, opt, parse
from nanomath.base.files import read_jsonl
from nanomath.base.log import plot_metrics, progress
from nanomath.data import TokenShards, describe_source, epoch_order, write_shards
from nanomath.dist import Dist, all_reduce_sum, shard
from nanomath.model import ModelConfig, Transformer
from nanomath.optim import SCHEDULES, make_adamw
from nanomath.run import presets
from nanomath.run.guard import RunLock, StopSignal
from nanomath.run.loop import Run, open_run, supervised_update
from nanomath.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    run_dir: str = opt("runs/base", "folder of this run", may_change=True)
    corpus: str = opt(
        "runs/speedrun-cpu/corpus/corpus.jsonl", "JSON lines with a text field", may_change=True
    )
    valid: str = opt(
        "runs/speedrun-cpu/corpus/valid.jsonl", "held-out pages, likewise", may_change=True
    )
    tokenizer: str = opt(
        "runs/speedrun-cpu/tokenizer", "folder with tokenizer.json", may_change=True
    )
    num_layers: int = opt(24, "transformer blocks, Sec. 2.2: DeepSeek-LLM 1.3B", low=1)
    width: int = opt(2048, "model width D", low=1)
    num_heads: int = opt(16, "query heads H", low=1)
    num_kv_heads: int = opt(16, "key and value heads K", low=1)
    ffn_width: int = opt(5504, "feed-forward width F", low=1)
    context: int = opt(4096, "tokens per row, Sec. 2.2", low=2)
    batch_size: int = opt(1024, "rows per step, all ranks together: 4M tokens, Sec. 2.2", low=1)
    num_steps: int = opt(35763, "optimizer steps: 150B tokens, Sec. 2.2", low=1)
    lr: float = opt(5.3e-4, "peak learning rate, Sec. 2.2", low=0.0)
    schedule: str = opt("multi_step", "learning rate over steps, Sec. 2.2", choices=(*SCHEDULES,))
    warmup_steps: int = opt(2000, "steps of linear warm-up, Sec. 2.2", low=0)
    weight_decay: float = opt(0.1, "AdamW, Sec. 2.2", low=0.0)
    beta1: float = opt(0.9, "AdamW, Sec. 2.2", low=0.0, below=1.0)
    beta2: float = opt(0.95, "AdamW, Sec. 2.2", low=0.0, below=1.0)
    eval_interval: int = opt(500, "steps between validations", low=1)
    max_valid_tokens: int = opt(1_000_000, "held-out tokens per validation at most", low=1)


def tokenized(name: str, path: str, cfg: PretrainConfig, tokenizer: Tokenizer, dist: Dist):
    """Tokenize a JSONL file into run_dir/tokens once, on the first rank; return its shards.

    Shards of another file or tokenizer than now given are refused, damaged ones named.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing: make it with build_corpus.py")
    tokenizer_path = Path(cfg.tokenizer) / "tokenizer.json"
    folder = Path(cfg.run_dir) / "tokens" / name
    if dist.is_main and folder.exists():
        known = TokenShards(folder).source
        given = describe_source(path, tokenizer_path, known)
        if any(given[key] != known[key] for key in ("sha256", "tokenizer_sha256")):
            raise ValueError(
                f"{folder} was tokenized from another file or with another tokenizer than now "
                "given: give another --run_dir or the old ones, or remove that folder"
            )
    elif dist.is_main:
        rows = progress(read_jsonl(path, required=("text",)), desc=f"tokenize {name}", unit="page")
        documents = (tokenizer.encode(row["text"], bos=True, eos=True) for _, row in rows)
        write_shards(
            folder,
            documents,
            vocab_size=tokenizer.vocab_size,
            token_num_bytes=tokenizer.token_num_bytes,
            source=describe_source(path, tokenizer_path),
        )
    while not folder.exists():  # as long as it takes: a collective would time out
        time.sleep(1.0)
    shards = TokenShards(folder)
    shards.verify(slice(dist.rank, None, dist.world_size))
    return shards


@torch.no_grad()
def bits_per_byte(
    model: torch.nn.Module,
    valid: TokenShards,
    cfg: PretrainConfig,
    dist: Dist,
    stop: StopSignal | None = None,
) -> float | None:
    """Return the model's code length of held-out text in bits per byte of text; None when a signal
    to `stop` ended that, on all ranks alike."""
    num_windows = max(1, cfg.max_valid_tokens // cfg.context)  # whatever the batches
    rows_per_batch = cfg.micro_batch_size * dist.world_size
    sums = {"nats": 0.0, "tokens": 0.0}
    batches = valid.sequential(cfg.context, rows_per_batch)
    for first, tokens_BT in zip(range(0, num_windows, rows_per_batch), batches, strict=False):
        if stop is not None and stop.requested(dist):
            return None
        tokens_BT = tokens_BT[: num_windows - first]
        # Every rank runs every batch's share; the last batch may have fewer rows than ranks.
        mine_BT = tokens_BT[dist.rank :: dist.world_size].to(dist.device)
        has_rows = len(mine_BT) > 0
        mine_BT = mine_BT if has_rows else tokens_BT[:1].to(dist.device)

        def head_fn(hidden_BTD, head_VD, targets_BT=mine_BT[:, 1:]):
            return linear_token_logprobs(hidden_BTD.flatten(0, 1), head_VD, targets_BT.flatten())

        logp_N, _ = model(mine_BT[:, :-1], head_fn=head_fn)
        if has_rows:
            sums["nats"] -= float(logp_N.double().sum())
            sums["tokens"] += logp_N.numel()
    totals = all_reduce_sum(sums, dist)
    bytes_per_token = valid.num_bytes / valid.num_tokens
    return totals["nats"] / math.log(2) / (totals["tokens"] * bytes_per_token)


def train(cfg: PretrainConfig, dist: Dist, lock: RunLock) -> None:
    with one_line_errors():
        tokenizer = Tokenizer.load(cfg.tokenizer)
        train_tokens = tokenized("train", cfg.corpus, cfg, tokenizer, dist)
        valid_tokens = tokenized("valid", cfg.valid, cfg, tokenizer, dist)
        num_windows = train_tokens.num_windows(cfg.context)  # raises where there is none
        if valid_tokens.num_tokens < 2:
            raise ValueError(f"{cfg.valid} holds no text to validate on")
        widths = {name: getattr(cfg, name) for name in presets.SHAPE}
        model = Transformer(ModelConfig(tokenizer.vocab_size, **widths, max_context=cfg.context))
        model.init_weights(cfg.seed)
        model = shard(model, dist, cfg.activation_checkpointing, cfg.compile)
        optimizer = make_adamw(
            model, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay
        )
        data = {
            "--corpus": train_tokens.source["sha256"],
            "--valid": valid_tokens.source["sha256"],
            "--tokenizer": train_tokens.source["tokenizer_sha256"],
        }
        run = Run(cfg, dist, lock, {"model": model}, optimizer, tokenizer, data)
    for step in run.steps(cfg.num_steps, desc="pretrain"):
        batch = train_tokens.train_batch(step, cfg.batch_size, cfg.context, cfg.seed)
        metrics = supervised_update(run, cfg, step, batch)
        if (step + 1) % cfg.eval_interval == 0 or step + 1 == cfg.num_steps:
            bits = bits_per_byte(model, valid_tokens, cfg, dist, run.signal)
            if bits is None:
                run.say(f"step {step}: the validation was left")
            else:
                metrics["valid_bits_per_byte"] = bits
        windows = epoch_order(num_windows, step, cfg.batch_size, cfg.seed)
        shown = ("loss", "valid_bits_per_byte")
        run.log(step, metrics, shown, batch=("first_tokens", windows * cfg.context))
    if dist.is_main:
        plot_metrics(
            cfg.run_dir,
            [
                ("loss (nats per token)", ["loss"]),
                ("validation (bits per byte)", ["valid_bits_per_byte"]),
                ("learning rate", ["lr"]),
            ],
        )
    run.close()


def main() -> None:
    cfg = parse(PretrainConfig, presets.PRETRAIN, description=__doc__)
    with open_run(cfg) as (dist, lock):
        train(cfg, dist, lock)


if __name__ == "__main__":
    main()
