"""Keys and values while sampling: a prompt's once for its whole group, a row's own apart.

`Transformer.forward(tokens, cache=cache)` asks it where the tokens stand (`positions`) and what
they attend to (`attend`). The forward pass right after `load` fills prompts; every other pass adds
one token to each row. All tensors are allocated once and never move, and a pass
reads no number from the device, so that a CUDA graph can replay it as long as `shape` is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanomath.model import ModelConfig, attend


def cache_bytes_per_token(cfg: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_size * dtype.itemsize


class GroupCache:
    """Room for `num_places` prompts and `num_rows` rows, at most `per_place` to one prompt.

    A place holds one prompt; a row is a sample that continues the prompt of its place. The next
    token of a row with n of its own is at position prompt_length + n, so nothing depends on
    padding, on the age of other rows or on where in the batch a row is. Suffixes: A places, R rows,
    W columns (a prompt's, then the row's own).
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
    ):
        self.num_kv_heads, self.scale = cfg.num_kv_heads, cfg.head_size**-0.5
        self.per_place = per_place
        prompts, rows = num_places * self.num_kv_heads, num_rows * self.num_kv_heads
        width, layers = cfg.head_size, range(cfg.num_layers)
        # Zeros, not garbage: what is masked has weight 0, and 0 times NaN is NaN.
        self.prompt_keys = [like.new_zeros(prompts, width, prompt_width) for _ in layers]
        self.prompt_values = [like.new_zeros(prompts, prompt_width, width) for _ in layers]
        # Own tokens lie in blocks of columns, each block of all rows in one piece: on a CPU a
        # product that skips what a row has not used yet takes twice as long.
        own = (num_blocks, rows, block, width)
        self.own_keys = [like.new_zeros(own) for _ in layers]
        self.own_values = [like.new_zeros(own) for _ in layers]
        self.prompt_length_A = torch.ones(num_places, dtype=torch.long, device=like.device)
        self.place_R = torch.zeros(num_rows, dtype=torch.long, device=like.device)
        self.num_own_R = torch.zeros(num_rows, dtype=torch.long, device=like.device)
        self.cell_of_row = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.row_of_cell = torch.zeros(prompts * per_place, dtype=torch.long, device=like.device)
        self.shape = (0, 0, 0, 0)  # rows, places, rows per place, blocks: see `arrange`
        self._loading_P: Tensor | None = None

    def load(self, places: Sequence[int], prompt_lengths: Sequence[int]) -> None:
        """Make the next pass fill these places: its rows are prompts, padded on the right."""
        device = self.place_R.device
        self._loading_P = torch.tensor(places, device=device)
        self.prompt_length_A[self._loading_P] = torch.tensor(prompt_lengths, device=device)

    def open(self, rows: Tensor, places: Tensor) -> None:
        """Begin rows, without tokens of their own yet, on the prompts of `places`."""
        self.place_R[rows], self.num_own_R[rows] = places, 0

    def arrange(
        self, place_of_row: Sequence[int | None], num_places: int, per_place: int, num_blocks: int
    ) -> None:
        """Set the shape of the next passes: the first rows, their places, the first blocks.

        All queries of a place meet its prompt in one product: cells [place, head, at most
        `per_place` rows] lay it out; a row without a place (an idle one) has none. The blocks must
        hold the own tokens of every row, the one that the pass adds included.
        """
        self.shape = (len(place_of_row), num_places, per_place, num_blocks)
        used, seat_R = [0] * num_places, []
        for place in place_of_row:
            seat_R.append(0 if place is None else used[place])
            if place is not None:
                used[place] += 1
        heads = torch.arange(self.num_kv_heads)
        place_R1 = torch.tensor([place or 0 for place in place_of_row])[:, None]
        cells = (place_R1 * self.num_kv_heads + heads) * per_place + torch.tensor(seat_R)[:, None]
        seated_R = torch.tensor([place is not None for place in place_of_row])
        rows = torch.arange(cells.numel()).view_as(cells)
        # An empty cell repeats row 0, and nobody reads the result.
        row_of_cell = torch.zeros(num_places * self.num_kv_heads * per_place, dtype=torch.long)
        row_of_cell[cells[seated_R]] = rows[seated_R]
        self.cell_of_row[: cells.numel()] = cells.flatten().to(self.cell_of_row.device)
        self.row_of_cell[: len(row_of_cell)] = row_of_cell.to(self.row_of_cell.device)

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        """Copy rows over others, whose tokens are lost."""
        for caches in (self.own_keys, self.own_values):
            for cache in caches:
                for block in cache[: self.shape[3]]:
                    _copy(block, self.num_kv_heads, source, target)
        for state_R in (self.place_R, self.num_own_R):
            state_R[target] = state_R[source]

    def move_prompts(self, source: Tensor, target: Tensor) -> None:
        """Copy prompts to other places; their rows follow."""
        for caches in (self.prompt_keys, self.prompt_values):
            for cache in caches:
                _copy(cache, self.num_kv_heads, source, target)
        self.prompt_length_A[target] = self.prompt_length_A[source]
        new_place_A = torch.arange(len(self.prompt_length_A), device=source.device)
        new_place_A[source] = target
        self.place_R.copy_(new_place_A[self.place_R])

    def positions(self, num_rows: int, num_tokens: int) -> Tensor:
        """Return the positions [B, T] of a pass's tokens; lay out what all its layers share."""
        device = self.place_R.device
        if self._loading_P is not None:
            return torch.arange(num_tokens, device=device).expand(num_rows, -1)
        place_R, num_own_R = self.place_R[:num_rows], self.num_own_R[:num_rows]
        length_R = self.prompt_length_A[place_R]
        _, rows, block, _ = self.own_keys[0].shape
        start_R = (num_own_R // block) * (rows * block) + num_own_R % block
        head_K = torch.arange(self.num_kv_heads, device=device)
        row_R1 = torch.arange(num_rows, device=device)[:, None]
        cell_RK = start_R[:, None] + (row_R1 * self.num_kv_heads + head_K) * block
        self._store_at = cell_RK.flatten()
        prompt_width = self.prompt_values[0].shape[1]
        column_W = torch.arange(prompt_width + self.shape[3] * block, device=device)
        own_W = column_W - prompt_width
        seen_RW = torch.where(own_W < 0, column_W < length_R[:, None], own_W <= num_own_R[:, None])
        bias_RW = torch.where(seen_RW, 0.0, float("-inf"))
        self._bias_R1W = bias_RW[:, None].to(self.own_keys[0].dtype)
        return (length_R + num_own_R)[:, None]

    def attend(
        self, layer: int, query_BTHE: Tensor, key_BTKE: Tensor, value_BTKE: Tensor
    ) -> Tensor:
        """Store keys and values of `layer` and return the attention [B, T, H, E]."""
        if self._loading_P is None:
            return self._decode(layer, query_BTHE, key_BTKE, value_BTKE)
        num_kv, width = key_BTKE.shape[2:]
        keys_AKET = self.prompt_keys[layer].view(-1, num_kv, width, self.prompt_keys[0].shape[2])
        keys_AKET[self._loading_P, :, :, : key_BTKE.shape[1]] = key_BTKE.permute(0, 2, 3, 1)
        values_AKTE = self.prompt_values[layer].view(-1, num_kv, *self.prompt_values[0].shape[1:])
        values_AKTE[self._loading_P, :, : key_BTKE.shape[1]] = value_BTKE.transpose(1, 2)
        if layer + 1 == len(self.prompt_keys):
            self._loading_P = None  # the last layer's prompts are in: from now on, one token a row
        # Right padding comes after every real token, so causal attention never sees it.
        return attend(query_BTHE, key_BTKE, value_BTKE, None)

    def _decode(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        num_rows, _, num_heads, width = query.shape
        _, num_places, per_place, num_blocks = self.shape
        num_kv, per_kv = self.num_kv_heads, num_heads // self.num_kv_heads
        rows, places = num_rows * num_kv, num_places * num_kv
        cell_of_row, row_of_cell = self.cell_of_row[:rows], self.row_of_cell[: places * per_place]
        for cache, new in ((self.own_keys, key), (self.own_values, value)):
            cache[layer].view(-1, width).index_copy_(0, self._store_at, new.reshape(rows, width))
        own_keys = [block[:rows] for block in self.own_keys[layer][:num_blocks]]
        own_values = [block[:rows] for block in self.own_values[layer][:num_blocks]]
        prompt_keys, prompt_values = self.prompt_keys[layer], self.prompt_values[layer]
        num_prompt, block = prompt_values.shape[1], own_keys[0].shape[1]
        query = (query * self.scale).view(rows, per_kv * width)

        # Scores against the shared prompt: one product for all queries of a group.
        grouped = query.index_select(0, row_of_cell).view(places, -1, width)
        shared = torch.bmm(grouped, prompt_keys[:places]).view(-1, per_kv * num_prompt)
        shared = shared.index_select(0, cell_of_row).view(rows, per_kv, num_prompt)
        # Scores against the row's own tokens; then one softmax over both.
        query = query.view(rows, per_kv, width)
        scores = torch.cat([shared, *(torch.bmm(query, keys.mT) for keys in own_keys)], -1)
        scores = scores.view(num_rows, num_heads, -1).add_(self._bias_R1W)
        weights = scores.softmax(-1).view(rows, per_kv, -1)
        shared, *own = weights.split([num_prompt] + [block] * num_blocks, -1)

        shared = shared.flatten(1).index_select(0, row_of_cell).view(places, -1, num_prompt)
        out = torch.bmm(shared, prompt_values[:places]).view(-1, per_kv * width)
        out = out.index_select(0, cell_of_row).view(rows, per_kv, width)
        for weight, values in zip(own, own_values):
            out.baddbmm_(weight, values)
        return out.view(num_rows, 1, num_heads, width)


def _copy(cache: Tensor, num_kv_heads: int, source: Tensor, target: Tensor) -> None:
    by_row = cache.unflatten(0, (-1, num_kv_heads))
    by_row[target] = by_row[source]
