"""This is the group sampler: G samples from each of P prompts, with every token's log-probability.

A prompt is run once and its keys and values are held once for its whole group (cache.py); each step
then feeds one token per row (scheduler.py) and draws the next (draw.py). Rows that have ended
leave, waiting samples take their slots, and the batch steps down through a few sizes when none is
waiting. A token's randomness is a hash of (seed, step, prompt id, sample index, position): a sample
does not depend on its neighbours, on the batch layout or on the number of processes. This file
never scores a given text; the losses do that. Look at samples from a checkpoint:

    python -m nanomath.play.sample --checkpoint runs/NAME --prompt "..." -n 8
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from nanomath.base.log import progress as progress_bar
from nanomath.draw import stream_keys
from nanomath.engine.cache import CacheSize, GroupCache, cache_bytes_per_token, fit_rows
from nanomath.engine.scheduler import Row, Sample, Scheduler, Settings
from nanomath.model import ModelConfig, Transformer
from nanomath.rollouts import Rollouts


def sample_groups(
    model: Transformer, prompts: Sequence[Sequence[int]], group_size: int, **settings: Any
) -> Rollouts:
    """Collect what `sample_stream` yields, with its settings and its errors."""
    samples = list(sample_stream(model, prompts, group_size, **settings))
    # Samples come in the order in which they end: short ones of any group first.
    samples.sort(key=lambda sample: (sample.prompt, sample.index))
    # Only draws from the full softmax are the policy's own: Eq. 3 divides by their probability.
    how = Settings(**settings)
    return Rollouts.of_rows(
        [(sample.tokens_T, sample.logp_T, sample.finished) for sample in samples],
        group_size,
        from_policy=how.temperature > 0 and how.top_k == 0 and how.top_p == 1.0,
    )


def sample_stream(
    model: Transformer, prompts: Sequence[Sequence[int]], group_size: int, **settings: Any
) -> Iterator[Sample]:
    """Sample `group_size` responses to each prompt (token ids, any lengths); yield each at its end.

    settings: those of `Settings`. A row also ends after `max_new_tokens`, or where prompt and
    response fill the model's `max_context`. logp is that of the full softmax at the temperature, at
    1 when greedy, whatever top_k and top_p. Closing the iterator frees the cache. Raises ValueError
    for arguments that cannot be right and, while sampling, for NaN logits.
    """
    cfg, weight, how = model.cfg, model.embedding.weight.detach(), Settings(**settings)
    how.prompt_ids = range(len(prompts)) if how.prompt_ids is None else how.prompt_ids
    how.vocab_limit = cfg.vocab_size if how.vocab_limit is None else how.vocab_limit
    # Fixed shapes on a GPU, where they make CUDA graphs; a CPU would only compute the padding.
    how.static = weight.is_cuda if how.static is None else how.static
    # Not itself a generator: what cannot be right is refused here, not at the first sample.
    _check(cfg, prompts, group_size, how)

    # A sample ends at its limit or where the context does, whichever comes first.
    room_P = [min(how.max_new_tokens, cfg.max_context - len(prompt)) for prompt in prompts]
    # On the host: one integer a row, which travels with it to whatever slot it gets.
    keys_PG = stream_keys(how.seed, how.step, how.prompt_ids, range(group_size)).tolist()
    rows = [
        Row(p, g, keys_PG[p][g], room_P[p]) for p in range(len(prompts)) for g in range(group_size)
    ]
    cache = _new_cache(cfg, weight, prompts, room_P, group_size, how)
    return _stream(Scheduler(model, cache, prompts, how), rows, how.progress)


def _new_cache(
    cfg: ModelConfig,
    weight: Tensor,
    prompts: Sequence[Sequence[int]],
    room_P: Sequence[int],
    group_size: int,
    how: Settings,
) -> GroupCache:
    """Return a cache for as many rows as may be sampled at a time."""
    # A prompt without room gives empty samples: it is not even run.
    prompt_width = max((len(prompt) for prompt, room in zip(prompts, room_P) if room), default=0)
    # The longest output there can be, not the longest there will be: nothing grows while sampling.
    own_width = max(room_P, default=0)
    num_blocks = max(1, math.ceil(own_width / (128 if how.static else 16)))
    block = math.ceil(own_width / num_blocks)
    # The ring of own tokens is cut into blocks, and a pass reads only the blocks in use: short
    # blocks waste little on a CPU; on a GPU each number of blocks is one more CUDA graph.
    per_token = cache_bytes_per_token(cfg, weight.dtype)
    needs = (how.cache_gb, per_token * prompt_width, per_token * num_blocks * block)
    num_rows, num_slots = fit_rows(len(prompts), group_size, how.max_rows, *needs)
    # Rows of one group stand together, so that its prompt's keys are read once for all of them.
    per_slot = min(group_size, num_rows)
    size = CacheSize(num_rows, num_slots, per_slot, prompt_width, num_blocks, block)
    return GroupCache(cfg, weight, size, how.static)


def _stream(batch: Scheduler, rows: Sequence[Row], progress: float | None) -> Iterator[Sample]:
    """Yield the rows as samples; give back the memory of the batch at the end."""
    began, num_tokens = time.perf_counter(), 0
    bar = progress_bar(
        total=len(rows), desc="sampling", unit=" samples", disable=progress is None,
        delay=progress or 0.0, leave=not progress,
    )  # fmt: skip
    # The bar counts samples, of unlike lengths: tokens a second is the rate that stays even.
    try:
        for sample in batch.run(rows):
            num_tokens += len(sample.tokens_T)
            rate = num_tokens / (time.perf_counter() - began)
            bar.set_postfix_str(f"{rate:.0f} tokens/s, {len(batch.rows)} rows", False)
            bar.update()
            yield sample
    finally:
        # Also while a traceback holds both objects.
        vars(batch.cache).clear()
        vars(batch).clear()
        bar.close()


def _check(
    cfg: ModelConfig, prompts: Sequence[Sequence[int]], group_size: int, how: Settings
) -> None:
    # One table of ranges: a NaN is in none of them, because it compares to nothing.
    for name, value, low, high in (
        ("group_size", group_size, 1, math.inf),
        ("max_new_tokens", how.max_new_tokens, 0, math.inf),
        ("temperature", how.temperature, 0, 1e6),
        ("top_k", how.top_k, 0, math.inf),
        ("top_p", how.top_p, 1e-9, 1),
        ("vocab_limit", how.vocab_limit, 1, cfg.vocab_size),
        ("max_rows", how.max_rows, 1, math.inf),
        ("the number of prompt_ids", len(how.prompt_ids), len(prompts), len(prompts)),
        *(("every id in eos_ids", eos_id, 0, cfg.vocab_size - 1) for eos_id in how.eos_ids),
    ):
        if not low <= value <= high:
            bounds = f">= {low}" if high == math.inf else f"between {low} and {high}"
            raise ValueError(f"sample_groups: {name} must be {bounds}, not {value}")
    if how.stop and (how.tokenizer is None or not all(how.stop)):
        raise ValueError("sample_groups: stop strings must not be empty and need a tokenizer")
    for i, prompt in enumerate(prompts):
        # On a GPU an id that the model does not have would end the process without a word.
        low, high = min(prompt, default=0), max(prompt, default=0)
        if not (0 < len(prompt) <= cfg.max_context and low >= 0 and high < cfg.vocab_size):
            raise ValueError(
                f"sample_groups: prompt {i} (id {how.prompt_ids[i]}) has {len(prompt)} ids from "
                f"{low} to {high}, but the model takes 1 to {cfg.max_context} (its max_context) "
                f"from 0 to {cfg.vocab_size - 1} (its vocabulary)"
            )
