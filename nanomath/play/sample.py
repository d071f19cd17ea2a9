"""Look at samples from a checkpoint.

python -m nanomath.play.sample --checkpoint runs/NAME --prompt "..." -n 8
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm import tqdm

from nanomath.base.config import one_line_errors, opt, parse
from nanomath.base.log import printable
from nanomath.dist import setup
from nanomath.engine.stream import sample_stream
from nanomath.run.load import load_model
from nanomath.text.chat import CHOICES, prompt_ids, use_template


@dataclass(frozen=True)
class Config:
    checkpoint: str = opt("", "a run folder, one step's folder or a Hugging Face folder")
    prompt: str = opt("", "text to continue; empty: begin of sequence alone")
    chat_template: str = opt(
        "auto", "layout of a prompt, see chat.py; auto: as trained, else plain", choices=CHOICES
    )
    num_samples: int = opt(8, "samples", low=1, short="n")
    max_new_tokens: int = opt(256, "tokens at most in a sample", low=1)
    temperature: float = opt(1.0, "0: greedy", low=0.0)
    top_k: int = opt(0, "sample from the k most likely tokens; 0: from all", low=0)
    top_p: float = opt(1.0, "sample from the most likely tokens that hold this share", high=1.0)
    stop: tuple[str, ...] = opt((), "texts that end a sample, beside the end of sequence")
    seed: int = opt(0, "seed of the samples")
    device: str = opt("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))


def main(cfg: Config) -> None:
    """Print samples of one prompt, as they end, with lengths and mean log-probabilities."""
    if not cfg.checkpoint:
        raise ValueError("--checkpoint DIR is missing: name a run folder")
    device = setup(cfg.device).device
    dtype = torch.bfloat16 if device.type == "cuda" else None
    model, tokenizer, _ = load_model(cfg.checkpoint, device=device, dtype=dtype)
    if tokenizer is None:
        raise ValueError(f"{cfg.checkpoint} holds no tokenizer.json")
    if hint := use_template(tokenizer, cfg.chat_template):
        print(hint)
    for sample in sample_stream(
        model,
        [prompt_ids(tokenizer, cfg.prompt)],
        cfg.num_samples,
        max_new_tokens=cfg.max_new_tokens,
        eos_ids=tokenizer.stop_ids,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        stop=cfg.stop,
        tokenizer=tokenizer,
        seed=cfg.seed,
        vocab_limit=tokenizer.sample_limit,
        progress=0.0,
    ):
        mean_logp = float(sample.logp_T.mean())
        end = "finished" if sample.finished else "truncated"
        head = f"{len(sample.tokens_T)} tokens, {end}, mean logp {mean_logp:.3f}"
        text = printable(tokenizer.decode(sample.tokens_T.tolist()))
        tqdm.write(f"--- sample {sample.index}: {head}\n{text}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse(Config, description=__doc__))
