"""What is being sampled: admit waiting samples, make a step, collect what has ended.

Continuous batching, as vLLM's scheduler does it: a row whose sample has ended is given to the next
waiting sample at once, so that one long output does not hold up the others.

    slot  0: prompt 7   1: prompt 8   2: free         a prompt, once for its group (cache.py)
    row   0 -> slot 1, 3 tokens so far                a sample; those of a group share the slot
          1 -> slot 0, 9 tokens so far
          2 -> idle                                   its sample has ended; the next may move in

`admit` runs new prompts and draws the first token of each of their samples; `step` feeds every row
its newest token and draws the next; `collect` takes out what has ended. When nothing waits any
more, the batch steps down through a few sizes, and the last rows move below the new size.

What a step reads and writes lies on the device and never moves; the host keeps which sample is in
which row and which prompt in which slot, and looks at the device in `collect` alone. The plain form
is `sample_group` in nanomath/sampler.py. Next: cache.py.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kernels import NotFinite
from nanomath.draw import choose_tokens, uniform_noise
from nanomath.engine.cache import GroupCache
from nanomath.engine.packed import packed
from nanomath.model import Transformer
from nanomath.text.tokenizer import Tokenizer

PREFILL_TOKENS = 16_384  # of one pass over prompts: bounds the memory of its activations


@dataclass
class Settings:
    """How to sample: the keyword arguments of `sample_groups` and `sample_stream`."""

    max_new_tokens: int
    eos_ids: Sequence[int]  # each ends a sample, and is kept and counted
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # keep the k most likely ids; 0: all
    top_p: float = 1.0  # then the fewest ids that hold this share of what is left
    stop: Sequence[str] = ()  # the token that completes one ends a sample, and is kept and counted
    tokenizer: Tokenizer | None = None  # turns tokens into text, to find `stop` in it
    seed: int = 0
    step: int = 0
    prompt_ids: Sequence[int] | None = None  # one for each prompt's random stream; None: 0, 1, ...
    vocab_limit: int | None = None  # ids from here on are never sampled
    max_rows: int = 512  # sampled at a time
    cache_gb: float = math.inf  # 10^9 bytes of keys and values at most: maybe fewer rows
    progress: float | None = None  # seconds before a bar appears
    # Batches of few shapes, at fixed addresses, and a look at who has ended only every few steps:
    # on a GPU, where it is the default, each shape is a CUDA graph.
    static: bool | None = None


@dataclass
class Sample:
    """One finished sample, on the CPU."""

    prompt: int  # index into the prompts
    index: int  # in its group
    tokens_T: Tensor  # int64, the sampled EOS included
    logp_T: Tensor  # fp32 (float64 of a float64 model), as in Rollouts
    finished: bool  # ended by an EOS or a stop string; False: truncated


@dataclass
class Row:
    """What the host knows of a sample that waits or is being drawn."""

    prompt: int
    index: int
    key: int  # the key of the sample's random stream (draw.stream_keys)
    limit: int  # the most tokens the sample may have
    length: int = 0  # how many it had when `collect` last looked at the device
    text: bytes = b""  # its text so far; only kept where there are stop strings to look for
    stopped: bool = False  # True once its text holds a stop string


class Scheduler:
    """At most as many rows and prompts as the cache has room for; the other rows wait."""

    def __init__(
        self,
        model: Transformer,
        cache: GroupCache,
        prompts: Sequence[Sequence[int]],
        how: Settings,
    ):
        self.model, self.cache, self.prompts, self.how = packed(model), cache, prompts, how
        self.waiting: deque[Row] = deque()
        self.rows: dict[int, Row] = {}
        self.slot_of: dict[int, int] = {}  # of the prompts in the cache
        self.num_steps = 0
        # A GPU stalls when asked who has ended, and wants few shapes; a CPU has the answer at once,
        # and every row that it does not compute is time won.
        self.interval, self.shrink = (8, 0.5) if how.static else (1, 0.9)
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.stops = [text.encode() for text in how.stop]

        weight = model.embedding.weight
        num_rows, num_slots = len(cache.slot_R), len(cache.prompt_length_S)
        zeros = partial(torch.zeros, device=weight.device)
        self.is_eos_V = zeros(model.cfg.vocab_size, dtype=torch.bool)
        self.is_eos_V[list(how.eos_ids)] = True
        self.prompt_logits_SV = zeros(num_slots, model.cfg.vocab_size, dtype=weight.dtype)
        self.row_R = torch.arange(num_rows, device=weight.device)
        self.token_R, self.key_R = zeros(2, num_rows, dtype=torch.long).unbind(0)
        # One column more than tokens: where rows that are full write.
        width = cache.num_columns + 1
        self.tokens_RT = zeros(num_rows, width, dtype=torch.long)
        self.logp_RT = zeros(
            num_rows, width, dtype=torch.promote_types(weight.dtype, torch.float32)
        )

    def run(self, rows: Sequence[Row]) -> Iterator[Sample]:
        """Yield the sample of each row when it has ended."""
        for row in rows:
            if row.limit:
                self.waiting.append(row)
            else:
                yield self._sample(row, self.tokens_RT[0].cpu(), self.logp_RT[0].cpu())
        while self.waiting or self.rows:
            self.admit()
            self.step()
            yield from self.collect()

    # ------------------------------------------------------------------------------- admit

    @torch.no_grad()
    def admit(self) -> None:
        """Give free rows to waiting samples, in order, as long as their prompts find a slot."""
        needed = {row.prompt for row in (*self.rows.values(), *islice(self.waiting, 1))}
        self.slot_of = {p: slot for p, slot in self.slot_of.items() if p in needed}
        rows = _free_indices({*self.rows}, len(self.token_R))
        slots = _free_indices({*self.slot_of.values()}, len(self.cache.prompt_length_S))
        admitted, new_prompts = {}, []
        while self.waiting and (len(admitted) + len(self.rows) < len(self.token_R)):
            p = self.waiting[0].prompt
            if p not in self.slot_of:
                slot = next(slots, None)
                if slot is None:
                    break
                self.slot_of[p] = slot
                new_prompts.append(p)
            admitted[next(rows)] = self.waiting.popleft()
        if not admitted:
            return
        self._prefill(new_prompts)
        rows_R, slots_R, key_R = self._columns(
            (r, self.slot_of[row.prompt], row.key) for r, row in admitted.items()
        )
        self.cache.open(rows_R, slots_R)
        self.key_R[rows_R] = key_R
        self._draw(rows_R, self.prompt_logits_SV[slots_R])
        self.rows |= admitted

    def _prefill(self, new_prompts: list[int]) -> None:
        """Run each prompt once: fill its slot, and keep the logits after its last token."""
        count = max(1, PREFILL_TOKENS // self.cache.prompt_values[0].shape[2])
        for some in (new_prompts[i : i + count] for i in range(0, len(new_prompts), count)):
            tokens = [torch.tensor(self.prompts[p]) for p in some]
            slots_P, lengths_P = self._columns(
                (self.slot_of[p], len(self.prompts[p])) for p in some
            )
            last = self.row_R[: len(some)], lengths_P - 1
            self.prompt_logits_SV[slots_P] = self.model(
                pad_sequence(tokens, batch_first=True).to(slots_P.device),
                cache=self.cache.load(slots_P, lengths_P),
                head_fn=lambda hidden_PTD, _, at=last: self.model.head(hidden_PTD[at]),
            )

    def _columns(self, values) -> Tensor:
        """Return the columns of a table of numbers, on the device."""
        return torch.tensor(list(values), device=self.token_R.device).T

    # -------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self) -> None:
        """Draw a token in each row that has not ended; on a GPU a few times."""
        left = max(row.limit - (row.length or 1) for row in self.rows.values())
        count = min(self.interval, left)
        self.num_steps += count
        shape = self._compact()
        if self.cache.layout_is_stale or shape != self.cache.shape:
            self.cache.set_layout(*shape)
        for _ in range(count):
            self._replay()

    def _compact(self) -> tuple[int, int, int, int]:
        """Move the last rows and prompts to free places below the new size; return that shape."""
        num_rows = self._bucket(len(self.rows), len(self.token_R))
        num_slots = self._bucket(len(self.slot_of), len(self.cache.prompt_length_S))
        if moves := _moves_below(self.slot_of.values(), num_slots):
            self.slot_of = {p: moves.get(a, a) for p, a in self.slot_of.items()}
            source, target = self._columns(moves.items())
            self.cache.move_prompts(source, target)
            self.prompt_logits_SV[target] = self.prompt_logits_SV[source]
        if moves := _moves_below(self.rows, num_rows):
            self.rows = {moves.get(r, r): row for r, row in self.rows.items()}
            source, target = self._columns(moves.items())
            self.cache.move_rows(source, target)
            for tensor in (self.token_R, self.key_R, self.tokens_RT, self.logp_RT):
                tensor[target] = tensor[source]
        per_slot = self.cache.per_slot
        if not self.how.static:
            per_slot = max(Counter(row.prompt for row in self.rows.values()).values())
        used = min(self.num_steps, self.cache.num_columns)
        return num_rows, num_slots, per_slot, math.ceil(used / self.cache.block)

    def _bucket(self, needed: int, total: int) -> int:
        """Return the smallest of total, total * shrink, total * shrink^2, ... that is enough.

        Few sizes: each is a CUDA graph on a GPU, and a new layout on a CPU.
        """
        while needed <= int(total * self.shrink):
            total = int(total * self.shrink)
        return total

    def _replay(self) -> None:
        """Run a step: as it is on a CPU; on a GPU as the CUDA graph of its shape."""
        shape = self.cache.shape
        if shape in self.graphs:
            self.graphs[shape].replay()
            return
        self.decode()  # as it is, which warms up what a capture may not start
        if self.token_R.is_cuda:
            # All in one pool of memory: none leaves anything there that another one reads.
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            graph = torch.cuda.CUDAGraph()
            # Other threads, NCCL's watchdog for one, may go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
                self.decode()
            self.graphs[shape] = graph

    def decode(self) -> None:
        """Feed each row its newest token and draw the next; nothing here depends on the host."""
        num_rows = self.cache.shape[0]
        logits_RV = self.model(self.token_R[:num_rows, None], cache=self.cache)[:, 0]
        self.cache.next_column()
        self._draw(slice(num_rows), logits_RV)

    def _draw(self, rows: Tensor | slice, logits_RV: Tensor) -> None:
        """Draw the next token of these rows; one that has ended draws on, behind its end."""
        at_R, how = self.cache.length_R[rows], self.how
        token_R, logp_R = choose_tokens(
            logits_RV,
            uniform_noise(self.key_R[rows], at_R),
            temperature=how.temperature,
            vocab_limit=how.vocab_limit,
            top_k=how.top_k,
            top_p=how.top_p,
        )
        at = self.row_R[rows], at_R.clamp(max=self.tokens_RT.shape[1] - 1)
        self.tokens_RT[at], self.logp_RT[at] = token_R, logp_R
        self.token_R[rows] = token_R
        self.cache.grow(rows, self.is_eos_V[token_R])

    # ----------------------------------------------------------------------------- collect

    def collect(self) -> list[Sample]:
        """Take out the samples that have ended. Raises ValueError if one holds NaN."""
        slots, lengths = torch.stack((self.cache.slot_R, self.cache.length_R)).tolist()
        tokens = self.tokens_RT[:, : max(lengths)].tolist() if self.stops else ()
        ended = []
        for r, row in self.rows.items():
            seen, row.length = row.length, min(lengths[r], row.limit)
            if self.stops:
                self._read_on(row, tokens[r][seen : row.length])
            if row.stopped or slots[r] < 0 or row.length >= row.limit:
                ended.append(r)
        if not ended:
            return []
        rows_R = torch.tensor(ended, device=self.token_R.device)
        self.cache.slot_R[rows_R] = -1
        tokens_RT, logp_RT = self.tokens_RT[rows_R].cpu(), self.logp_RT[rows_R].cpu()
        if not bool(logp_RT.isfinite().all()):
            raise NotFinite("sample_groups: the model's logits are not finite")
        rows = [self.rows.pop(r) for r in ended]
        return [self._sample(*parts) for parts in zip(rows, tokens_RT, logp_RT)]

    def _sample(self, row: Row, tokens_T: Tensor, logp_T: Tensor) -> Sample:
        tokens_T, logp_T = tokens_T[: row.length], logp_T[: row.length]
        finished = row.stopped or any(token in self.how.eos_ids for token in tokens_T[-1:].tolist())
        return Sample(row.prompt, row.index, tokens_T, logp_T, finished)

    def _read_on(self, row: Row, tokens: list[int]) -> None:
        """Read a row's new tokens; end it with one that completes a stop string."""
        row.length -= len(tokens)
        for token in tokens:
            piece = self.how.tokenizer.decode_bytes([token])
            row.text, row.length = row.text + piece, row.length + 1
            if any(stop in row.text[-len(stop) - len(piece) :] for stop in self.stops):
                row.stopped = True
                return


def _free_indices(taken: set[int], size: int) -> Iterator[int]:
    return (i for i in range(size) if i not in taken)


def _moves_below(taken: Iterable[int], size: int) -> dict[int, int]:
    """Map each taken index of `size` or more to a free one below it."""
    taken = {*taken}
    return dict(zip([i for i in taken if i >= size], _free_indices(taken, size)))
