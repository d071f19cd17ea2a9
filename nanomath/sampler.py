"""The group sampler: G samples from each of P prompts, with the log-probability of every token.

A prompt is run once and its keys and values are held once for its whole group (model.GroupCache);
each step then feeds one token per row, and rows that have ended leave the batch. A token's
randomness is a hash of (seed, step, prompt id, sample index, position): a sample does not depend on
its neighbours, on the batch layout or on the number of processes. This file never scores a given
text; the losses do that. Look at samples from a checkpoint:

    python -m nanomath.sampler --checkpoint runs/NAME --prompt "..." --num_samples 8
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from nanomath.chat import TEMPLATES, prompt_ids, use_template
from nanomath.checkpoint import load_model
from nanomath.config import one_line_errors, opt, parse
from nanomath.dist import setup
from nanomath.log import printable
from nanomath.log import progress as progress_bar
from nanomath.model import GroupCache, ModelConfig, Transformer


@dataclass
class Rollouts:
    """Samples of P prompts, G each; T is the length of the longest one."""

    tokens_PGT: Tensor  # int64, the sampled EOS included; 0 after the end, which lengths_PG tell
    lengths_PG: Tensor  # int64, tokens in the sample
    logp_PGT: Tensor  # fp32, under the full softmax at the sampling temperature; 0 after the end
    finished_PG: Tensor  # bool, ended by an EOS; False: truncated


@torch.no_grad()
def sample_groups(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    temperature: float = 1.0,
    seed: int = 0,
    step: int = 0,
    prompt_ids: Sequence[int] | None = None,
    vocab_limit: int | None = None,
    max_rows: int = 512,
    progress: bool = False,
) -> Rollouts:
    """Sample `group_size` responses to each prompt (token ids, any lengths), `max_rows` at a time.

    A row ends with an id of `eos_ids` (kept and counted), after `max_new_tokens`, or where prompt
    and response fill the model's `max_context`. temperature 0 is greedy; its logp is that of
    temperature 1. Ids from `vocab_limit` on are never sampled; logp stays that of the full softmax.
    `prompt_ids` name the prompts in the random stream (default 0, 1, ...): equal ids share it.
    A float64 model returns float64 logp. Raises ValueError for arguments that cannot be right and
    for NaN logits.
    """
    cfg, weight = model.cfg, model.embedding.weight
    prompt_ids = list(range(len(prompts)) if prompt_ids is None else prompt_ids)
    vocab_limit = cfg.vocab_size if vocab_limit is None else vocab_limit
    _check_prompts(cfg, prompts, prompt_ids)
    _check_settings(cfg, group_size, max_new_tokens, eos_ids, temperature, vocab_limit, max_rows)

    is_eos_V = torch.zeros(cfg.vocab_size, dtype=torch.bool, device=weight.device)
    is_eos_V[list(eos_ids)] = True
    choose = partial(choose_tokens, temperature=temperature, vocab_limit=vocab_limit)
    num_rows = len(prompts) * group_size  # suffix N in this file: all P * G rows, in order
    tokens_NT = torch.full((num_rows, max_new_tokens), -1, device=weight.device)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    logp_NT = torch.zeros(num_rows, max_new_tokens, dtype=wide, device=weight.device)

    prompts_per_wave = max(1, max_rows // group_size)
    samples_per_wave = min(group_size, max_rows)
    bar = progress_bar(total=num_rows, desc="sampling", unit=" samples", disable=not progress)
    with bar:
        for first in range(0, len(prompts) if max_new_tokens else 0, prompts_per_wave):
            members = range(first, min(first + prompts_per_wave, len(prompts)))
            cache, logits_PV = _prefill(model, [prompts[p] for p in members])
            for start in range(0, group_size, samples_per_wave):
                samples = range(start, min(start + samples_per_wave, group_size))
                pairs = [(p, g) for p in members for g in samples]
                keys = [prompt_ids[p] for p, _ in pairs], [g for _, g in pairs]
                uniform_TR = uniform_noise(seed, step, *keys, max_new_tokens).to(weight.device)
                prompt_R = torch.tensor([p - first for p, _ in pairs], device=weight.device)
                rows_R = [p * group_size + g for p, g in pairs]
                tokens_NT[rows_R], logp_NT[rows_R] = _decode(
                    model, cache, logits_PV, prompt_R, uniform_TR, choose, is_eos_V, bar
                )
    if not bool(logp_NT.isfinite().all()):
        raise ValueError("sample_groups: the model's logits are not finite: its weights diverged")
    return _rollouts(tokens_NT, logp_NT, is_eos_V, group_size)


def _rollouts(tokens_NT: Tensor, logp_NT: Tensor, is_eos_V: Tensor, group_size: int) -> Rollouts:
    """Cut rows to the longest sample; -1 marks what was never sampled."""
    lengths_N = (tokens_NT >= 0).sum(-1)
    longest = int(lengths_N.max()) if lengths_N.numel() else 0
    tokens_NT, logp_NT = tokens_NT[:, :longest].clamp(min=0), logp_NT[:, :longest]
    if longest:
        last_N = tokens_NT.gather(1, (lengths_N - 1).clamp(min=0)[:, None])[:, 0]
        finished_N = is_eos_V[last_N] & (lengths_N > 0)
    else:
        finished_N = torch.zeros_like(lengths_N, dtype=torch.bool)
    groups = (len(lengths_N) // group_size, group_size)
    return Rollouts(
        tokens_PGT=tokens_NT.reshape(*groups, longest),
        lengths_PG=lengths_N.view(groups),
        logp_PGT=logp_NT.reshape(*groups, longest),
        finished_PG=finished_N.view(groups),
    )


def _prefill(model: Transformer, prompts: Sequence[Sequence[int]]) -> tuple[GroupCache, Tensor]:
    """Run each prompt once; return the cache and the logits [P, V] after its last token."""
    device = model.embedding.weight.device
    lengths = [len(prompt) for prompt in prompts]
    tokens_PT = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    for row, prompt in zip(tokens_PT, prompts):
        row[: len(prompt)] = torch.tensor(prompt)
    cache = GroupCache(model.cfg, lengths, device)
    last_P = cache.prompt_lengths_P - 1
    rows_P = torch.arange(len(prompts), device=device)
    logits_PV = model(
        tokens_PT.to(device),
        cache=cache,
        head_fn=lambda hidden_PTD, head_VD: F.linear(hidden_PTD[rows_P, last_P], head_VD),
    )
    return cache, logits_PV


def _decode(
    model: Transformer,
    cache: GroupCache,
    logits_PV: Tensor,
    prompt_R: Tensor,
    uniform_TR: Tensor,
    choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    is_eos_V: Tensor,
    bar,
) -> tuple[Tensor, Tensor]:
    """Draw a row per entry of `prompt_R` to its end; return tokens (-1: none), logp [R, T]."""
    # Asking how many rows are left stalls a GPU; a CPU has the answer at once.
    check_interval = 1 if is_eos_V.device.type == "cpu" else 8
    tokens_TR = torch.full(uniform_TR.shape, -1, device=uniform_TR.device)
    logp_TR = torch.zeros(
        uniform_TR.shape,
        device=uniform_TR.device,
        dtype=torch.float64 if logits_PV.dtype == torch.float64 else torch.float32,
    )
    cache.start(prompt_R)
    rows_R = torch.arange(len(prompt_R), device=prompt_R.device)  # those still in the batch
    limit_R = model.cfg.max_context - cache.base_positions_R  # room for a response
    done_R = limit_R <= 0
    logits_RV, num_open = logits_PV[prompt_R], len(prompt_R)
    for t in range(len(uniform_TR)):
        token_R, logp_R = choose(logits_RV, uniform_TR[t, rows_R])
        tokens_TR[t, rows_R] = token_R.masked_fill(done_R, -1)
        logp_TR[t, rows_R] = logp_R.masked_fill(done_R, 0.0)
        done_R = done_R | is_eos_V[token_R] | (limit_R <= t + 1)
        if t + 1 == len(uniform_TR):
            break
        if (t + 1) % check_interval == 0:
            left_R = (~done_R).nonzero()[:, 0]
            bar.update(num_open - len(left_R))
            num_open = len(left_R)
            if num_open == 0:
                break
            # Dropping rows copies what the others have cached: worth it from a tenth on.
            if num_open <= 0.9 * len(rows_R):
                cache.keep(left_R)
                rows_R, limit_R = rows_R[left_R], limit_R[left_R]
                token_R, done_R = token_R[left_R], done_R[left_R]
        logits_RV = model(token_R[:, None], cache=cache)[:, 0]
    bar.update(num_open)
    return tokens_TR.T, logp_TR.T


def choose_tokens(
    logits_RV: Tensor, uniform_R: Tensor, *, temperature: float, vocab_limit: int
) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution at `uniform_R` (float64); return token ids and logp, [R].

    Only ids below `vocab_limit` are chosen, in proportion to their probabilities; logp is that of
    the full softmax. Suffixes of this function: M blocks of C ids each.
    """
    logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    if temperature == 0:
        token_R1 = logits_RV[:, :vocab_limit].argmax(-1, keepdim=True)
        return token_R1[:, 0], logits_RV.log_softmax(-1).gather(1, token_R1)[:, 0]
    if temperature != 1:
        logits_RV = logits_RV / temperature
    probs_RV = logits_RV.softmax(-1)
    # Two levels: the block in which the running sum passes u, then the id in it. The running sums
    # are over sqrt(V) numbers each, so float64 costs nothing; over all of V it would be half the
    # time of choosing.
    block = math.ceil(vocab_limit**0.5)
    padding = -vocab_limit % block
    blocks_RMC = F.pad(probs_RV[:, :vocab_limit], (0, padding)).unflatten(-1, (-1, block))
    sums_RM = blocks_RMC.sum(-1).double()
    ends_RM = sums_RM.cumsum(-1)
    target_R1 = uniform_R[:, None] * ends_RM[:, -1:]
    block_R1 = _first_above(ends_RM, target_R1)
    target_R1 = (target_R1 - (ends_RM - sums_RM).gather(1, block_R1)).clamp_(min=0)
    rows_R = torch.arange(len(uniform_R), device=uniform_R.device)
    ends_RC = blocks_RMC[rows_R, block_R1[:, 0]].double().cumsum(-1)
    # The block's sum was rounded: below its last running sum there always is an id of weight > 0.
    target_R1 = torch.minimum(target_R1, ends_RC[:, -1:] * (1 - 1e-15))
    token_R1 = block_R1 * block + _first_above(ends_RC, target_R1)
    token_R1 = token_R1.clamp_(max=vocab_limit - 1)  # NaN logits: the caller reports them
    return token_R1[:, 0], probs_RV.gather(1, token_R1)[:, 0].log()


