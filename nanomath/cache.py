"""Keys and values while sampling: a prompt's once for its whole group, a row's own apart.

`Transformer.forward(tokens, cache=cache)` asks it where the tokens stand (`positions`) and what
they attend to (`attend`). The forward pass right after `load` fills prompts; every other pass adds
one token to each row. All tensors are allocated once and never move, and a pass reads no number
from the device, so that a CUDA graph can replay it as long as `shape` is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanomath.model import ModelConfig, attend


def cache_bytes_per_token(cfg: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_size * dtype.itemsize


class GroupCache:
    """Room for `num_places` prompts and `num_rows` rows, at most `per_place` to one prompt.

    A place holds one prompt; a row is a sample that continues the prompt of its place. All rows
    write a pass's token into the same column, and the columns are used in a circle: a row with n
    tokens of its own sees the last n. Once round, a pass reads every column, whatever the rows'
    lengths. A row's next token is at position prompt_length + n, so nothing depends on padding, on
    the age of other rows or on where in the batch a row is. Suffixes: A
    places, R rows, W columns (a prompt's, then the rows' own), C cells (see `arrange`).
    """

    def __init__(
        self,
        cfg: ModelConfig,
        num_places: int,
        per_place: int,
        num_rows: int,
        prompt_width: int,
        num_blocks: int,
        block: int,
        like: Tensor,
        static: bool,
    ):
        self.num_kv_heads, self.scale = cfg.num_kv_heads, cfg.head_size**-0.5
        self.per_place = per_place
        prompts, rows = num_places * self.num_kv_heads, num_rows * self.num_kv_heads
        width, layers = cfg.head_size, range(cfg.num_layers)
        # Zeros, not garbage: what is masked has weight 0, and 0 times NaN is NaN.
        self.prompt_keys = [like.new_zeros(prompts, width, prompt_width) for _ in layers]
        self.prompt_values = [like.new_zeros(prompts, prompt_width, width) for _ in layers]
        # Blocks of columns, each block of all rows in one piece: on a CPU a product that skips
        # columns not used yet takes twice as long.
        own = (num_blocks, rows, block, width)
        self.own_keys = [like.new_empty(own) for _ in layers]
        self.own_values = [like.new_empty(own) for _ in layers]
        self.num_clean_B = [0] * num_blocks  # rows that `arrange` has zeroed, by block

        def counts(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.long, device=like.device)

        # Of the pass to come: on the device where a graph replays it, else as a plain number, by
        # which storing takes a quarter of the time.
        self.column = counts(1) if static else 0
        self.prompt_length_A = counts(num_places) + 1
        self.place_R, self.num_own_R = counts(num_rows) - 1, counts(num_rows)  # place -1: idle
        self.row_of_cell_C, self.cell_of_row_C = counts(prompts * per_place + 1), counts(rows)
        self.shape = (0, 0, 0, 0)  # rows, places, rows per place, blocks
        self._loading_P: Tensor | None = None

    def load(self, places_P: Tensor, lengths_P: Tensor) -> None:
        """Make the next pass fill these places: its rows are prompts, padded on the right."""
        self._loading_P, self.prompt_length_A[places_P] = places_P, lengths_P

    def open(self, rows: Tensor, places: Tensor) -> None:
        """Begin rows, without tokens of their own yet, on the prompts of `places`; -1: idle."""
        self.place_R[rows], self.num_own_R[rows] = places, 0

    def arrange(self, num_rows: int, num_places: int, per_place: int, num_blocks: int) -> None:
        """Set the shape of the next passes: the first rows, places and blocks.

        All queries of a place meet its prompt in one product: cells [place, head, at most
        `per_place` rows] lay it out. The blocks must hold every column written so far and those of
        the passes.
        """
        self.shape = (num_rows, num_places, per_place, num_blocks)
        # Zeroed when first used: memory that is never touched costs nothing, and touching fresh
        # memory is a visible part of a small model's time.
        for block, num_clean in enumerate(self.num_clean_B[:num_blocks]):
            if num_clean < num_rows:
                for cache in (*self.own_keys, *self.own_values):
                    cache[block, num_clean * self.num_kv_heads : num_rows * self.num_kv_heads] = 0
                self.num_clean_B[block] = num_rows
        place_R1, num_kv = self.place_R[:num_rows, None], self.num_kv_heads
        device, num_cells = place_R1.device, num_places * num_kv * per_place
        in_place_RA = place_R1 == torch.arange(num_places, device=device)
        seat_R1 = in_place_RA.cumsum(0).gather(1, place_R1.clamp(min=0)) - 1
        heads = torch.arange(num_kv, device=device)
        cell_RK = (place_R1 * num_kv + heads) * per_place + seat_R1
        # An idle row has a cell behind all others. An empty cell repeats row 0; nobody reads it.
        cell_C = cell_RK.masked_fill(place_R1 < 0, num_cells).flatten()
        self.row_of_cell_C[:num_cells] = 0
        self.row_of_cell_C[cell_C] = torch.arange(len(cell_C), device=device)
        self.cell_of_row_C[: len(cell_C)] = cell_C.clamp(max=num_cells - 1)
        rows, places = len(cell_C), num_places * num_kv
        self._cells = self.row_of_cell_C[:num_cells], self.cell_of_row_C[:rows]
        self._used = [
            (
                prompt_keys[:places],
                prompt_values[:places],
                own_keys[:num_blocks, :rows].mT.unbind(),
                own_values[:num_blocks, :rows].unbind(),
            )
            for prompt_keys, prompt_values, own_keys, own_values in zip(
                self.prompt_keys, self.prompt_values, self.own_keys, self.own_values
            )
        ]

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        """Copy rows over others, whose tokens are lost, and leave them idle."""
        for cache in (*self.own_keys, *self.own_values):
            by_row = cache[: self.shape[3]].unflatten(1, (-1, self.num_kv_heads))
            by_row[:, target] = by_row[:, source]
        self.num_own_R[target] = self.num_own_R[source]
        self.place_R[target], self.place_R[source] = self.place_R[source], -1

    def move_prompts(self, source: Tensor, target: Tensor) -> None:
        """Copy prompts to other places; their rows follow."""
        for cache in (*self.prompt_keys, *self.prompt_values):
            by_prompt = cache.unflatten(0, (-1, self.num_kv_heads))
            by_prompt[target] = by_prompt[source]
        self.prompt_length_A[target] = self.prompt_length_A[source]
        new_place_A = torch.arange(len(self.prompt_length_A), device=source.device)
        new_place_A[source] = target
        self.place_R.copy_(torch.where(self.place_R < 0, -1, new_place_A[self.place_R]))

    def advance(self, live_R: Tensor) -> None:
        """Count the token that the pass has stored, in the rows whose entry is True."""
        self.num_own_R[: len(live_R)] += live_R
        num_blocks, _, block, _ = self.own_keys[0].shape
        self.column += 1
        self.column %= num_blocks * block

    def positions(self, num_rows: int, num_tokens: int) -> Tensor:
        """Return the positions [B, T] of a pass's tokens; lay out what all its layers share."""
        device = self.place_R.device
        if self._loading_P is not None:
            return torch.arange(num_tokens, device=device).expand(num_rows, -1)
        total_blocks, _, block, _ = self.own_keys[0].shape
        self._block, self._offset = self.column // block, self.column % block
        own_R1 = self.num_own_R[:num_rows, None]
        length_R1 = self.prompt_length_A[self.place_R[:num_rows, None]]
        prompt_W = torch.arange(self.prompt_values[0].shape[1], device=device)
        column_W = torch.arange(self.shape[3] * block, device=device)
        age_W = (self.column - column_W) % (total_blocks * block)
        unseen_RW = torch.cat((prompt_W >= length_R1, age_W > own_R1), 1)
        bias_RW = self.own_keys[0].new_zeros(unseen_RW.shape)
        self._bias_R1W = bias_RW.masked_fill_(unseen_RW, float("-inf"))[:, None]
        return length_R1 + own_R1

    def attend(
        self, layer: int, query_BTHE: Tensor, key_BTKE: Tensor, value_BTKE: Tensor
    ) -> Tensor:
        """Store keys and values of `layer` and return the attention [B, T, H, E]."""
        if self._loading_P is None:
            return self._decode(layer, query_BTHE, key_BTKE, value_BTKE)
        num_kv, num_tokens = self.num_kv_heads, key_BTKE.shape[1]
        keys_AKET = self.prompt_keys[layer].unflatten(0, (-1, num_kv))
        keys_AKET[self._loading_P, :, :, :num_tokens] = key_BTKE.permute(0, 2, 3, 1)
        values_AKTE = self.prompt_values[layer].unflatten(0, (-1, num_kv))
        values_AKTE[self._loading_P, :, :num_tokens] = value_BTKE.transpose(1, 2)
        if layer + 1 == len(self.prompt_keys):
            self._loading_P = None  # the last layer's prompts are in: from now on, one token a row
        # Right padding comes after every real token, so causal attention never sees it.
        return attend(query_BTHE, key_BTKE, value_BTKE, None)

    def _decode(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        num_rows, _, num_heads, width = query.shape
        num_kv, per_kv = self.num_kv_heads, num_heads // self.num_kv_heads
        rows, places = num_rows * num_kv, self.shape[1] * num_kv
        row_of_cell_C, cell_of_row_C = self._cells
        prompt_keys, prompt_values, own_keys, own_values = self._used[layer]
        num_prompt, block = prompt_values.shape[1], self.own_keys[0].shape[2]
        for cache, new in ((self.own_keys[layer], key), (self.own_values[layer], value)):
            cache[self._block, :rows, self._offset] = new.reshape(rows, width)
        query = (query * self.scale).view(rows, per_kv * width)

        # Scores against the shared prompt: one product for all queries of a group.
        grouped = query.index_select(0, row_of_cell_C).view(places, -1, width)
        shared = torch.bmm(grouped, prompt_keys).view(-1, per_kv * num_prompt)
        shared = shared.index_select(0, cell_of_row_C).view(rows, per_kv, num_prompt)
        # Scores against the row's own tokens; then one softmax over both.
        query = query.view(rows, per_kv, width)
        scores = torch.cat([shared, *(torch.bmm(query, keys) for keys in own_keys)], -1)
        scores = scores.view(num_rows, num_heads, -1).add_(self._bias_R1W)
        weights = scores.softmax(-1).view(rows, per_kv, -1)
        shared, *own = weights.split([num_prompt] + [block] * len(own_keys), -1)

        shared = shared.flatten(1).index_select(0, row_of_cell_C).view(places, -1, num_prompt)
        out = torch.bmm(shared, prompt_values).view(-1, per_kv * width)
        out = out.index_select(0, cell_of_row_C).view(rows, per_kv, width)
        for weight, values in zip(own, own_values):
            out.baddbmm_(weight, values)
        return out.view(num_rows, 1, num_heads, width)
