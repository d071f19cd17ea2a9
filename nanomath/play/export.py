"""Export a checkpoint as a Hugging Face folder.

python -m nanomath.play.export --checkpoint runs/grpo --out exported
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from nanomath.base.config import one_line_errors, opt, parse
from nanomath.hub.hf import save_hf
from nanomath.run.load import load_model

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Config:
    checkpoint: str = opt(
        "", "needed: run folder, one step's folder or Hugging Face folder to export"
    )
    out: str = opt("", "needed: folder to write, in Hugging Face's layout; must not exist yet")
    dtype: str = opt("bf16", "type of the weights; fp32 keeps every bit", choices=tuple(DTYPES))


def main(cfg: Config) -> None:
    """Export a checkpoint."""
    for flag in ("checkpoint", "out"):
        if not getattr(cfg, flag):
            raise ValueError(f"--{flag} is needed: give a folder (see --help)")
    if Path(cfg.out).exists():  # before the weights are read
        raise FileExistsError(f"--out {cfg.out} exists; give a new folder, or remove that one")
    model, tokenizer, _ = load_model(cfg.checkpoint, dtype=DTYPES[cfg.dtype])
    save_hf(model, tokenizer, cfg.out, dtype=DTYPES[cfg.dtype])
    print(f"wrote {cfg.out}: {model.cfg.num_parameters:,} parameters")


if __name__ == "__main__":
    with one_line_errors():
        main(parse(Config, description=__doc__))
