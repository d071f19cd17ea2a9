"""Token shards and packed examples: what the trainers read.

Every batch is a pure function of (seed, step) over the whole run: no reader has a state to save, a
resumed run asks for the next step, and ranks take their rows of the same global batch. Weights of
tokens are global too: they sum to 1 over the batch before anyone slices it.

Making text into ids is tokenizer.py's, building the corpus is corpus/'s, lines are files.py's.
Next: dist.py.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from nanomath.base.files import file_sha256, fsync
from nanomath.text.chat import answer_ids, prompt_ids

INDEX_NAME = "index.json"
NUM_OPEN_ROWS = 32  # rows a packed example may still go to: padding shrinks, order stays random


@dataclass(frozen=True)
class TrainBatch:
    """Rows to train on. weights_BT[:, t] weighs the prediction of tokens_BT[:, t + 1]; the last
    column is 0, and all rows of the global batch sum to 1."""

    tokens_BT: torch.Tensor
    weights_BT: torch.Tensor
    segments_BT: torch.Tensor | None = None
    positions_BT: torch.Tensor | None = None

    def rows(self, rows: slice | list[int]) -> "TrainBatch":
        """Return some rows, for a rank or a micro-batch; weights stay global."""
        return self._map(lambda part_BT: part_BT[rows])

    def to(self, device: torch.device) -> "TrainBatch":
        """Return the batch on a device."""
        return self._map(lambda part_BT: part_BT.to(device, non_blocking=True))

    def _map(self, change) -> "TrainBatch":
        parts = (self.tokens_BT, self.weights_BT, self.segments_BT, self.positions_BT)
        return TrainBatch(*(None if part is None else change(part) for part in parts))


def write_shards(
    folder: str | os.PathLike,
    token_docs: Iterable[Sequence[int]],
    *,
    vocab_size: int,
    token_num_bytes: Sequence[int] | None = None,
    shard_tokens: int = 1 << 27,
    source: dict | None = None,
) -> dict:
    """Write documents of ids as shard-00000.bin ... and index.json; return the index.

    Ids are uint16 where the vocabulary fits, else uint32. token_num_bytes (Tokenizer's) counts the
    text in bytes, for bits per byte. source (see `describe_source`) is kept in the index, with a
    sha256 of each shard. The folder appears under its name only when it is whole.
    Raises FileExistsError if it is there already, ValueError for no tokens or an id out of range.
    """
    folder = Path(folder)
    if (folder / INDEX_NAME).exists():
        raise FileExistsError(f"{folder} holds token shards already; remove it to write new ones")
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    bytes_of = None if token_num_bytes is None else np.asarray(token_num_bytes, np.int64)
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # what an interrupted run left
    temporary.mkdir(parents=True)
    shards: list[dict] = []
    num_bytes = 0
    try:
        for number, ids in enumerate(token_docs):
            array = np.asarray(ids, np.int64)
            if not array.size:
                continue
            if array.min() < 0 or array.max() >= vocab_size:
                raise ValueError(
                    f"document {number} has token id {array.min()} or {array.max()}, "
                    f"outside the vocabulary of {vocab_size}"
                )
            if not shards or shards[-1]["num_tokens"] >= shard_tokens:
                shards.append({"name": f"shard-{len(shards):05d}.bin", "num_tokens": 0})
            with open(temporary / shards[-1]["name"], "ab") as file:
                file.write(array.astype(dtype).tobytes())
            shards[-1]["num_tokens"] += array.size
            num_bytes += 0 if bytes_of is None else int(bytes_of[array].sum())
        if not shards:
            raise ValueError(f"{folder}: there are no tokens to write")
        for shard in shards:
            shard["sha256"] = file_sha256(temporary / shard["name"])
        index = {
            "version": 2,
            "source": source,
            "dtype": f"uint{8 * dtype.itemsize}",
            "vocab_size": vocab_size,
            "num_tokens": sum(shard["num_tokens"] for shard in shards),
            "num_bytes": None if bytes_of is None else num_bytes,
            "shards": shards,
        }
        (temporary / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")
        for path in temporary.iterdir():
            fsync(path)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return index


def describe_source(
    path: str | os.PathLike, tokenizer_path: str | os.PathLike, known: dict | None = None
) -> dict:
    """Return what tells a text file and tokenizer.json from others: hashes, size and time.

    known: an earlier description; a file of its size and time is not read again, but believed to
    be the same. Compare `sha256` and `tokenizer_sha256`.
    """
    stat = os.stat(path)
    stamp = {"num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if known is None or any(known[key] != value for key, value in stamp.items()):
        known = {"sha256": file_sha256(path)}
    tokenizer_sha256 = file_sha256(tokenizer_path)
    return {**stamp, "sha256": known["sha256"], "tokenizer_sha256": tokenizer_sha256}


class TokenShards:
    """Memory-mapped shards as one long row of tokens.

    Window w of a context is tokens[w * context : (w + 1) * context + 1]: neighbours share one
    token, so every token but the first is predicted once per epoch (a last part window is left out
    by `batch`, kept by `sequential`). num_bytes is the text's size, or None if never counted.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = folder = Path(folder)
        self._index = index = _read_index(folder)
        dtype = np.dtype("<u2" if index["dtype"] == "uint16" else "<u4")
        self.vocab_size, self.num_bytes = index["vocab_size"], index["num_bytes"]
        self.num_tokens, self.source = index["num_tokens"], index["source"]
        self._shards = []
        for shard in index["shards"]:
            path = folder / shard["name"]
            size = path.stat().st_size if path.is_file() else -1
            if path.parent != folder or size != shard["num_tokens"] * dtype.itemsize:
                raise ValueError(
                    f"{path}: missing or not the {shard['num_tokens']} tokens that {INDEX_NAME} "
                    f"names; remove {folder} and tokenize again"
                )
            # Mapped, not read: a batch costs the pages it touches, however large the corpus is.
            self._shards.append(np.memmap(path, dtype, mode="r"))
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards])

    def verify(self, part: slice = slice(None)) -> None:
        """Read (this rank's part of) the shards and raise ValueError naming a damaged one."""
        for shard in self._index["shards"][part]:
            if file_sha256(self._folder / shard["name"]) != shard["sha256"]:
                raise ValueError(
                    f"{self._folder / shard['name']}: damaged, its sha256 is not the one in "
                    f"{INDEX_NAME}; remove {self._folder} and tokenize again"
                )

    def read(self, start: int, length: int) -> np.ndarray:
        """Return int64 tokens[start : start + length], across shards, cut at the end."""
        end = min(start + length, self.num_tokens)
        parts = []
        while start < end:
            number = int(np.searchsorted(self._starts, start, side="right")) - 1
            offset = start - int(self._starts[number])
            parts.append(self._shards[number][offset : offset + end - start])
            start += len(parts[-1])
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def num_windows(self, context: int) -> int:
        """Return how many full windows an epoch has. Raises ValueError if there is none."""
        # Windows overlap by one token, the last target of one being the first input of the next; so
        # no token is lost as a target, and one token more than the windows cover is needed.
        count = (self.num_tokens - 1) // context
        if count < 1:
            raise ValueError(
                f"{self.num_tokens} tokens hold no window of {context} + 1: "
                "lower --context or give more text"
            )
        return count

    def batch(self, step: int, batch_size: int, context: int, seed: int) -> torch.Tensor:
        """Return int64 [B, context + 1]: the global batch of this step.

        Every window comes once per epoch, in an order drawn anew for each epoch.
        """
        order = epoch_order(self.num_windows(context), step, batch_size, seed)
        windows = [self.read(int(window) * context, context + 1) for window in order]
        return torch.from_numpy(np.stack(windows))

    def train_batch(self, step: int, batch_size: int, context: int, seed: int) -> TrainBatch:
        """Return `batch` with equal weights: the loss is the mean over the global tokens."""
        tokens_BT = self.batch(step, batch_size, context, seed)
        weights_BT = torch.full(tokens_BT.shape, 1.0 / (batch_size * context))
        weights_BT[:, -1] = 0.0  # it is a target only: what follows it is not in the row
        return TrainBatch(tokens_BT, weights_BT)

    def sequential(self, context: int, batch_size: int = 1) -> Iterator[torch.Tensor]:
        """Yield int64 [rows, up to context + 1] in order; every token but the first is a target
        once. With total_nats over all of them: bits per byte = total_nats / ln 2 / num_bytes."""
        num_full = (self.num_tokens - 1) // context
        for first in range(0, num_full, batch_size):
            count = min(batch_size, num_full - first)
            windows = [self.read((first + i) * context, context + 1) for i in range(count)]
            yield torch.from_numpy(np.stack(windows))
        rest = self.read(num_full * context, context)
        if len(rest) > 1:
            yield torch.from_numpy(rest[None])


