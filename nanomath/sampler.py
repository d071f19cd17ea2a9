"""The group sampler: G samples from each of P prompts, with the log-probability of every token.

A prompt is run once and its keys and values are held once for its whole group (cache.py); each step
then feeds one token per row. Rows that have ended leave, waiting samples take their places, and the
batch steps down through a few sizes when none is waiting. A token's randomness is a hash of (seed,
step, prompt id, sample index, position): a sample does not depend on its neighbours, on the batch
layout or on the number of processes. This file never scores a given text; the losses do that. Look
at samples from a checkpoint:

    python -m nanomath.sampler --checkpoint runs/NAME --prompt "..." -n 8
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from nanomath.cache import GroupCache, cache_bytes_per_token
from nanomath.chat import CHOICES, prompt_ids, use_template
from nanomath.checkpoint import load_model
from nanomath.config import one_line_errors, opt, parse
from nanomath.dist import setup
from nanomath.draw import choose_tokens, stream_keys, uniform_noise
from nanomath.log import printable
from nanomath.log import progress as progress_bar
from nanomath.model import ModelConfig, Transformer
from nanomath.tokenizer import Tokenizer

PREFILL_TOKENS = 16_384  # of one pass over prompts: bounds the memory of its activations


@dataclass
class Sample:
    """One finished sample, on the CPU."""

    prompt: int  # index into the prompts
    index: int  # in its group
    tokens_T: Tensor  # int64, the sampled EOS included
    logp_T: Tensor  # fp32 (float64 of a float64 model), as in Rollouts
    finished: bool  # ended by an EOS or a stop string; False: truncated


@dataclass
class Rollouts:
    """Samples of P prompts, G each, on the CPU; T is the length of the longest one."""

    tokens_PGT: Tensor  # int64, the sampled EOS included; 0 after the end, which lengths_PG tell
    lengths_PG: Tensor  # int64, tokens in the sample
    logp_PGT: Tensor  # fp32, under the full softmax at the sampling temperature; 0 after the end
    finished_PG: Tensor  # bool, ended by an EOS or a stop string; False: truncated
    from_policy: bool = True  # False: greedy, top-k or top-p; no training on those


def sample_groups(
    model: Transformer, prompts: Sequence[Sequence[int]], group_size: int, **settings: Any
) -> Rollouts:
    """Collect what `sample_stream` yields, with its settings and its errors."""
    samples = list(sample_stream(model, prompts, group_size, **settings))
    samples.sort(key=lambda sample: (sample.prompt, sample.index))
    groups = (len(prompts), group_size)

    def padded(rows: list[Tensor]) -> Tensor:
        return pad_sequence(rows, batch_first=True).unflatten(0, groups)

    if not samples:
        none = torch.zeros(*groups, 0)
        return Rollouts(none.long(), none.sum(-1).long(), none, none.sum(-1).bool())
    plain = settings.get("temperature", 1.0) > 0 and settings.get("top_p", 1.0) == 1.0
    return Rollouts(
        tokens_PGT=padded([sample.tokens_T for sample in samples]),
        lengths_PG=torch.tensor([len(sample.tokens_T) for sample in samples]).view(groups),
        logp_PGT=padded([sample.logp_T for sample in samples]),
        finished_PG=torch.tensor([sample.finished for sample in samples]).view(groups),
        from_policy=plain and not settings.get("top_k", 0),
    )


def sample_stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    step: int = 0,
    prompt_ids: Sequence[int] | None = None,
    vocab_limit: int | None = None,
    max_rows: int = 512,
    cache_gb: float = math.inf,
    progress: bool = False,
    static: bool | None = None,
) -> Iterator[Sample]:
    """Sample `group_size` responses to each prompt (token ids, any lengths); yield each at its end.

    At most `max_rows` are sampled at a time, fewer where their cache would take more than
    `cache_gb` (10^9 bytes). A row ends with an id of `eos_ids` or the token that completes a string
    of `stop` (`tokenizer` reads it), both kept and counted; after `max_new_tokens`; or where prompt
    and response fill the model's `max_context`. temperature 0 is greedy. top_k (0: all) keeps the k
    most likely ids, then top_p the fewest that hold this share of what is left. Ids from
    `vocab_limit` on are never sampled. logp stays that of the full softmax at the temperature, at 1
    when greedy; a float64 model returns float64. `prompt_ids` name the prompts in the random stream
    (default 0, 1, ...): equal ids share it. static (default: on a GPU): batches of few shapes, at
    fixed addresses, and a look at who has ended only every few steps; on a GPU each shape is a CUDA
    graph. Closing the iterator frees the cache. Raises ValueError for arguments that cannot be
    right and, while sampling, for NaN logits.
    """
    cfg, weight = model.cfg, model.embedding.weight
    prompt_ids = list(range(len(prompts)) if prompt_ids is None else prompt_ids)
    vocab_limit = cfg.vocab_size if vocab_limit is None else vocab_limit
    _check_prompts(cfg, prompts, prompt_ids)
    for name, value, low, high in (
        ("group_size", group_size, 1, math.inf),
        ("max_new_tokens", max_new_tokens, 0, math.inf),
        ("temperature", temperature, 0, 1e6),
        ("top_k", top_k, 0, math.inf),
        ("top_p", top_p, 1e-9, 1),
        ("vocab_limit", vocab_limit, 1, cfg.vocab_size),
        ("max_rows", max_rows, 1, math.inf),
        *(("every id in eos_ids", eos_id, 0, cfg.vocab_size - 1) for eos_id in eos_ids),
    ):
        if not low <= value <= high:
            bounds = f">= {low}" if high == math.inf else f"between {low} and {high}"
            raise ValueError(f"sample_groups: {name} must be {bounds}, not {value}")
    if stop and (tokenizer is None or not all(stop)):
        raise ValueError("sample_groups: stop strings must not be empty and need a tokenizer")

    room_P = [min(max_new_tokens, cfg.max_context - len(prompt)) for prompt in prompts]
    is_static = weight.is_cuda if static is None else static
    own_width, prompt_width = max(room_P, default=0), max(map(len, prompts), default=0)
    num_blocks = math.ceil(own_width / (128 if is_static else 32))
    block = math.ceil(own_width / max(num_blocks, 1))
    num_rows, num_places = _fit(
        [len(prompts), group_size, max_rows],
        cache_gb,
        cache_bytes_per_token(cfg, weight.dtype) * prompt_width,
        cache_bytes_per_token(cfg, weight.dtype) * num_blocks * block,
    )
    choose = partial(
        choose_tokens, temperature=temperature, vocab_limit=vocab_limit, top_k=top_k, top_p=top_p
    )

    def start() -> _Decoder:
        per_place = min(group_size, num_rows)
        sizes = (num_places, per_place, num_rows, prompt_width, num_blocks, block)
        cache = GroupCache(cfg, *sizes, weight.detach())
        return _Decoder(model, cache, choose, eos_ids, own_width, is_static)

    keys_PG = stream_keys(seed, step, prompt_ids, range(group_size))
    stops = [text.encode() for text in stop]
    bar = progress_bar(
        total=len(prompts) * group_size, desc="sampling", unit=" samples", disable=not progress
    )
    return _schedule(start, prompts, keys_PG, room_P, stops, tokenizer, bar)


def _fit(
    sizes: Sequence[int], cache_gb: float, prompt_bytes: int, row_bytes: int
) -> tuple[int, int]:
    """Return how many rows are sampled at a time, and from how many prompts."""
    num_prompts, group_size, max_rows = sizes
    for num_rows in range(max(1, min(max_rows, num_prompts * group_size)), 0, -1):
        # The last rows of a group keep its prompt while later groups already run: three times the
        # prompts that would fill the batch let every row be used at lengths of a third.
        num_places = min(num_prompts, num_rows, 3 * math.ceil(num_rows / group_size))
        if num_rows * row_bytes + num_places * prompt_bytes <= cache_gb * 1e9:
            return num_rows, num_places
    raise ValueError(
        f"sample_groups: cache_gb {cache_gb:g} holds no single sample; it needs "
        f"{(row_bytes + prompt_bytes) / 1e9:.3g} at this prompt length and max_new_tokens"
    )


@dataclass
class _Row:
    """What the host knows of a sample being drawn."""

    prompt: int
    index: int
    born: int  # the step before which its first token was drawn
    text: bytes = b""  # of the first num_read tokens, kept where there are stop strings
    num_read: int = 0


def _schedule(
    start: Callable[[], _Decoder],
    prompts: Sequence[Sequence[int]],
    keys_PG: Tensor,
    room_P: Sequence[int],
    stops: Sequence[bytes],
    tokenizer: Tokenizer | None,
    bar,
) -> Iterator[Sample]:
    """Give rows to samples and places to prompts, in order, until every sample has been yielded."""
    pairs = [(p, g) for p in range(keys_PG.shape[0]) for g in range(keys_PG.shape[1])]
    waiting = deque((p, g) for p, g in pairs if room_P[p] > 0)
    decoder = start()
    rows: dict[int, _Row] = {}
    place_of: dict[int, int] = {}  # of the prompts in the cache
    open_P = Counter(p for p, _ in waiting)  # samples that have not ended
    began, steps, num_tokens = time.perf_counter(), 0, 0
    try:
        for p, g in pairs:
            if room_P[p] <= 0:
                bar.update()
                yield Sample(p, g, *decoder.nothing(), finished=False)
        while waiting or rows:
            ended = decoder.ended(rows, steps, stops, tokenizer)
            for row, sample in ended.items():
                del rows[row]
                open_P[sample.prompt] -= 1
                if not open_P[sample.prompt]:
                    del place_of[sample.prompt]
                num_tokens += len(sample.tokens_T)
            changed = _admit(decoder, waiting, rows, place_of, prompts, keys_PG, room_P, steps)
            rate = num_tokens / (time.perf_counter() - began)
            bar.set_postfix_str(f"{rate:.0f} tokens/s, {len(rows)} rows", refresh=False)
            bar.update(len(ended))
            yield from ended.values()
            if rows:
                steps += decoder.advance(rows, place_of, room_P, steps, changed)
    finally:
        decoder.free()
        bar.close()


def _admit(decoder, waiting, rows, place_of, prompts, keys_PG, room_P, steps) -> bool:
    """Give free rows to waiting samples, as long as their prompts find a place."""
    cache = decoder.cache
    free_rows = deque(row for row in range(len(cache.place_R)) if row not in rows)
    taken = set(place_of.values())
    free_places = deque(a for a in range(len(cache.prompt_length_A)) if a not in taken)
    loaded, admitted = [], []
    while waiting and free_rows:
        p, g = waiting[0]
        if p not in place_of:
            if not free_places:
                break
            place_of[p] = free_places.popleft()
            loaded.append(p)
        waiting.popleft()
        admitted.append(free_rows.popleft())
        rows[admitted[-1]] = _Row(p, g, born=steps)
    decoder.prefill([prompts[p] for p in loaded], [place_of[p] for p in loaded])
    if admitted:
        of = [rows[row].prompt for row in admitted]
        keys = [keys_PG[rows[row].prompt, rows[row].index] for row in admitted]
        places, limits = [place_of[p] for p in of], [room_P[p] for p in of]
        decoder.open(admitted, places, torch.stack(keys), limits)
    return bool(admitted)


class _Decoder:
    """The rows being sampled: their state on the device, and one step of all of them."""

    def __init__(self, model, cache, choose, eos_ids, max_new_tokens, static: bool):
        weight, num_rows = model.embedding.weight, len(cache.place_R)
        self.model, self.cache, self.choose = model, cache, choose
        # A GPU stalls when asked who has ended, and wants few shapes; a CPU has the answer at once,
        # and every row that it does not compute is time won.
        self.static, self.interval = static, 8 if static else 1
        self.shrink = 0.5 if static else 0.9
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}
        self.is_eos_V = torch.zeros(model.cfg.vocab_size, dtype=torch.bool, device=weight.device)
        self.is_eos_V[list(eos_ids)] = True
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.prompt_logits_AV = weight.detach().new_zeros(
            len(cache.prompt_length_A), model.cfg.vocab_size
        )
        long_R = torch.zeros(num_rows, dtype=torch.long, device=weight.device)
        self.token_R, self.limit_R, self.key_R = long_R, long_R.clone(), long_R.clone()
        self.done_R = torch.ones(num_rows, dtype=torch.bool, device=weight.device)
        # One column more than tokens: where rows that have ended write.
        width = max_new_tokens + 1
        self.tokens_RT = torch.zeros(num_rows, width, dtype=torch.long, device=weight.device)
        self.logp_RT = torch.zeros(num_rows, width, dtype=wide, device=weight.device)

    def nothing(self) -> tuple[Tensor, Tensor]:
        """Return the tokens and logp of an empty sample."""
        return self.tokens_RT[:0, 0].cpu(), self.logp_RT[:0, 0].cpu()

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], places: Sequence[int]) -> None:
        """Run each prompt once: fill its place, and keep the logits after its last token."""
        device = self.token_R.device
        while prompts:
            count, longest = 1, len(prompts[0])
            while count < len(prompts):
                longest = max(longest, len(prompts[count]))
                if (count + 1) * longest > PREFILL_TOKENS:
                    break
                count += 1
            tokens = [torch.tensor(prompt) for prompt in prompts[:count]]
            last_P = torch.tensor([len(prompt) - 1 for prompt in tokens], device=device)
            self.cache.load(places[:count], [len(prompt) for prompt in tokens])
            rows_P = torch.arange(count, device=device)
            self.prompt_logits_AV[places[:count]] = self.model(
                pad_sequence(tokens, batch_first=True).to(device),
                cache=self.cache,
                head_fn=lambda hidden_PTD, head_VD, at=(rows_P, last_P): F.linear(
                    hidden_PTD[at], head_VD
                ),
            )
            prompts, places = prompts[count:], places[count:]

    @torch.no_grad()
    def open(self, rows: list[int], places: list[int], keys_R: Tensor, limits: list[int]) -> None:
        """Begin a sample in each of `rows`: draw its first token from its prompt's logits."""
        device = self.token_R.device
        rows_R, places_R = torch.tensor(rows, device=device), torch.tensor(places, device=device)
        self.cache.open(rows_R, places_R)
        self.key_R[rows_R] = key_R = keys_R.to(device)
        self.limit_R[rows_R] = limit_R = torch.tensor(limits, device=device)
        token_R, logp_R = self.choose(
            self.prompt_logits_AV[places_R], uniform_noise(key_R, torch.zeros_like(key_R))
        )
        self.token_R[rows_R] = self.tokens_RT[rows_R, 0] = token_R
        self.logp_RT[rows_R, 0] = logp_R
        self.done_R[rows_R] = self.is_eos_V[token_R] | (limit_R <= 1)

    @torch.no_grad()
    def advance(self, rows, place_of, room_P, steps: int, changed: bool) -> int:
        """Draw a token in each row that has not ended, a few times; return how many times."""
        cache = self.cache
        ages = [(steps - row.born, room_P[row.prompt]) for row in rows.values()]
        count = min(self.interval, max(room - age for age, room in ages) - 1)
        if count == 0:
            return 0
        size = self._size(len(rows), len(cache.place_R))
        num_places = self._size(len(place_of), len(cache.prompt_length_A))
        # Rows that end within these steps stand still: none outgrows the cache.
        _, _, block, _ = cache.own_keys[0].shape
        num_blocks = min(math.ceil((max(ages)[0] + count) / block), len(cache.own_keys[0]))
        changed |= self._move(rows, place_of, size, num_places)
        if changed or (size, num_places, num_blocks) != cache.shape[:2] + cache.shape[3:]:
            seats = [place_of[rows[r].prompt] if r in rows else None for r in range(size)]
            fullest = max(Counter(seat for seat in seats if seat is not None).values())
            cache.arrange(
                seats, num_places, cache.per_place if self.static else fullest, num_blocks
            )
        for _ in range(count):
            self._replay()
        return count

    def _move(self, rows, place_of, size: int, num_places: int) -> bool:
        """Move prompts and rows that stand beyond the first ones into holes before them."""
        device, moved = self.token_R.device, _into_holes({*place_of.values()}, num_places)
        if moved:
            place_of.update({p: moved.get(place, place) for p, place in place_of.items()})
            source, target = (torch.tensor([*x], device=device) for x in zip(*moved.items()))
            self.cache.move_prompts(source, target)
            self.prompt_logits_AV[target] = self.prompt_logits_AV[source]
        moved_rows = _into_holes(rows, size)
        if moved_rows:
            rows.update({new: rows.pop(old) for old, new in moved_rows.items()})
            source, target = (torch.tensor([*x], device=device) for x in zip(*moved_rows.items()))
            self.cache.move_rows(source, target)
            for state in (self.token_R, self.limit_R, self.key_R, self.tokens_RT, self.logp_RT):
                state[target] = state[source]
            self.done_R[target], self.done_R[source] = self.done_R[source], True
        return bool(moved or moved_rows)

    def _size(self, needed: int, total: int) -> int:
        """Return the smallest of total, total * shrink, total * shrink^2, ... that is enough."""
        while needed <= int(total * self.shrink):
            total = int(total * self.shrink)
        return total

    def _replay(self) -> None:
        """Run a step: as it is on a CPU; on a GPU as the CUDA graph of its shape."""
        shape = self.cache.shape
        if not self.token_R.is_cuda or shape not in self.graphs:
            # The first step of a shape runs as it is, which warms up what a capture may not start.
            self.graphs[shape] = None
            self.step()
            return
        if self.graphs[shape] is None:
            self.graphs[shape] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[shape]):
                self.step()
        self.graphs[shape].replay()

    def step(self) -> None:
        """Feed each row its last token and draw the next; nothing here depends on the host."""
        num_rows = self.cache.shape[0]
        logits_RV = self.model(self.token_R[:num_rows, None], cache=self.cache)[:, 0]
        num_own_R, done_R = self.cache.num_own_R[:num_rows], self.done_R[:num_rows]
        place_R = num_own_R + 1  # of the token to draw, in the sample
        token_R, logp_R = self.choose(logits_RV, uniform_noise(self.key_R[:num_rows], place_R))
        at_R1 = place_R.masked_fill(done_R, self.tokens_RT.shape[1] - 1)[:, None]
        self.tokens_RT[:num_rows].scatter_(1, at_R1, token_R[:, None])
        self.logp_RT[:num_rows].scatter_(1, at_R1, logp_R[:, None])
        self.token_R[:num_rows] = token_R
        num_own_R += ~done_R
        done_R |= self.is_eos_V[token_R] | (self.limit_R[:num_rows] <= place_R + 1)

    def ended(
        self, rows: dict[int, _Row], steps: int, stops: Sequence[bytes], tokenizer
    ) -> dict[int, Sample]:
        """Return the samples that have ended, by row. Raises ValueError if one holds NaN."""
        done = self.done_R.tolist()
        cut = {row: None for row in rows if done[row]}
        if stops and rows:
            lengths = (self.cache.num_own_R + 1).tolist()
            tokens = self.tokens_RT[:, : max(lengths)].tolist()
            for row, state in rows.items():
                length = _stop_length(state, tokens[row][: lengths[row]], stops, tokenizer)
                if length is not None:
                    cut[row] = length
        if not cut:
            return {}
        index_R = torch.tensor(list(cut), device=self.token_R.device)
        self.done_R[index_R] = True
        lengths = (self.cache.num_own_R[index_R] + 1).tolist()
        tokens, logps = self.tokens_RT[index_R].cpu(), self.logp_RT[index_R].cpu()
        if not bool(all(logp[:n].isfinite().all() for logp, n in zip(logps, lengths))):
            raise ValueError(
                "sample_groups: the model's logits are not finite: its weights diverged"
            )
        samples = {}
        for i, (row, stopped) in enumerate(cut.items()):
            tokens_T = tokens[i, : stopped or lengths[i]].clone()
            finished = stopped is not None or bool(self.is_eos_V[tokens_T[-1]])
            logp_T = logps[i, : len(tokens_T)].clone()
            samples[row] = Sample(rows[row].prompt, rows[row].index, tokens_T, logp_T, finished)
        return samples

    def free(self) -> None:
        """Give back the memory of cache and graphs, also while a traceback holds this object."""
        self.cache.__dict__.clear()
        self.__dict__.clear()


