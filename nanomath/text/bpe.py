"""Byte-level BPE of our own: learn merges, encode with `tiktoken`, write and recognise the file.

A text becomes ids in three steps: added plain tokens such as <think> are cut out, the rest is
split into pieces by two regexes, and the bytes of each piece are merged. The file has the layout
of Hugging Face (tokenizer.json), and the `tokenizers` package gives the same ids from it. A file
that is not exactly what `layout` writes was made by others: foreign.py.
"""

import heapq
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import regex
import tiktoken

from nanomath.base.log import progress

ADDED_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CONTROL_TOKENS = (EOS, BOS, PAD)  # the only one that is sampled comes first: sample_limit
# A control token's name is found, too, and left as text: no added token may begin inside it.
_WHOLE = re.compile("|".join(map(re.escape, (*ADDED_TOKENS, *CONTROL_TOKENS))))

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
_PATTERNS = [regex.compile(f"({split})", regex.V1) for split in SPLITS]

# Byte-level files spell a byte as one visible character: itself where it is one, else 256 + count.
_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
SPELLING = [chr(b) if b in _VISIBLE else chr(256 + _HIDDEN.index(b)) for b in range(256)]
BYTES = [bytes([byte]) for byte in range(256)]
BYTE_OF = {char: byte for byte, char in enumerate(SPELLING)}

_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        *(
            {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
            for split in SPLITS
        ),
        _BYTE_LEVEL,
    ],
}


class BytePairs:
    """Encode text by merges learned here. Ids: bytes, merges, added tokens, eos, bos, pad.

    tokens are the bytes of each id, lower merged first: single bytes, then what each merge made.
    token_bytes holds those of added tokens, too; first is the token that texts begin with.
    """

    first = BOS

    def __init__(self, tokens: Sequence[bytes]):
        self.ranks = {token: token_id for token_id, token in enumerate(tokens)}
        whole = {name: len(tokens) + i for i, name in enumerate((*ADDED_TOKENS, *CONTROL_TOKENS))}
        self.added = {name: whole[name] for name in ADDED_TOKENS}
        self.control = {name: whole[name] for name in CONTROL_TOKENS}
        self.token_bytes = dict(enumerate([*tokens, *(name.encode() for name in ADDED_TOKENS)]))
        # One piece at a time goes in, so the engine's own pattern takes all of it; a pattern with
        # look-ahead there overflows its stack on a million spaces.
        engine = tiktoken.Encoding(
            "nanomath", pat_str="(?s).+", mergeable_ranks=self.ranks, special_tokens={}
        )
        self._merge = lru_cache(1 << 18)(engine.encode_ordinary)  # pieces are short: about 50 MB

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in cut_text(text):
            if part in self.added:
                ids.append(self.added[part])
                continue
            for piece in split_text(part):
                ids += self._merge(piece)
        return ids

    @classmethod
    def train(cls, texts: Iterable[str], num_merges: int, *, show_progress: bool) -> "BytePairs":
        """Learn up to num_merges merges. Raises ValueError if there is no text."""
        counts: Counter[str] = Counter()
        for text in texts:
            for part in cut_text(text):
                if part not in ADDED_TOKENS:
                    counts.update(split_text(part))
        if not counts:
            raise ValueError("there is no text to train a tokenizer on")
        pieces = {piece.encode(): count for piece, count in counts.items()}
        tokens = [*BYTES]
        for left, right in learn_merges(pieces, num_merges, show_progress=show_progress):
            tokens.append(tokens[left] + tokens[right])
        return cls(tokens)

    def layout(self) -> dict:
        """Return tokenizer.json as JSON values."""
        pairs = [last_merge(token, self.ranks) for token in self.ranks if len(token) > 1]
        marks = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        whole = {**self.added, **self.control}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": token_id, "content": name, **marks, "special": name in self.control}
                for name, token_id in whole.items()
            ],
            "normalizer": None,
            "pre_tokenizer": _PRE_TOKENIZER,
            "post_processor": begins_with(BOS, self.control[BOS]),
            "decoder": _BYTE_LEVEL,
            "model": {
                "type": "BPE",
                "ignore_merges": False,
                "vocab": {_spell(token): rank for token, rank in self.ranks.items()},
                "merges": [f"{_spell(left)} {_spell(right)}" for left, right in pairs],
            },
        }

    @classmethod
    def read(cls, layout: dict) -> "BytePairs | None":
        """Return what writes exactly this layout, or None if nothing does: others made the file.

        Exactly: tiktoken knows tokens but no pairs, and gives the ids that the file's list of
        merges means only if each token is made by its last merge, in the order of the ids.
        """
        if layout.get("pre_tokenizer") != _PRE_TOKENIZER:
            return None
        try:
            tokens = [bytes(BYTE_OF[char] for char in text) for text in layout["model"]["vocab"]]
            if tokens[:256] != BYTES:
                return None
            ours = cls(tokens)
            return ours if json.dumps(ours.layout()) == json.dumps(layout) else None
        except (KeyError, TypeError, ValueError):
            return None


