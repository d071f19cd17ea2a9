"""Byte-level BPE: train, save, load, encode, decode.

    python -m nanomath.text.tokenizer --corpus corpus.jsonl --vocab_size 1024 --out runs/tokenizer

A text becomes ids in three steps: added plain tokens such as <think> are cut out, the rest (in NFC
where a model wants that) is split into pieces by a list of regexes, and `tiktoken` merges the bytes
of each piece. Files have the Hugging Face layout (tokenizer.json): the `tokenizers` package gives
the same ids, and the files of GPT-2, Llama 3, Qwen and DeepSeek load here with theirs.

Control tokens (bos, eos, pad, those of chats) are ids that no text can produce: a page that
contains "<|eos|>" is spelled out in bytes. Chat templates and packing are for others.
"""

import heapq
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import tiktoken

from nanomath.base.config import one_line_errors, opt, parse
from nanomath.base.files import read_jsonl, write_json
from nanomath.base.log import progress
from nanomath.text.chat import as_jinja
from nanomath.text.foreign import (
    BOS,
    EOS,
    PAD,
    TEMPLATE_KEY,
    compile_split,
    dump_layout,
    load_parts,
    read_json,
)

ADDED_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
CONTROL_TOKENS = (EOS, BOS, PAD)  # the only one that is sampled comes first: sample_limit

# Classes are written out as code points: \p{L} is another set in every Unicode version (17,144 code
# points apart between two packages of one install), and ids must never depend on that.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003fffd"
_LETTER = (
    "A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u167f\u1681-\u1fff"
    "\u2c00-\u2dff\ua640-\uabff\U0001d400-\U0001d7cb"
)
# The upper bounds cap every piece: a run of a million equal characters is a row of short pieces,
# in training, in `encode` and in any other program that reads tokenizer.json.
SPLITS = (
    # numbers in threes from the left, so that each to 999 can be a token; CJK has no spaces
    f"[0-9]{{1,3}}|[\uff10-\uff19]|[{_CJK}]{{1,16}}",
    # a word or a run of signs takes one space before it; line breaks; the spaces that are left
    rf" ?[{_LETTER}]{{1,32}}| ?[^\s{_LETTER}]{{1,16}}|[\r\n]{{1,16}}|[^\S\r\n]{{1,32}}(?!\S)|\s",
)
MAX_CACHED = 32  # characters of a piece whose ids are remembered: of 2**18, about 50 MB


