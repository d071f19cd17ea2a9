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

import copy
import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
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
SMALL_WEIGHT = 2**17  # numbers; on a CPU a product with a smaller one gains nothing from packing


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
    progress: float | None = None,
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
    graph. progress: seconds before a bar appears. Closing the iterator frees the cache. Raises
    ValueError for arguments that cannot be right and, while sampling, for NaN logits.
    """
    cfg, weight = model.cfg, model.embedding.weight
    prompt_ids = range(len(prompts)) if prompt_ids is None else prompt_ids
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
    own_width = max(room_P, default=0)
    # A prompt without room gives empty samples: it is not even run.
    prompt_width = max((len(prompt) for prompt, room in zip(prompts, room_P) if room), default=0)
    num_blocks = math.ceil(own_width / (128 if is_static else 16))
    block = math.ceil(own_width / max(num_blocks, 1))
    prompt_bytes = cache_bytes_per_token(cfg, weight.dtype) * prompt_width
    row_bytes = cache_bytes_per_token(cfg, weight.dtype) * num_blocks * block
    counts = (len(prompts), group_size, max_rows)
    num_rows, num_places = fit_rows(*counts, cache_gb, prompt_bytes, row_bytes)
    sizes = (num_places, min(group_size, num_rows), num_rows, prompt_width, num_blocks, block)
    choose = partial(
        choose_tokens, temperature=temperature, vocab_limit=vocab_limit, top_k=top_k, top_p=top_p
    )
    ends = [text.encode() for text in stop]
    keys = stream_keys(seed, step, prompt_ids, range(group_size)).tolist()
    rows = [
        _Row(p, g, keys[p][g], room_P[p]) for p in range(len(prompts)) for g in range(group_size)
    ]
    waiting = deque(row for row in rows if row.limit)

    def loop() -> Iterator[Sample]:
        began, num_tokens = time.perf_counter(), 0
        cache = GroupCache(cfg, *sizes, weight.detach(), is_static)
        batch = _Batch(
            packed(model), cache, prompts, waiting, choose, eos_ids, ends, tokenizer, is_static
        )
        bar = progress_bar(
            total=len(rows), desc="sampling", unit=" samples", disable=progress is None,
            delay=progress or 0.0, leave=not progress,
        )  # fmt: skip
        try:
            for row in rows:
                if not row.limit:
                    bar.update()
                    yield Sample(row.prompt, row.index, *batch.nothing(), False)
            while batch.waiting or batch.rows:
                batch.admit()
                batch.step()
                for sample in batch.collect():
                    num_tokens += len(sample.tokens_T)
                    rate = num_tokens / (time.perf_counter() - began)
                    bar.set_postfix_str(f"{rate:.0f} tokens/s, {len(batch.rows)} rows", False)
                    bar.update()
                    yield sample
        finally:
            batch.free()
            bar.close()

    return loop()


class PackedLinear(nn.Module):
    """A Linear whose weight oneDNN has laid out for its own products; without gradients."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        self.bias, self.weight = linear.bias, torch.ops.mkldnn._reorder_linear_weight(weight, 128)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def packed(model: Transformer) -> Transformer:
    """Return the model; in fp32 on a CPU a twin that holds the large weights again, repacked."""
    weight = model.embedding.weight
    if weight.is_cuda or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return model
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    large = {name: m for name, m in linears.items() if m.weight.numel() > SMALL_WEIGHT}
    if not large:
        return model
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for name, linear in large.items():
        parent, _, last = name.rpartition(".")
        setattr(twin.get_submodule(parent), last, PackedLinear(linear))
    return twin


def fit_rows(
    num_prompts: int,
    group_size: int,
    max_rows: int,
    cache_gb: float,
    prompt_bytes: int,
    row_bytes: int,
) -> tuple[int, int]:
    """Return how many rows are sampled at a time, and from how many prompts."""
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
    """What the host knows of a sample."""

    prompt: int
    index: int
    key: int  # of its random stream
    limit: int  # tokens at most
    born: int = 0  # steps made before its first token was drawn
    text: bytes = b""  # of the first num_read tokens, kept where there are stop strings
    num_read: int = 0


