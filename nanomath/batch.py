"""The rows being sampled: admit waiting samples, make a step, collect what has ended.

`admit` runs prompts and draws the first token of each of their samples; `step` feeds every row its
newest token and draws the next; `collect` takes out what has ended:

    place  0: prompt 7   1: prompt 8   2: free         a prompt, once for its group (cache.py)
    row    0 -> place 1, 3 tokens so far               a sample; those of a group share the place
           1 -> place 0, 9 tokens so far
           2 -> idle                                   its sample has ended; the next may move in

What a step reads and writes lies on the device and never moves; the host keeps which sample is in
which row and which prompt in which place, and looks at the device in `collect` alone.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kernels import NotFinite
from nanomath.cache import GroupCache
from nanomath.draw import choose_tokens, uniform_noise
from nanomath.model import Transformer, packed

if TYPE_CHECKING:
    from nanomath.sampler import Settings

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
class Row:
    """What the host knows of a sample that waits or is being drawn."""

    prompt: int
    index: int
    key: int  # of its random stream
    limit: int  # tokens at most
    length: int = 0  # tokens at the last look
    text: bytes = b""  # of them, kept where there are stop strings
    stopped: bool = False  # by one of those


class Batch:
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
        self.place_of: dict[int, int] = {}  # of the prompts in the cache
        self.num_steps = 0
        # A GPU stalls when asked who has ended, and wants few shapes; a CPU has the answer at once,
        # and every row that it does not compute is time won.
        self.interval, self.shrink = (8, 0.5) if how.static else (1, 0.9)
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.stops = [text.encode() for text in how.stop]

        weight = model.embedding.weight
        num_rows, num_places = len(cache.place_R), len(cache.prompt_length_A)
        zeros = partial(torch.zeros, device=weight.device)
        self.is_eos_V = zeros(model.cfg.vocab_size, dtype=torch.bool)
        self.is_eos_V[list(how.eos_ids)] = True
        self.prompt_logits_AV = zeros(num_places, model.cfg.vocab_size, dtype=weight.dtype)
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
        """Give free rows to waiting samples, in order, as long as their prompts find a place."""
        needed = {row.prompt for row in (*self.rows.values(), *islice(self.waiting, 1))}
        self.place_of = {p: place for p, place in self.place_of.items() if p in needed}
        rows = _free({*self.rows}, len(self.token_R))
        places = _free({*self.place_of.values()}, len(self.cache.prompt_length_A))
        admitted, new_prompts = {}, []
        while self.waiting and (len(admitted) + len(self.rows) < len(self.token_R)):
            p = self.waiting[0].prompt
            if p not in self.place_of:
                place = next(places, None)
                if place is None:
                    break
                self.place_of[p] = place
                new_prompts.append(p)
            admitted[next(rows)] = self.waiting.popleft()
        if not admitted:
            return
        self._prefill(new_prompts)
        rows_R, places_R, key_R = self._columns(
            (r, self.place_of[row.prompt], row.key) for r, row in admitted.items()
        )
        self.cache.open(rows_R, places_R)
        self.key_R[rows_R] = key_R
        self._draw(rows_R, self.prompt_logits_AV[places_R])
        self.rows |= admitted

    def _prefill(self, new_prompts: list[int]) -> None:
        """Run each prompt once: fill its place, and keep the logits after its last token."""
        count = max(1, PREFILL_TOKENS // self.cache.prompt_values[0].shape[2])
        for some in (new_prompts[i : i + count] for i in range(0, len(new_prompts), count)):
            tokens = [torch.tensor(self.prompts[p]) for p in some]
            places_P, lengths_P = self._columns(
                (self.place_of[p], len(self.prompts[p])) for p in some
            )
            last = self.row_R[: len(some)], lengths_P - 1
            self.prompt_logits_AV[places_P] = self.model(
                pad_sequence(tokens, batch_first=True).to(places_P.device),
                cache=self.cache.load(places_P, lengths_P),
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
        shape = self._close_up()
        if self.cache.stale or shape != self.cache.shape:
            self.cache.arrange(*shape)
        for _ in range(count):
            self._replay()

    def _close_up(self) -> tuple[int, int, int, int]:
        """Move the last rows and prompts into holes; return the shape that then holds all."""
        num_rows = self._size(len(self.rows), len(self.token_R))
        num_places = self._size(len(self.place_of), len(self.cache.prompt_length_A))
        if moves := _holes(self.place_of.values(), num_places):
            self.place_of = {p: moves.get(a, a) for p, a in self.place_of.items()}
            source, target = self._columns(moves.items())
            self.cache.move_prompts(source, target)
            self.prompt_logits_AV[target] = self.prompt_logits_AV[source]
        if moves := _holes(self.rows, num_rows):
            self.rows = {moves.get(r, r): row for r, row in self.rows.items()}
            source, target = self._columns(moves.items())
            self.cache.move_rows(source, target)
            for tensor in (self.token_R, self.key_R, self.tokens_RT, self.logp_RT):
                tensor[target] = tensor[source]
        per_place = self.cache.per_place
        if not self.how.static:
            per_place = max(Counter(row.prompt for row in self.rows.values()).values())
        used = min(self.num_steps, self.cache.num_columns)
        return num_rows, num_places, per_place, math.ceil(used / self.cache.block)

    def _size(self, needed: int, total: int) -> int:
        """Return the smallest of total, total * shrink, total * shrink^2, ... that is enough."""
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
        places, lengths = torch.stack((self.cache.place_R, self.cache.length_R)).tolist()
        tokens = self.tokens_RT[:, : max(lengths)].tolist() if self.stops else ()
        ended = []
        for r, row in self.rows.items():
            seen, row.length = row.length, min(lengths[r], row.limit)
            if self.stops:
                self._read_on(row, tokens[r][seen : row.length])
            if row.stopped or places[r] < 0 or row.length >= row.limit:
                ended.append(r)
        if not ended:
            return []
        rows_R = torch.tensor(ended, device=self.token_R.device)
        self.cache.place_R[rows_R] = -1
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


def _free(taken: set[int], size: int) -> Iterator[int]:
    return (i for i in range(size) if i not in taken)


def _holes(taken: Iterable[int], size: int) -> dict[int, int]:
    """Return what has to move where, so that everything taken lies below `size`."""
    taken = {*taken}
    return dict(zip([i for i in taken if i >= size], _free(taken, size)))