def begins_with(bos: str, bos_id: int) -> dict:
    """Return the post-processor that puts bos before a text, and before each of a pair."""
    text, other = (
        [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": name, "type_id": 0}}]
        for name in "AB"
    )
    special = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    kind = "TemplateProcessing"
    return {"type": kind, "single": text, "pair": text + other, "special_tokens": special}


def without_surrogates(text: str) -> str:
    """Return text with each pair of surrogates as its character, and with U+FFFD for lone ones,
    which no file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut_text(text: str) -> Iterator[str]:
    """Cut text at added tokens, which are parts of their own."""
    start = 0
    for found in _WHOLE.finditer(text):
        if found[0] in ADDED_TOKENS:
            yield text[start : found.start()]
            yield found[0]
            start = found.end()
    yield text[start:]


def split_text(text: str) -> list[str]:
    """Split text into the pieces that no merge crosses."""
    pieces = [text]
    for pattern in _PATTERNS:
        pieces = [piece for part in pieces for piece in pattern.split(part) if piece]
    return pieces


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens whose merge makes `token`. Raises ValueError if merging its bytes ends
    elsewhere.

    The pair is unique: wherever a text holds these bytes between two borders that no merge crosses,
    the merges inside are the ones made here.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, at = min(
            (ranks.get(left + right, len(ranks)), index)
            for index, (left, right) in enumerate(zip(parts, parts[1:]))
        )
        if rank == len(ranks):
            raise ValueError(f"no merges make the token {token!r}")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _spell(token: bytes) -> str:
    return "".join(SPELLING[byte] for byte in token)


def learn_merges(
    piece_counts: Mapping[bytes, int], num_merges: int, *, show_progress: bool = False
) -> list[tuple[int, int]]:
    """Return up to num_merges pairs of ids, most frequent first, ties to the smallest ids.

    Merge number m makes id 256 + m. Stops when no pair occurs twice. Only the distinct pieces that
    hold the merged pair are touched, so a merge costs what it changes, not the corpus.
    """
    words = [piece.decode("latin-1") for piece in piece_counts]  # an id is a character: chr(id)
    counts = list(piece_counts.values())
    pair_counts: dict[str, int] = defaultdict(int)
    words_with: dict[str, set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in _pairs(word):
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
        new_id = chr(256 + len(merges))
        merges.append((ord(pair[0]), ord(pair[1])))
        born = set()
        for index in words_with.pop(pair):
            old = words[index]
            words[index] = new = old.replace(pair, new_id)
            for old_pair in _pairs(old):
                pair_counts[old_pair] -= counts[index]
            for new_pair in _pairs(new):
                pair_counts[new_pair] += counts[index]
                if new_id in new_pair:
                    words_with[new_pair].add(index)
                    born.add(new_pair)
        for new_pair in born:
            heapq.heappush(queue, (-pair_counts[new_pair], new_pair))
        bar.update()
    bar.close()
    return merges


def _pairs(word: str) -> Iterator[str]:
    return map(str.__add__, word, word[1:])