class _Batch:
    """The rows being sampled, the prompts they continue, and what waits for a row.

    What a step reads and writes lies on the device and never moves; the host knows which sample is
    in which row, and which prompt in which place of the cache.
    """

    def __init__(self, model, cache, prompts, waiting, choose, eos_ids, stops, tokenizer, static):
        self.model, self.cache, self.prompts, self.choose = model, cache, prompts, choose
        self.waiting, self.stops, self.tokenizer = waiting, stops, tokenizer
        self.rows: dict[int, _Row] = {}
        self.place_of: dict[int, int] = {}  # of the prompts in the cache
        self.steps, self.arranged = 0, None
        # A GPU stalls when asked who has ended, and wants few shapes; a CPU has the answer at once,
        # and every row that it does not compute is time won.
        self.static, self.interval, self.shrink = static, *((8, 0.5) if static else (1, 0.9))
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}
        num_rows, num_places = len(cache.place_R), len(cache.prompt_length_A)
        num_blocks, _, block, _ = cache.own_keys[0].shape
        zeros = partial(torch.zeros, device=cache.place_R.device)
        self.is_eos_V = zeros(model.cfg.vocab_size, dtype=torch.bool)
        self.is_eos_V[list(eos_ids)], self.eos_ids = True, {*eos_ids}
        dtype = model.embedding.weight.dtype
        self.prompt_logits_AV = zeros(num_places, model.cfg.vocab_size, dtype=dtype)
        self.token_R, self.limit_R, self.key_R = zeros(3, num_rows, dtype=torch.long).unbind(0)
        self.done_R = zeros(num_rows, dtype=torch.bool) | True
        # One column more than tokens: where rows that have ended write.
        self.tokens_RT = zeros(num_rows, num_blocks * block + 1, dtype=torch.long)
        wide = torch.promote_types(dtype, torch.float32)
        self.logp_RT = zeros(num_rows, num_blocks * block + 1, dtype=wide)

    # ------------------------------------------------------------------------------- admit

    @torch.no_grad()
    def admit(self) -> None:
        """Give free rows to waiting samples, in order, as long as their prompts find a place."""
        needed = {row.prompt for row in (*self.rows.values(), *islice(self.waiting, 1))}
        self.place_of = {p: place for p, place in self.place_of.items() if p in needed}
        if not self.waiting:
            return
        rows = [row for row in range(len(self.token_R)) if row not in self.rows]
        taken = self.place_of.values()
        places = [a for a in range(len(self.prompt_logits_AV)) if a not in taken]
        admitted, loaded = {}, []
        while self.waiting and rows:
            p = self.waiting[0].prompt
            if p not in self.place_of:
                if not places:
                    break
                self.place_of[p] = places.pop(0)
                loaded.append(p)
            admitted[rows.pop(0)] = self.waiting.popleft()
        if not (admitted or self.rows):
            raise RuntimeError("sample_groups: no sample finds a row: a fault in here")
        if admitted:
            self._prefill(loaded)
            self._open(admitted)
            self.rows |= admitted
            self.arranged = None

    def _prefill(self, loaded: list[int]) -> None:
        """Run each prompt once: fill its place, and keep the logits after its last token."""
        device, count = (
            self.token_R.device,
            max(1, PREFILL_TOKENS // self.cache.prompt_values[0].shape[1]),
        )
        for some in (loaded[i : i + count] for i in range(0, len(loaded), count)):
            tokens = [torch.tensor(self.prompts[p]) for p in some]
            lengths_P = torch.tensor([len(prompt) for prompt in tokens], device=device)
            places_P = torch.tensor([self.place_of[p] for p in some], device=device)
            last = torch.arange(len(some), device=device), lengths_P - 1
            self.cache.load(places_P, lengths_P)
            self.prompt_logits_AV[places_P] = self.model(
                pad_sequence(tokens, batch_first=True).to(device),
                cache=self.cache,
                head_fn=lambda hidden_PTD, _, at=last: self.model.head(hidden_PTD[at]),
            )

    def _open(self, admitted: dict[int, _Row]) -> None:
        """Begin each sample in its row: draw its first token from its prompt's logits."""
        for row in admitted.values():
            row.born = self.steps
        values = [(r, self.place_of[s.prompt], s.key, s.limit) for r, s in admitted.items()]
        rows_R, places_R, key_R, limit_R = torch.tensor(values, device=self.token_R.device).T
        self.cache.open(rows_R, places_R)
        uniform_R = uniform_noise(key_R, torch.zeros_like(key_R))
        token_R, logp_R = self.choose(self.prompt_logits_AV[places_R], uniform_R)
        self.key_R[rows_R], self.limit_R[rows_R] = key_R, limit_R
        self.token_R[rows_R] = self.tokens_RT[rows_R, 0] = token_R
        self.logp_RT[rows_R, 0] = logp_R
        self.done_R[rows_R] = self.is_eos_V[token_R] | (limit_R <= 1)

    # -------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self) -> None:
        """Draw a token in each row that has not ended; on a GPU a few times."""
        cache, rows = self.cache, self.rows
        left = max(row.limit + row.born - self.steps for row in rows.values()) - 1
        count = min(self.interval, max(left, 0))
        if count == 0:
            return
        num_blocks, _, block, _ = cache.own_keys[0].shape
        num_blocks = min(math.ceil((self.steps + count) / block), num_blocks)
        shape = self._move_below()
        if self.arranged != (*shape, num_blocks):
            fullest = max(Counter(row.prompt for row in rows.values()).values())
            per_place = cache.per_place if self.static else fullest
            cache.arrange(*shape, per_place, num_blocks)
            self.arranged = (*shape, num_blocks)
        for _ in range(count):
            self._replay()
        self.steps += count

    def _move_below(self) -> tuple[int, int]:
        """Move the last rows and prompts into holes; return how many rows and places hold all."""
        num_rows = self._size(len(self.rows), len(self.token_R))
        num_places = self._size(len(self.place_of), len(self.prompt_logits_AV))
        new_place = _holes(self.place_of.values(), num_places)
        if new_place:
            self.place_of = {p: new_place.get(a, a) for p, a in self.place_of.items()}
            source, target = torch.tensor([*new_place.items()], device=self.token_R.device).T
            self.cache.move_prompts(source, target)
            self.prompt_logits_AV[target] = self.prompt_logits_AV[source]
        new_row = _holes(self.rows, num_rows)
        if new_row:
            self.rows |= {new: self.rows.pop(old) for old, new in new_row.items()}
            source, target = torch.tensor([*new_row.items()], device=self.token_R.device).T
            self.cache.move_rows(source, target)
            state = (self.token_R, self.limit_R, self.key_R, self.tokens_RT, self.logp_RT)
            for tensor in (*state, self.done_R):
                tensor[target] = tensor[source]
            self.done_R[source] = True
        if new_place or new_row:
            self.arranged = None
        return num_rows, num_places

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
            self.decode()
            return
        if self.graphs[shape] is None:
            # All in one pool of memory: none leaves anything there that another one reads.
            pools = [graph.pool() for graph in self.graphs.values() if graph is not None]
            self.graphs[shape] = torch.cuda.CUDAGraph()
            pool = pools[0] if pools else None
            # Other threads, NCCL's watchdog for one, may go on calling CUDA meanwhile.
            with torch.cuda.graph(self.graphs[shape], pool, capture_error_mode="thread_local"):
                self.decode()
        self.graphs[shape].replay()

    def decode(self) -> None:
        """Feed each row its last token and draw the next; nothing here depends on the host."""
        num_rows = self.cache.shape[0]
        logits_RV = self.model(self.token_R[:num_rows, None], cache=self.cache)[:, 0]
        done_R = self.done_R[:num_rows]
        place_R = self.cache.num_own_R[:num_rows] + 1  # of the token to draw, in the sample
        token_R, logp_R = self.choose(logits_RV, uniform_noise(self.key_R[:num_rows], place_R))
        at_R1 = place_R.masked_fill(done_R, self.tokens_RT.shape[1] - 1)[:, None]
        self.tokens_RT[:num_rows].scatter_(1, at_R1, token_R[:, None])
        self.logp_RT[:num_rows].scatter_(1, at_R1, logp_R[:, None])
        self.token_R[:num_rows] = token_R
        self.cache.advance(~done_R)
        done_R |= self.is_eos_V[token_R] | (self.limit_R[:num_rows] <= place_R + 1)

    # ----------------------------------------------------------------------------- collect

    def collect(self) -> list[Sample]:
        """Take out the samples that have ended. Raises ValueError if one holds NaN."""
        done = self.done_R.tolist()
        stopped = self._stop_lengths() if self.stops else {}
        ended = [row for row in self.rows if done[row] or row in stopped]
        left = (self.rows[row] for row in self.rows.keys() - ended)
        if any(row.limit <= self.steps - row.born + 1 for row in left):
            raise RuntimeError("sample_groups: a sample passed its limit: a fault in here")
        if not ended:
            return []
        rows_R = torch.tensor(ended, device=self.done_R.device)
        lengths_R = torch.minimum(self.cache.num_own_R[rows_R] + 1, self.limit_R[rows_R])
        lengths = [stopped.get(row, n) for row, n in zip(ended, lengths_R.tolist())]
        tokens_RT, logp_RT = self.tokens_RT[rows_R].cpu(), self.logp_RT[rows_R].cpu()
        if not bool(logp_RT.isfinite().all()):
            raise ValueError(
                "sample_groups: the model's logits are not finite: its weights diverged"
            )
        self.done_R[rows_R] = True
        self.cache.open(rows_R, torch.full_like(rows_R, -1))
        samples = []
        for r, n, tokens_T, logp_T in zip(ended, lengths, tokens_RT.unbind(), logp_RT.unbind()):
            row, tokens_T, logp_T = self.rows.pop(r), tokens_T[:n], logp_T[:n]
            finished = r in stopped or (n > 0 and int(tokens_T[-1]) in self.eos_ids)
            samples.append(Sample(row.prompt, row.index, tokens_T, logp_T, finished))
        return samples

    def nothing(self) -> tuple[Tensor, Tensor]:
        """Return the tokens and logp of an empty sample."""
        return self.tokens_RT[0, :0].cpu(), self.logp_RT[0, :0].cpu()

    def _stop_lengths(self) -> dict[int, int]:
        """Read on in every row; return its tokens up to one that completes a stop string."""
        lengths = (self.cache.num_own_R + 1).tolist()
        tokens, found = self.tokens_RT[:, : max(lengths)].tolist(), {}
        for r, row in self.rows.items():
            for token in tokens[r][row.num_read : min(lengths[r], row.limit)]:
                piece = self.tokenizer.decode_bytes([token])
                row.text, row.num_read = row.text + piece, row.num_read + 1
                if any(text in row.text[-len(text) - len(piece) :] for text in self.stops):
                    found[r] = row.num_read
                    break
        return found

    def free(self) -> None:
        """Give back the memory of cache and graphs, also while a traceback holds this object."""
        self.cache.__dict__.clear()
        self.__dict__.clear()


def _holes(taken, size: int) -> dict[int, int]:
    """Return what has to move where, so that everything taken lies below `size`."""
    beyond = [i for i in taken if i >= size]
    return dict(zip(beyond, (i for i in range(size) if i not in taken)))


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
            progress=0.0,
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
