"""Keys and values while sampling: a prompt's once for its whole group, a row's own tokens apart.

The idea is shared-prefix attention (Hydragen, arXiv:2402.05099). The G outputs of a question all
attend to the same prompt, so its keys are read once for the group, in one matrix product with the
queries of all its rows; then each row attends to its own tokens; one softmax goes over both:

    slot 0   K V of prompt 7   <==  q of rows 1 2 5   one product for the group
    slot 1   K V of prompt 8   <==  q of rows 0 3 4
    ring     row 0  . . . x x x     each row's own tokens. All rows write the same column of the
             row 1  x x x x x x     ring in a pass, so storing is one index; a row that began later
             row 2  . x x x x x     has fewer columns behind it. `.` is older than the row: masked.

Groups have unequal numbers of rows left, and a batched product wants equal ones, so the queries are
gathered into a padded layout [slot, head, at most `per_slot` rows] and scattered back (set_layout).

The plain form is `KeyValues` in nanomath/sampler.py: one copy of the prompt per row, no ring, no
layout. `Transformer.forward(tokens, cache=cache)` asks a cache where the tokens stand (`positions`)
and what they attend to (`attend`). A pass with what `load` returns fills slots with prompts; a pass
with the cache itself adds one token to each row. All tensors are allocated once and never move, and
a pass reads no number from the device, so that a CUDA graph can replay it while `shape` is the
same.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nanomath import model
from nanomath.model import ModelConfig, attend


def cache_bytes_per_token(cfg: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_size * dtype.itemsize


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
        num_slots = min(num_prompts, num_rows, 3 * math.ceil(num_rows / group_size))
        if num_rows * row_bytes + num_slots * prompt_bytes <= cache_gb * 1e9:
            return num_rows, num_slots
    raise ValueError(
        f"sample_groups: cache_gb {cache_gb:g} holds no single sample; it needs "
        f"{(row_bytes + prompt_bytes) / 1e9:.3g} at this prompt length and max_new_tokens"
    )


class CacheSize(NamedTuple):
    """How much a cache has room for."""

    num_rows: int  # samples at a time
    num_slots: int  # prompts at a time
    per_slot: int  # rows of one prompt at most
    prompt_width: int  # tokens of the longest prompt
    num_blocks: int  # of the ring
    block: int  # columns of a block


class GroupCache:
    """Room for prompts and rows: a slot holds a prompt, a row is a sample that continues it.

    All rows write a pass's token into the same column, and the columns are used in a circle: a row
    with n tokens of its own sees the last n. Once round, a pass reads every column, whatever the
    rows' lengths. A row's next token is at position prompt_length + n, so nothing depends on
    padding, on the age of other rows or on where in the batch a row is. Suffixes: S slots, R rows,
    W columns (a prompt's, then the rows' own), C places of the padded layout (see `set_layout`).
    """

    def __init__(self, cfg: ModelConfig, like: Tensor, size: CacheSize, static: bool):
        num_rows, num_slots, per_slot, prompt_width, num_blocks, block = size
        self.per_slot, self.block, self.num_columns = per_slot, block, num_blocks * block
        heads, width, layers = cfg.num_kv_heads, cfg.head_size, range(cfg.num_layers)
        # Zeros, not garbage: what is masked has weight 0, and 0 times NaN is NaN.
        prompts = num_slots, heads
        self.prompt_keys = [like.new_zeros(*prompts, width, prompt_width) for _ in layers]
        self.prompt_values = [like.new_zeros(*prompts, prompt_width, width) for _ in layers]
        # Blocks of columns, each block of all rows in one piece: on a CPU a product that skips
        # columns not used yet takes twice as long.
        own = num_blocks, num_rows, heads, block, width
        self.own_keys = [like.new_empty(own) for _ in layers]
        self.own_values = [like.new_empty(own) for _ in layers]
        self.num_clean_B = [0] * num_blocks  # rows that `set_layout` has zeroed, by block

        counts = partial(torch.zeros, dtype=torch.long, device=like.device)
        # The ring's column that the next pass writes. A CUDA graph must find it on the device;
        # elsewhere a plain number is better: storing by it takes a quarter of the time.
        self.column = counts(1) if static else 0
        self.prompt_length_S = counts(num_slots)
        self.slot_R = counts(num_rows) - 1  # -1: idle
        self.length_R = counts(num_rows) + 1  # tokens drawn; the newest is for the pass to store
        self.padded_of_row_C = counts(num_rows * heads)
        self.row_of_padded_C = counts(num_slots * heads * per_slot + 1)
        self.shape = (0, 0, 0, 0)  # rows, slots, rows per slot, blocks
        self.layout_is_stale = True  # rows or prompts came or moved: `set_layout` is due

    def load(self, slots_P: Tensor, lengths_P: Tensor) -> PromptPass:
        """Return the cache of a pass that fills these slots: P prompts, padded on the right."""
        self.prompt_length_S[slots_P] = lengths_P
        return PromptPass(self, slots_P)

    def open(self, rows: Tensor, slots: Tensor) -> None:
        """Begin rows, without tokens of their own yet, on the prompts of `slots`."""
        self.slot_R[rows], self.length_R[rows] = slots, 0
        self.layout_is_stale = True

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        """Copy rows over others, whose tokens are lost, and leave them idle."""
        for cache in (*self.own_keys, *self.own_values):
            cache[: self.shape[3], target] = cache[: self.shape[3], source]
        self.slot_R[target], self.length_R[target] = self.slot_R[source], self.length_R[source]
        self.slot_R[source], self.layout_is_stale = -1, True

    def move_prompts(self, source: Tensor, target: Tensor) -> None:
        """Copy prompts to other slots; their rows follow."""
        for tensor in (*self.prompt_keys, *self.prompt_values, self.prompt_length_S):
            tensor[target] = tensor[source]
        new_slot_S = torch.arange(len(self.prompt_length_S), device=source.device)
        new_slot_S[source] = target
        self.slot_R.copy_(torch.where(self.slot_R < 0, -1, new_slot_S[self.slot_R]))
        self.layout_is_stale = True

    def set_layout(self, num_rows: int, num_slots: int, per_slot: int, num_blocks: int) -> None:
        """Set the shape of the next passes: the first rows, slots and blocks of columns.

        Work out once, for all layers and passes of this shape, where in the padded layout
        [slot, head, at most `per_slot` rows] each row's queries go, and back. The blocks must hold
        every column written so far and those of the passes to come.
        """
        self.shape, self.layout_is_stale = (num_rows, num_slots, per_slot, num_blocks), False
        # Zeroed when first used: touching fresh memory is a visible part of a small model's time.
        for block, num_clean in enumerate(self.num_clean_B[:num_blocks]):
            for cache in (*self.own_keys, *self.own_values):
                cache[block, num_clean:num_rows] = 0
            self.num_clean_B[block] = max(num_clean, num_rows)
        slot_R1, num_kv = self.slot_R[:num_rows, None], self.prompt_keys[0].shape[1]
        device, num_padded = slot_R1.device, num_slots * num_kv * per_slot
        # A row's number within its group: how many rows of the same slot come before it.
        in_slot_RS = slot_R1 == torch.arange(num_slots, device=device)
        member_R1 = in_slot_RS.cumsum(0).gather(1, slot_R1.clamp(min=0)) - 1
        heads = torch.arange(num_kv, device=device)
        padded_RK = (slot_R1 * num_kv + heads) * per_slot + member_R1
        # An idle row goes behind the layout. A place without a row repeats row 0, and is not read.
        padded_C = padded_RK.masked_fill(slot_R1 < 0, num_padded).flatten()
        self.row_of_padded_C[:num_padded] = 0
        self.row_of_padded_C[padded_C] = torch.arange(len(padded_C), device=device)
        self.padded_of_row_C[: len(padded_C)] = padded_C.clamp(max=num_padded - 1)
        self._padded = self.row_of_padded_C[:num_padded], self.padded_of_row_C[: len(padded_C)]
        # Views of what a pass reads, cut once here and not in every layer of every pass.
        self._used = [
            (
                prompt_keys[:num_slots].flatten(0, 1),
                prompt_values[:num_slots].flatten(0, 1),
                own_keys[:num_blocks, :num_rows].flatten(1, 2).mT.unbind(),
                own_values[:num_blocks, :num_rows].flatten(1, 2).unbind(),
            )
            for prompt_keys, prompt_values, own_keys, own_values in zip(
                self.prompt_keys, self.prompt_values, self.own_keys, self.own_values
            )
        ]

    def positions(self, num_rows: int, num_tokens: int) -> Tensor:
        """Return the positions [R, 1] of a pass's tokens; lay out what all its layers share."""
        self._block, self._offset = self.column // self.block, self.column % self.block
        own_R1 = self.length_R[:num_rows, None] - 1
        length_R1 = self.prompt_length_S[self.slot_R[:num_rows, None]]
        prompt_W = torch.arange(self.prompt_values[0].shape[2], device=own_R1.device)
        column_W = torch.arange(self.shape[3] * self.block, device=own_R1.device)
        # A column written `age` passes ago holds a row's token only if the row is that old.
        age_W = (self.column - column_W) % self.num_columns
        unseen_RW = torch.cat((prompt_W >= length_R1, age_W > own_R1), 1)
        if not model.IS_CAUSAL:  # else all that is there came before
            own_RW = length_R1 + own_R1 - age_W
            key_RW = torch.cat((prompt_W.expand(len(own_RW), -1), own_RW), 1)
            unseen_RW |= ~model.visible(length_R1 + own_R1, key_RW)
        bias_RW = self.own_keys[0].new_zeros(unseen_RW.shape)
        self._bias_R1W = bias_RW.masked_fill_(unseen_RW, float("-inf"))[:, None]
        return length_R1 + own_R1

    def attend(
        self, layer: int, query_BTHE: Tensor, key_BTKE: Tensor, value_BTKE: Tensor
    ) -> Tensor:
        """Store the rows' keys and values of `layer` and return the attention [R, 1, H, E]."""
        num_rows, _, num_heads, width = query_BTHE.shape
        rows, per_kv = num_rows * key_BTKE.shape[2], num_heads // key_BTKE.shape[2]
        row_of_padded_C, padded_of_row_C = self._padded
        prompt_keys, prompt_values, own_keys, own_values = self._used[layer]
        slots, num_prompt, _ = prompt_values.shape
        for cache, new in ((self.own_keys, key_BTKE), (self.own_values, value_BTKE)):
            cache[layer][self._block, :num_rows, :, self._offset] = new[:, 0]
        # Query heads that share a key head ride along in one row of a product (grouped queries).
        query = (query_BTHE * width**-0.5).view(rows, per_kv * width)

        # Scores against the shared prompt: one product for all queries of a group, which is what
        # reads the prompt's keys once instead of once a row.
        grouped = query.index_select(0, row_of_padded_C).view(slots, -1, width)
        shared = torch.bmm(grouped, prompt_keys).view(-1, per_kv * num_prompt)
        shared = shared.index_select(0, padded_of_row_C).view(rows, per_kv, num_prompt)
        # Scores against the row's own tokens; then one softmax over both.
        query = query.view(rows, per_kv, width)
        scores = torch.cat([shared, *(torch.bmm(query, keys) for keys in own_keys)], -1)
        scores = scores.view(num_rows, num_heads, -1).add_(self._bias_R1W)
        weights = scores.softmax(-1).view(rows, per_kv, -1)
        # The weighted sum of values takes the same two ways: the prompt's by group, own by row.
        shared, *own = weights.split([num_prompt] + [keys.shape[2] for keys in own_keys], -1)

        shared = shared.flatten(1).index_select(0, row_of_padded_C).view(slots, -1, num_prompt)
        out = torch.bmm(shared, prompt_values).view(-1, per_kv * width)
        out = out.index_select(0, padded_of_row_C).view(rows, per_kv, width)
        for weight, values in zip(own, own_values):
            out.baddbmm_(weight, values)
        return out.view(num_rows, 1, num_heads, width)

    def next_column(self) -> None:
        """Go on to the column of the next pass."""
        self.column += 1
        self.column %= self.num_columns

    def grow(self, rows: Tensor | slice, ended_R: Tensor) -> None:
        """Count a token in these rows; those whose entry is True are idle from now on."""
        self.length_R[rows] += self.slot_R[rows] >= 0
        self.slot_R[rows] = self.slot_R[rows].masked_fill(ended_R, -1)


class PromptPass:
    """The cache of a pass over prompts: it stores them in their slots."""

    def __init__(self, cache: GroupCache, slots_P: Tensor):
        self.cache, self.slots_P = cache, slots_P

    def positions(self, num_rows: int, num_tokens: int) -> Tensor:
        """Return 0, 1, ... [P, T] for each prompt."""
        return torch.arange(num_tokens, device=self.slots_P.device).expand(num_rows, -1)

    def attend(
        self, layer: int, query_BTHE: Tensor, key_BTKE: Tensor, value_BTKE: Tensor
    ) -> Tensor:
        """Store keys and values of `layer` and return the attention [P, T, H, E]."""
        keys_SKET, values_SKTE = self.cache.prompt_keys[layer], self.cache.prompt_values[layer]
        keys_SKET[self.slots_P, :, :, : key_BTKE.shape[1]] = key_BTKE.permute(0, 2, 3, 1)
        values_SKTE[self.slots_P, :, : key_BTKE.shape[1]] = value_BTKE.transpose(1, 2)
        # Right padding comes after every real token, so causal attention never sees it.
        return attend(query_BTHE, key_BTKE, value_BTKE, None)