def _read_index(folder: Path) -> dict:
    path = folder / INDEX_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} holds no token shards")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        total = sum(shard["num_tokens"] for shard in index["shards"])
        whole = index["num_tokens"] == total and index["dtype"] in ("uint16", "uint32")
        whole = whole and index.keys() >= {"vocab_size", "num_bytes", "source"}
        whole = whole and all(isinstance(shard["sha256"], str) for shard in index["shards"])
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: damaged; remove {folder} and tokenize again")
    return index


def epoch_order(num_items: int, step: int, batch_size: int, seed: int) -> np.ndarray:
    """Return the items of this step's batch: each of num_items once per epoch, reshuffled each."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    # Places count through the whole run, so a batch may begin in one epoch and end in the next.
    epochs, places = places // num_items, places % num_items
    items = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        items[chosen] = _permutation(num_items, seed, int(epoch))[places[chosen]]
    return items


@lru_cache(maxsize=4)
def _permutation(num_items: int, seed: int, epoch: int) -> np.ndarray:
    # Seed and epoch alone decide it; a resumed run has no generator to restore.
    return np.random.default_rng([seed, epoch]).permutation(num_items)


class PackedExamples:
    """Examples, as (prompt ids, solution ids ending in EOS), concatenated in random order into rows
    of `context` tokens (Sec. 3).

    R are the packed rows here: tokens_RT, segments_RT (0 is padding, examples count from 1 in each
    row), positions_RT (restart at 0 in each example) and trained_RT (bool: position t predicts a
    solution token, the EOS included, of its own example). dropped lists (index, length) of examples
    longer than context or without a solution.
    """

    def __init__(
        self,
        examples: Sequence[tuple[Sequence[int], Sequence[int]]],
        context: int,
        *,
        seed: int = 0,
        pad_id: int = 0,
    ):
        self.context, self.num_examples = context, len(examples)
        lengths = [len(prompt) + len(solution) for prompt, solution in examples]
        # A solution's first token needs one before it; without a prompt it is not a target.
        num_targets = [min(len(s), length - 1) for (_, s), length in zip(examples, lengths)]
        usable = [length <= context and n > 0 for length, n in zip(lengths, num_targets)]
        self.dropped = [(i, lengths[i]) for i, use in enumerate(usable) if not use]
        if len(self.dropped) == len(examples):
            raise ValueError(
                f"none of {len(examples)} examples fits a context of {context} tokens; "
                "raise --context or give other examples"
            )
        order = np.random.default_rng(seed).permutation(len(examples))
        self.members = _fill_rows([int(i) for i in order if usable[i]], lengths, context)

        shape = (len(self.members), context)
        self.tokens_RT = np.full(shape, pad_id, np.int32)
        self.segments_RT = np.zeros(shape, np.int32)
        self.positions_RT = np.zeros(shape, np.int32)
        self.trained_RT = np.zeros(shape, bool)
        for row, members in enumerate(self.members):
            start = 0
            for segment, index in enumerate(members, start=1):
                prompt, solution = examples[index]
                end = start + lengths[index]
                self.tokens_RT[row, start:end] = [*prompt, *solution]
                self.segments_RT[row, start:end] = segment
                self.positions_RT[row, start:end] = np.arange(lengths[index])
                # t predicts t + 1: from the prompt's last token to the last but one of the example,
                # whose last token would predict the next example's first.
                self.trained_RT[row, end - 1 - num_targets[index] : end - 1] = True
                start = end

    @property
    def num_rows(self) -> int:
        return len(self.members)

    def summary(self) -> str:
        """Say in one line what was packed, how full the rows are and what was left out."""
        fill = (self.segments_RT > 0).mean()
        text = (
            f"{self.num_examples - len(self.dropped)} examples in {self.num_rows} rows of "
            f"{self.context} tokens, {fill:.1%} full"
        )
        if self.dropped:
            named = ", ".join(f"{i} ({length} tokens)" for i, length in self.dropped[:5])
            more = ", ..." if len(self.dropped) > 5 else ""
            text += f"; {len(self.dropped)} dropped, too long or nothing to train: {named}{more}"
        return text

    def batch(self, step: int, batch_size: int, seed: int) -> TrainBatch:
        """Return the global batch of this step: every row comes once per epoch.

        A trained token weighs 1 / (trained tokens of the global batch).
        """
        order = epoch_order(self.num_rows, step, batch_size, seed)
        total = int(self.trained_RT[order].sum())
        weights_BT = torch.from_numpy(self.trained_RT[order]).float() / total
        int64 = lambda array_RT: torch.from_numpy(array_RT[order].astype(np.int64))
        return TrainBatch(
            int64(self.tokens_RT), weights_BT, int64(self.segments_RT), int64(self.positions_RT)
        )


def _fill_rows(order: Sequence[int], lengths: Sequence[int], context: int) -> list[list[int]]:
    """Put each example, in this order, into the first open row with room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    open_rows: list[int] = []
    for index in order:
        row = next((row for row in open_rows if room[row] >= lengths[index]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(context)
            open_rows.append(row)
            if len(open_rows) > NUM_OPEN_ROWS:
                open_rows.remove(min(open_rows[:-1], key=room.__getitem__))  # close the fullest
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def encode_examples(
    tokenizer, examples: Iterable[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Return (prompt ids, solution ids with the end of the turn), as the tokenizer's template says.

    The two are encoded apart, as in sampling.
    """
    return [
        (prompt_ids(tokenizer, prompt), answer_ids(tokenizer, solution))
        for prompt, solution in examples
    ]