class Tokenizer:
    """Encode text to ids and back.

    ranks maps each token's bytes to its id, lower merged first; splits are regexes applied one
    after the other, each isolating its matches; added are plain tokens found in text, control
    tokens are never produced from text. bos may be None; add_bos is whether texts begin with it.
    stop_ids end an output: eos first. Build one with `train` or `load`.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        splits: Sequence[str],
        *,
        added: Mapping[str, int],
        control: Mapping[str, int],
        bos: str | None = BOS,
        eos: str = EOS,
        pad: str = PAD,
        add_bos: bool = True,
        stop_ids: Sequence[int] = (),
        nfc: bool = False,
        template: str = "plain",
        program: str = "",
    ):
        self.ranks, self.splits = dict(ranks), tuple(splits)
        self.added, self.control, self.nfc = dict(added), dict(control), nfc
        self.names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        self.bos_id, self.add_bos = None if bos is None else control[bos], add_bos
        self.eos_id, self.pad_id = control[eos], control[pad]
        self.stop_ids = tuple(dict.fromkeys((self.eos_id, *stop_ids)))
        self.template = template  # chat.py's: its use_template adds to stop_ids, too
        self.program = program  # the chat template that came with the files: never run
        self._without_token = bytes(b for b in range(256) if bytes([b]) not in self.ranks)
        self._bytes = {token_id: token for token, token_id in self.ranks.items()}
        self._bytes |= {token_id: text.encode() for text, token_id in self.added.items()}
        self._bytes |= dict.fromkeys(self.control.values(), b"")
        self.vocab_size = max(self._bytes) + 1
        # Splitting ASCII takes half the time by patterns that need not know Unicode's versions.
        self._patterns = {
            is_ascii: [compile_split(split, is_ascii=is_ascii) for split in self.splits]
            for is_ascii in (True, False)
        }
        longest_first = sorted([*self.added, *self.control], key=len, reverse=True)
        self._whole = re.compile("|".join(map(re.escape, longest_first)))
        # One piece at a time goes in, so the engine's own pattern takes all of it; a pattern with
        # look-ahead there overflows its stack on a million spaces.
        self._engine = tiktoken.Encoding(
            "nanomath", pat_str="(?s).+", mergeable_ranks=self.ranks, special_tokens={}
        )
        self._merge_cached = lru_cache(1 << 18)(self._merge)

    @property
    def sample_limit(self) -> int:
        """The ids that may be sampled are those below: bos and pad, of which decoding shows
        nothing, are above, so an output's text is all that the model wrote.

        It is eos_id + 1 in a tokenizer trained here. In one made elsewhere only the control tokens
        (stop_ids apart) and unused ids at the end of the vocabulary are above; others stay below.
        """
        hidden = {*self.control.values()} - {*self.stop_ids}
        limit = self.vocab_size
        while limit - 1 in hidden or limit - 1 not in self._bytes:
            limit -= 1
        return limit

    @property
    def token_num_bytes(self) -> list[int]:
        """Bytes of text each id stands for (0 for control tokens): losses become bits per byte."""
        return [len(self._bytes.get(token_id, b"")) for token_id in range(self.vocab_size)]

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of text, between bos (where texts begin with one) and eos if asked.

        Lone surrogates, which no file can hold, become U+FFFD. Bytes without a token, which only
        tokenizers made elsewhere lack, are dropped.
        """
        ids = [self.bos_id] if bos and self.add_bos else []
        for part, token_id in self._parts(text):
            if token_id is not None:
                ids.append(token_id)
                continue
            for piece in self._split(part):
                short = len(piece) <= MAX_CACHED
                ids += self._merge_cached(piece) if short else self._merge(piece)
        if eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids: control tokens dropped, bytes that are not UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes of ids. Raises ValueError for an id outside the vocabulary."""
        try:
            return b"".join([self._bytes[token_id] for token_id in map(int, ids)])
        except KeyError as error:
            raise ValueError(f"token id {error} is not in this vocabulary") from None

    def _parts(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Cut text at tokens kept whole: those with their id, the rest, normalised, with None."""
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        start = 0
        for found in self._whole.finditer(text):
            if found[0] in self.added:  # else a control token's name: text like that around it
                yield self._normalise(text[start : found.start()]), None
                yield found[0], self.added[found[0]]
                start = found.end()
        yield self._normalise(text[start:]), None

    def _normalise(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def _merge(self, piece: str) -> list[int]:
        """Return a piece's ids. Those without a token are dropped before bytes are merged, after a
        piece is looked up whole, as in the tokenizers package."""
        whole = piece.encode()
        kept = whole if whole in self.ranks else whole.translate(None, self._without_token)
        if kept == whole:
            return self._engine.encode_ordinary(piece)
        return self._engine._encode_single_piece(kept) if kept else []

    def _split(self, text: str) -> list[str]:
        pieces = [text]
        for pattern in self._patterns[text.isascii()]:
            pieces = [piece for part in pieces for piece in pattern.split(part) if piece]
        return pieces

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        added_tokens: Sequence[str] = ADDED_TOKENS,
        show_progress: bool = False,
    ) -> "Tokenizer":
        """Learn byte-level BPE from texts.

        Ids: 256 bytes, merges in the order learned, added tokens, eos, bos, pad. vocab_size counts
        all of them; it comes out smaller where no pair of tokens is left that occurs twice.
        Raises ValueError when vocab_size has no room or the texts are empty.
        """
        names = [*added_tokens, *CONTROL_TOKENS]
        if not all(names) or len({*names}) < len(names):
            raise ValueError(
                f"of the added tokens {added_tokens} one is empty, repeated or a control token"
            )
        num_merges = vocab_size - 256 - len(names)
        if num_merges < 0:
            raise ValueError(
                f"vocab_size {vocab_size} is too small: 256 bytes, {len(added_tokens)} added and "
                f"{len(CONTROL_TOKENS)} control tokens need {vocab_size - num_merges}"
            )
        blank = cls._assemble([], added_tokens)
        piece_counts: Counter[str] = Counter()
        for text in texts:
            for part, token_id in blank._parts(text):
                if token_id is None:
                    piece_counts.update(blank._split(part))
        if not piece_counts:
            raise ValueError("there is no text to train a tokenizer on")
        counts = {piece.encode(): count for piece, count in piece_counts.items()}
        merges = learn_merges(counts, num_merges, show_progress=show_progress)
        return cls._assemble(merges, added_tokens)

    @classmethod
    def _assemble(cls, merges: Sequence[tuple[int, int]], added: Sequence[str]) -> "Tokenizer":
        tokens = [bytes([byte]) for byte in range(256)]
        for left, right in merges:
            tokens.append(tokens[left] + tokens[right])
        ranks = {token: token_id for token_id, token in enumerate(tokens)}
        names = [*added, *CONTROL_TOKENS]
        ids = {name: len(tokens) + index for index, name in enumerate(names)}
        return cls(
            ranks,
            SPLITS,
            added={name: ids[name] for name in added},
            control={name: ids[name] for name in CONTROL_TOKENS},
        )

    @cached_property
    def _layout(self) -> dict:
        return dump_layout(self)

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json (Hugging Face byte-level BPE), tokenizer_config.json and
        generation_config.json: bos, pad and all ids that end an output."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        names = {"add_bos_token": self.add_bos, **self.names, TEMPLATE_KEY: self.template}
        chat = {"chat_template": as_jinja(self)}
        write_json(folder / "tokenizer_config.json", {**kind, **names, **chat})
        ids = {"bos_token_id": self.bos_id, "pad_token_id": self.pad_id}
        write_json(folder / "generation_config.json", {"eos_token_id": list(self.stop_ids), **ids})
        # last: where it is, the folder is complete
        write_json(folder / "tokenizer.json", self._layout)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Read folder/tokenizer.json, with control tokens named by tokenizer_config.json and
        stop_ids by generation_config.json and config.json where they are.

        Raises FileNotFoundError, or ValueError naming what cannot be represented exactly.
        """
        if not (Path(folder) / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"{Path(folder) / 'tokenizer.json'} is missing; make one with: "
                f"python -m nanomath.text.tokenizer --out {folder}"
            )
        return cls(**load_parts(Path(folder)))


def learn_merges(
    piece_counts: Mapping[bytes, int], num_merges: int, *, show_progress: bool = False
) -> list[tuple[int, int]]:
    """Return up to num_merges pairs of ids, most frequent first, ties to the smallest ids.

    Merge number m makes id 256 + m. Stops when no pair occurs twice. Only the distinct pieces that
    hold the merged pair are touched, so a merge costs what it changes, not the corpus.
    """
    words = [list(piece) for piece in piece_counts]
    counts = list(piece_counts.values())
    pair_counts: dict[tuple[int, int], int] = defaultdict(int)
    words_with: dict[tuple[int, int], set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += counts[index]
            words_with[pair].add(index)
    queue = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(queue)
    merges: list[tuple[int, int]] = []
    bar = progress(total=num_merges, desc="tokenizer", unit="merge", disable=not show_progress)
    while len(merges) < num_merges and queue:
        queued, pair = heapq.heappop(queue)
        count = pair_counts[pair]
        if -queued != count:  # only pairs with the newest id gain; all others lose, and are put
            heapq.heappush(queue, (-count, pair))  # back under their true count when they surface
            continue
        if count < 2:
            break
        new_id = 256 + len(merges)
        merges.append(pair)
        born = set()
        for index in words_with.pop(pair):
            old = words[index]
            new = _merge(old, pair, new_id)
            for old_pair in zip(old, old[1:]):
                pair_counts[old_pair] -= counts[index]
            for new_pair in zip(new, new[1:]):
                pair_counts[new_pair] += counts[index]
                if new_id in new_pair:
                    words_with[new_pair].add(index)
                    born.add(new_pair)
            words[index] = new
        for new_pair in born:
            heapq.heappush(queue, (-pair_counts[new_pair], new_pair))
        bar.update()
    bar.close()
    return merges


def _merge(word: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    merged, position = [], 0
    while position < len(word):
        if tuple(word[position : position + 2]) == pair:
            merged.append(new_id)
            position += 2
        else:
            merged.append(word[position])
            position += 1
    return merged


@dataclass(frozen=True)
class Config:
    corpus: str = opt(
        "runs/speedrun-cpu/corpus/corpus.jsonl", "pages, one JSON object with `text` a line"
    )
    solutions: str = opt(
        "", "worked solutions to train on as well, `prompt` and `solution` a line; empty: none"
    )
    vocab_size: int = opt(1024, "bytes, merges, added and control tokens together", low=263)
    out: str = opt("runs/tokenizer", "folder to write tokenizer.json to")
    max_mb: float = opt(100.0, "megabytes of text to train on", low=0.001)


PRESETS = {"smoke": {"vocab_size": 512}, "cpu": {"vocab_size": 1280}, "gpu": {"vocab_size": 4096}}

HELD_OUT_EVERY = 20  # each 20th page is not trained on and measures bytes per token


def main(cfg: Config) -> None:
    """Train on cfg.corpus and print bytes per token on held-out pages; do nothing if done.

    Pages hold few numbers: with the solutions each number of the task becomes one token, so that a
    model need not spell what it calculates with.
    """
    out, corpus, solutions = Path(cfg.out), Path(cfg.corpus), Path(cfg.solutions)
    if not corpus.is_file():
        raise SystemExit(f"--corpus {corpus} is missing; make one with: python build_corpus.py")
    if cfg.solutions and not solutions.is_file():
        raise SystemExit(f"--solutions {solutions} is missing")
    settings = {
        "vocab_size": cfg.vocab_size,
        "max_mb": cfg.max_mb,
        "corpus_bytes": corpus.stat().st_size,
        "solutions_bytes": solutions.stat().st_size if cfg.solutions else 0,
    }
    record = out / "training.json"
    if (out / "tokenizer.json").exists():
        before = read_json(record) if record.exists() else {}
        if {name: before.get(name) for name in settings} != settings:
            raise SystemExit(
                f"{out} holds a tokenizer made otherwise: {before or 'elsewhere'}, now {settings}; "
                "remove it or give another --out"
            )
        print(f"{out}: done before, {before['bytes_per_token']} bytes per token; skipped")
        return
    trained, held_out, num_bytes = [], [], 0
    pages = read_jsonl(corpus, required=("text",))
    for number, (_, page) in enumerate(progress(pages, desc="read", unit="page")):
        (held_out if number % HELD_OUT_EVERY == 0 else trained).append(page["text"])
        num_bytes += len(page["text"].encode("utf-8", "replace"))
        if num_bytes >= cfg.max_mb * 1e6:
            break
    if not trained:
        raise SystemExit(f"{corpus}: one page is too little to train on and to measure")
    if cfg.solutions:
        rows = read_jsonl(solutions, required=("prompt", "solution"))
        trained += [row["prompt"] + row["solution"] for _, row in rows]
    tokenizer = Tokenizer.train(trained, cfg.vocab_size, show_progress=True)
    num_held_out = sum(len(text.encode("utf-8", "replace")) for text in held_out)
    num_tokens = sum(len(tokenizer.encode(text)) for text in held_out)
    ratio = round(num_held_out / max(num_tokens, 1), 3)
    out.mkdir(parents=True, exist_ok=True)
    measured = {"vocab_size_reached": tokenizer.vocab_size, "bytes_per_token": ratio}
    write_json(record, {**settings, **measured})
    tokenizer.save(out)
    print(
        f"{out}: {tokenizer.vocab_size} tokens from {num_bytes / 1e6:.1f} MB; {ratio} bytes per "
        f"token on {len(held_out)} held-out pages ({num_held_out / 1e6:.2f} MB)"
    )


if __name__ == "__main__":
    with one_line_errors():
        main(parse(Config, PRESETS, description=__doc__))