def _into_holes(taken, size: int) -> dict[int, int]:
    """Return what has to move where, so that everything taken lies below `size`."""
    beyond = [i for i in taken if i >= size]
    return dict(zip(beyond, (i for i in range(size) if i not in taken)))


def _stop_length(row: _Row, tokens: list[int], stops: Sequence[bytes], tokenizer) -> int | None:
    """Read on to the token that completes a stop string; return the tokens up to it, or None."""
    for token in tokens[row.num_read :]:
        piece = tokenizer.decode_bytes([token])
        row.text, row.num_read = row.text + piece, row.num_read + 1
        if any(text in row.text[-len(text) - len(piece) :] for text in stops):
            return row.num_read
    return None


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
        raise SystemExit("nanomath.sampler: --checkpoint DIR is missing: name a run folder")
    try:
        device = setup(cfg.device).device
        dtype = torch.bfloat16 if device.type == "cuda" else None
        model, tokenizer, _ = load_model(cfg.checkpoint, device=device, dtype=dtype)
        if tokenizer is None:
            raise ValueError(f"{cfg.checkpoint} holds no tokenizer.json")
        use_template(tokenizer, cfg.chat_template)
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
            progress=True,
        ):
            mean_logp = float(sample.logp_T.mean())
            end = "finished" if sample.finished else "truncated"
            head = f"{len(sample.tokens_T)} tokens, {end}, mean logp {mean_logp:.3f}"
            text = printable(tokenizer.decode(sample.tokens_T.tolist()))
            tqdm.write(f"--- sample {sample.index}: {head}\n{text}")
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"nanomath.sampler: {error}") from None


if __name__ == "__main__":
    with one_line_errors():
        main(parse(Config, description=__doc__))
