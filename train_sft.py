"""Tune a base model on worked solutions (Sec. 3).

    python -m nanomath.tasks.countdown --preset cpu --out runs/sft.jsonl
    python train_sft.py --preset cpu --init runs/base --data runs/sft.jsonl --run_dir runs/sft

Examples are packed: concatenated at random up to the context, positions restart and attention stays
inside each. The loss is on solution tokens only, every one with the same weight.
"""

from dataclasses import dataclass

from nanomath.base.config import RunConfig, one_line_errors, opt, parse
from nanomath.base.files import content_sha256, read_examples
from nanomath.base.log import plot_metrics
from nanomath.data import PackedExamples, encode_examples, epoch_order
from nanomath.dist import Dist
from nanomath.optim import SCHEDULES, make_adamw
from nanomath.run import presets
from nanomath.run.guard import RunLock
from nanomath.run.loop import Run, load_start, open_run, supervised_update
from nanomath.text.chat import CHOICES


@dataclass(frozen=True)
class SFTConfig(RunConfig):
    run_dir: str = opt("runs/sft", "folder of this run", may_change=True)
    init: str = opt(
        "runs/speedrun-cpu/base",
        "run folder, checkpoint or Hugging Face folder to start from",
        may_change=True,
    )
    data: str = opt(
        "runs/speedrun-cpu/solutions.jsonl", "JSON lines: prompt, solution", may_change=True
    )
    chat_template: str = opt(
        "auto", "layout of a prompt, see chat.py; auto: as trained, else plain", choices=CHOICES
    )
    context: int = opt(4096, "tokens per packed row, Sec. 3", low=8)
    batch_size: int = opt(256, "packed rows per step, all ranks together, Sec. 3", low=1)
    num_steps: int = opt(500, "optimizer steps, Sec. 3", low=1)
    lr: float = opt(5e-5, "learning rate, Sec. 3", low=0.0)
    schedule: str = opt("constant", "learning rate over steps, Sec. 3", choices=(*SCHEDULES,))
    warmup_steps: int = opt(0, "steps of linear warm-up (paper silent)", low=0)
    weight_decay: float = opt(0.1, "AdamW (paper silent: as in pretraining)", low=0.0)
    beta1: float = opt(0.9, "AdamW (paper silent: as in pretraining)", low=0.0, below=1.0)
    beta2: float = opt(0.95, "AdamW (paper silent: as in pretraining)", low=0.0, below=1.0)


def train(cfg: SFTConfig, dist: Dist, lock: RunLock) -> None:
    with one_line_errors():
        model, tokenizer = load_start(cfg, dist)
        context = min(cfg.context, model.cfg.max_context)
        texts = list(read_examples(cfg.data))
        examples = encode_examples(tokenizer, texts)
        packed = PackedExamples(examples, context, seed=cfg.seed, pad_id=tokenizer.pad_id)
        if dist.is_main:
            print(packed.summary(), flush=True)
        optimizer = make_adamw(
            model, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay
        )
        data = {
            "--data": content_sha256(texts),
            "--init's tokenizer": content_sha256(examples[:100]),
        }
        run = Run(cfg, dist, lock, {"model": model}, optimizer, tokenizer, data)
    for step in run.steps(cfg.num_steps, desc="sft"):
        batch = packed.batch(step, cfg.batch_size, cfg.seed)
        metrics = supervised_update(run, cfg, step, batch)
        rows = epoch_order(packed.num_rows, step, cfg.batch_size, cfg.seed)
        examples = [number for row in rows for number in packed.members[row]]
        run.log(step, metrics, shown=("loss",), batch=("examples", examples))
    if dist.is_main:
        plot_metrics(
            cfg.run_dir,
            [("loss (nats per solution token)", ["loss"]), ("learning rate", ["lr"])],
        )
    run.close()


def main() -> None:
    cfg = parse(SFTConfig, presets.SFT, description=__doc__)
    with open_run(cfg) as (dist, lock):
        train(cfg, dist, lock)


if __name__ == "__main__":
    main()
