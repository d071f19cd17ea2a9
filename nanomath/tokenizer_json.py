"""The file layout of byte-level BPE: tokenizer.json, as the `tokenizers` package writes it.

`dump_layout` and `parse_layout` turn the parts of a Tokenizer into JSON values and back. What would
give other ids here than there is refused by name, never approximated. Encoding is tokenizer.py's.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import regex

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"  # control tokens, where a file names no others
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Byte-level files spell a byte as one visible character: itself where it is one, else 256 + count.
_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_SPELLING = [chr(b) if b in _VISIBLE else chr(256 + _HIDDEN.index(b)) for b in range(256)]
_BYTE_OF = {char: byte for byte, char in enumerate(_SPELLING)}


def dump_layout(
    ranks: Mapping[bytes, int],
    splits: Sequence[str],
    added: Mapping[str, int],
    control: Mapping[str, int],
    *,
    nfc: bool = False,
) -> dict:
    """Return tokenizer.json as JSON values."""
    tokens = sorted(ranks, key=ranks.__getitem__)
    pairs = [last_merge(token, ranks) for token in tokens if len(token) > 1]
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        for split in splits
    ]
    marks = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": token_id, "content": text, **marks, "special": text in control}
        for text, token_id in {**added, **control}.items()
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {_spell(token): ranks[token] for token in tokens},
        "merges": [f"{_spell(left)} {_spell(right)}" for left, right in pairs],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*steps, {"type": "ByteLevel", **byte_level}],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": model,
    }


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """Return the two tokens whose merge makes `token`, or None if merging its bytes ends elsewhere.

    The pair is unique: wherever a text holds these bytes between two borders that no merge crosses,
    the merges inside are the ones made here.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, at = min(
            (ranks.get(left + right, len(ranks) << 32), index)
            for index, (left, right) in enumerate(zip(parts, parts[1:]))
        )
        if rank == len(ranks) << 32:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _spell(token: bytes) -> str:
    return "".join(_SPELLING[byte] for byte in token)


def _unspell(text: str) -> bytes:
    try:
        return bytes(_BYTE_OF[char] for char in text)
    except KeyError:
        raise ValueError(f"vocabulary entry {text!r} is not byte-level BPE") from None


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); the file is damaged or cut short") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def parse_layout(layout: dict, names: dict) -> dict:
    """Turn tokenizer.json into Tokenizer's arguments; raise ValueError for what would differ."""
    model = layout["model"]
    for key, allowed in {
        "type": ("BPE",),
        "dropout": (None, 0, 0.0),
        "continuing_subword_prefix": (None, ""),
        "end_of_word_suffix": (None, ""),
        "byte_fallback": (None, False),
    }.items():
        _expect(model.get(key), allowed, f"model.{key}")
    for key in ("truncation", "padding"):
        _expect(layout.get(key), (None,), key)
    normalizer = layout.get("normalizer")
    _expect(normalizer and normalizer["type"], (None, "NFC"), "normalizer")
    _expect((layout.get("decoder") or {}).get("type"), ("ByteLevel",), "decoder")

    added, control = {}, {}
    for token in layout["added_tokens"]:
        (control if token["special"] else added)[token["content"]] = token["id"]
        odd = token["single_word"] or token["lstrip"] or token["rstrip"]
        if not token["special"] and (odd or (normalizer and token["normalized"])):
            raise ValueError(f"added token {token['content']!r} is matched in a way unknown here")
    apart = {*added.values(), *control.values()}
    ranks = {_unspell(text): i for text, i in model["vocab"].items() if i not in apart}
    _check_merges(ranks, model["merges"])

    chosen = {"bos": BOS, "eos": EOS, "pad": PAD}
    for name in chosen:
        given = names.get(f"{name}_token")
        given = given["content"] if isinstance(given, dict) else given
        chosen[name] = given or (chosen[name] if chosen[name] in control else None)
    chosen["pad"] = chosen["pad"] or chosen["eos"]  # most published tokenizers have no padding
    for name, text in chosen.items():
        if text not in control:
            raise ValueError(f"no control token {text!r} for {name}; see tokenizer_config.json")
    splits = _parse_splits(layout["pre_tokenizer"])
    nfc = normalizer is not None
    return dict(ranks=ranks, splits=splits, added=added, control=control, nfc=nfc, **chosen)


def _expect(value, allowed: Sequence, what: str) -> None:
    if value not in allowed:
        raise ValueError(f"{what} {value!r} cannot be represented exactly (only {list(allowed)})")


def _parse_splits(node: dict) -> list[str]:
    """Return the regexes of a pre-tokenizer: isolated splits, then the bytes' spelling."""
    steps = node["pretokenizers"] if node["type"] == "Sequence" else [node]
    splits = []
    for step in steps[:-1]:
        _expect(step["type"], ("Split", "Digits"), "pre_tokenizer")
        if step["type"] == "Digits":
            splits.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
            continue
        _expect(step["behavior"], ("Isolated",), "pre_tokenizer behavior")
        _expect(step["invert"], (False,), "pre_tokenizer invert")
        pattern = step["pattern"]
        splits.append(pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"]))
    _expect(steps[-1]["type"], ("ByteLevel",), "last pre_tokenizer")
    _expect(steps[-1]["add_prefix_space"], (False,), "pre_tokenizer add_prefix_space")
    if steps[-1].get("use_regex", True):
        splits.append(_GPT2_SPLIT)
    for split in splits:
        if "&&" in split or regex.compile(split).groups or regex.match(split, ""):
            raise ValueError(f"pre_tokenizer pattern {split!r} cannot be represented exactly")
    return splits


def _check_merges(ranks: Mapping[bytes, int], merges: Sequence) -> None:
    """Refuse merges that tiktoken, which knows tokens but no pairs, would apply differently.

    The two agree when each token's last merge is listed, and listed in the order of the ids.
    """
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{len(missing)} of 256 bytes are not in the vocabulary: {missing[:16]}")
    listed = {}
    for order, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pair = (_unspell(left), _unspell(right))
        if pair[0] + pair[1] not in ranks:
            raise ValueError(f"the product of merge {merge!r} is not in the vocabulary")
        listed.setdefault(pair, order)
    before = -1
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) < 2:
            continue
        pair = last_merge(token, ranks)
        order = -1 if pair is None else listed.get(pair, -1)
        if order < before or order < 0:
            raise ValueError(
                f"token {_spell(token)!r} (id {ranks[token]}) is not made by a merge listed in the "
                "order of the ids"
            )
        before = order