def _first_above(ends_RM: Tensor, target_R1: Tensor) -> Tensor:
    """Return the first index [R, 1] whose running sum exceeds the target: its weight is not 0."""
    return torch.searchsorted(ends_RM, target_R1, right=True).clamp_(max=ends_RM.shape[1] - 1)


_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment and multipliers (Steele et al., 2014)


def uniform_noise(
    seed: int, step: int, prompt_ids: Sequence[int], sample_ids: Sequence[int], num_positions: int
) -> Tensor:
    """Return uniforms in [0, 1), float64 [T, R]: a hash of the five counters and nothing else."""
    key = torch.zeros((), dtype=torch.long)
    for counter in ([seed], [step], prompt_ids, sample_ids):
        key = _splitmix(key + torch.tensor([_signed(value) for value in counter]))
    positions_T1 = torch.arange(num_positions)[:, None]
    bits_TR = _splitmix(key + positions_T1 * _signed(_GOLDEN))
    return _shift_right(bits_TR, 11).double() * 2.0**-53


def _splitmix(x: Tensor) -> Tensor:
    """One step of splitmix64 in int64, whose products wrap as uint64's do."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # without the sign's copies


def _signed(value: int) -> int:
    return ((value + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def _check_prompts(
    cfg: ModelConfig, prompts: Sequence[Sequence[int]], prompt_ids: Sequence[int]
) -> None:
    if len(prompt_ids) != len(prompts):
        raise ValueError(
            f"sample_groups: {len(prompt_ids)} prompt_ids for {len(prompts)} prompts; give one each"
        )
    for i, prompt in enumerate(prompts):
        name = f"sample_groups: prompt {i} (id {prompt_ids[i]})"
        if len(prompt) == 0:
            raise ValueError(f"{name} is empty; begin it with the begin-of-sequence id")
        if len(prompt) > cfg.max_context:
            raise ValueError(
                f"{name} has {len(prompt)} tokens, but the model's max_context is "
                f"{cfg.max_context}; shorten or drop it"
            )
        if min(prompt) < 0 or max(prompt) >= cfg.vocab_size:
            raise ValueError(
                f"{name} holds ids outside 0..{cfg.vocab_size - 1}; "
                "it was made with another model's tokenizer"
            )


def _check_settings(
    cfg: ModelConfig,
    group_size: int,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    temperature: float,
    vocab_limit: int,
    max_rows: int,
) -> None:
    for name, value, low, high in (
        ("group_size", group_size, 1, math.inf),
        ("max_new_tokens", max_new_tokens, 0, math.inf),
        ("temperature", temperature, 0, 1e6),
        ("vocab_limit", vocab_limit, 1, cfg.vocab_size),
        ("max_rows", max_rows, 1, math.inf),
        *(("every id in eos_ids", eos_id, 0, cfg.vocab_size - 1) for eos_id in eos_ids),
    ):
        if not low <= value <= high:
            bounds = f">= {low}" if high == math.inf else f"between {low} and {high}"
            raise ValueError(f"sample_groups: {name} must be {bounds}, not {value}")


@dataclass(frozen=True)
class Config:
    checkpoint: str = opt("", "a run folder, a checkpoints folder or one step's folder")
    prompt: str = opt("", "text to continue; empty: begin of sequence alone")
    chat_template: str = opt("plain", "how a prompt is put, chat.py", choices=(*TEMPLATES,))
    num_samples: int = opt(8, "samples", low=1)
    max_new_tokens: int = opt(256, "tokens at most in a sample", low=1)
    temperature: float = opt(1.0, "0: greedy", low=0.0)
    seed: int = opt(0, "seed of the samples")
    device: str = opt("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))


def main(cfg: Config) -> None:
    """Print samples of one prompt with their lengths and mean log-probabilities."""
    if not cfg.checkpoint:
        raise SystemExit("nanomath.sampler: --checkpoint DIR is missing: name a run folder")
    try:
        model, tokenizer, _ = load_model(cfg.checkpoint, device=setup(cfg.device).device)
        if tokenizer is None:
            raise ValueError(f"{cfg.checkpoint} holds no tokenizer.json")
        use_template(tokenizer, cfg.chat_template)
        rollouts = sample_groups(
            model,
            [prompt_ids(tokenizer, cfg.prompt)],
            cfg.num_samples,
            max_new_tokens=cfg.max_new_tokens,
            eos_ids=tokenizer.stop_ids,
            temperature=cfg.temperature,
            seed=cfg.seed,
            vocab_limit=tokenizer.sample_limit,
            progress=True,
        )
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"nanomath.sampler: {error}") from None
    for g in range(cfg.num_samples):
        length = int(rollouts.lengths_PG[0, g])
        mean_logp = float(rollouts.logp_PGT[0, g, :length].mean())
        end = "finished" if rollouts.finished_PG[0, g] else "truncated"
        print(f"--- sample {g}: {length} tokens, {end}, mean logp {mean_logp:.3f}")
        print(printable(tokenizer.decode(rollouts.tokens_PGT[0, g, :length].tolist())))


if __name__ == "__main__":
    with one_line_errors():
        main(parse(Config, description=__doc__))
