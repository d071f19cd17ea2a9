"""The file layout of byte-level BPE: tokenizer.json, as the `tokenizers` package writes it.

`dump_layout` turns the parts of a Tokenizer into JSON values, `load_parts` reads them. What would
give other ids here than there is refused by name, never approximated. Encoding is tokenizer.py's.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import regex

from nanomath.base.files import read_json
from nanomath.text.chat import TEMPLATES

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"  # control tokens, where a file names no others
TEMPLATE_KEY = "nanomath_chat_template"  # in tokenizer_config.json: what the model was trained with

# What Unicode 17 and 18 assigned: letters, digits and signs to the `regex` package, nothing yet to
# the engine of `tokenizers`, which knows Unicode 16. A test compares all code points.
_LATER = (
    "558 58b-58c 5c8-5c9 88f b53-b54 c5c cdc 1acf-1af0 208f 209d-209f 20c1-20c4 2b96 "
    "2e60-2e63 a7ce-a7cf a7d2 a7d4 a7dd-a7f1 ab6c-ab6d fbc3-fbd2 fd90-fd91 fdc8-fdce "
    "107bb-107bf 10940-10959 10ec5-10efb 11b0a-11b67 11db0-11df1 1246f 12475-1247f "
    "12550-12686 16ea0-16ed3 16ff2-16ff6 187f8-187ff 18cd6-18cda 18d09-191d2 1b123-1b128 "
    "1b168 1ccfa-1ccfc 1ceba-1cefd 1d127-1d128 1d1eb-1d1ff 1d250-1d281 1d6a6 1db00-1db1c "
    "1df1f-1df24 1df2b-1dfff 1e6c0-1e6ff 1f1ae 1f6d8-1f6d9 1f777-1f77a 1f7da-1f7db "
    "1f7f1-1f7ff 1f8d0-1f8d8 1fa54-1fa57 1fa8a-1fa8e 1fac8-1facd 1fadd 1faea-1faef "
    "1faf9-1fafa 1fbfa 2b73a-2b73f 2b81e 2cea2-2cead 323b0-3fc3f"
)
_LATER = "".join("-".join(chr(int(end, 16)) for end in r.split("-")) for r in _LATER.split())
_DIGIT = "[\\p{N}\U00011de0-\U00011de9\U00016ff4-\U00016ff6]"  # its Digits step knows Unicode 17
# What the two engines may read in two ways: other escapes and classes than these, flags, operators.
_ODD = regex.compile(
    r"\\(?!p\{(?!L[lo&C]\})[LMNPSZ][a-z]?\}|[rntsSd]|u[0-9A-Fa-f]{4}|[^\w\s])|\\\\[pd]|\(\?(?!i?:|<?[=!])"
    r"|\(\?i:(?![a-z'|]+\))|&&|--|\|\||~~|\[:|\{[\d,]+\}\+"
)
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Byte-level files spell a byte as one visible character: itself where it is one, else 256 + count.
_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_SPELLING = [chr(b) if b in _VISIBLE else chr(256 + _HIDDEN.index(b)) for b in range(256)]
_BYTE_OF = {char: byte for byte, char in enumerate(_SPELLING)}
_IN_TEXT = [b for b in range(256) if b not in (0xC0, 0xC1) and b < 0xF5]  # the others: no UTF-8


def compile_split(split: str, *, is_ascii: bool = False) -> regex.Pattern:
    """Compile a split to match what Oniguruma, the engine of `tokenizers`, matches with it.

    is_ascii: for text in ASCII only. Raises ValueError for what the engines may read in two ways.
    """
    odd = _ODD.search(split)
    if odd or regex.compile(split).groups or regex.match(split, ""):
        what = f": {odd[0]!r}" if odd else ""
        raise ValueError(f"pre_tokenizer pattern {split!r} cannot be represented exactly{what}")
    if not is_ascii:
        split = regex.sub(r"\\p\{\w+\}|\\d", lambda found: f"[{found[0]}--[{_LATER}]]", split)
    if split == r"\s+$":  # the same matches, in linear time on a long run of spaces
        split = r"(?<!\s)\s+$"
    return regex.compile(f"({split})", regex.V1 | regex.MULTILINE)


def dump_layout(tokenizer: Any) -> dict:
    """Return a Tokenizer's tokenizer.json as JSON values."""
    ranks, control = tokenizer.ranks, tokenizer.control
    tokens = sorted(ranks, key=ranks.__getitem__)
    pairs = [last_merge(token, ranks) for token in tokens if len(token) > 1]
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        for split in tokenizer.splits
    ]
    whole = dict(sorted({**tokenizer.added, **control}.items(), key=lambda item: item[1]))
    marks = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    vocab = {_spell(token): ranks[token] for token in tokens}
    if list(whole.values()) != list(range(len(vocab), len(vocab) + len(whole))):
        vocab.update(whole)  # the tokenizers package numbers those outside from len(vocab) on
    model = {
        "type": "BPE",
        "ignore_merges": None in pairs,  # a piece that is a token is that token, merged or not
        "vocab": vocab,
        "merges": [f"{_spell(pair[0])} {_spell(pair[1])}" for pair in pairs if pair],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": text, **marks, "special": text in control}
            for text, token_id in whole.items()
        ],
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*steps, {"type": "ByteLevel", **byte_level}],
        },
        "post_processor": _starts_with(tokenizer) if tokenizer.add_bos else None,
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": model,
    }


def _starts_with(tokenizer: Any) -> dict:
    """The post-processor that puts bos before a text, and before each of a pair."""
    bos = tokenizer.names["bos_token"]
    text, other = (
        [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": name, "type_id": 0}}]
        for name in "AB"
    )
    special = {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}}
    kind = "TemplateProcessing"
    return {"type": kind, "single": text, "pair": text + other, "special_tokens": special}


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """Return the two tokens whose merge makes `token`, or None if merging its bytes ends elsewhere,
    as where one of them has no token.

    The pair is unique: wherever a text holds these bytes between two borders that no merge crosses,
    the merges inside are the ones made here.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    if not ranks.keys() >= {*parts}:
        return None
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


def load_parts(folder: Path) -> dict:
    """Read a folder's tokenizer.json, tokenizer_config.json, generation_config.json and config.json
    (the last three may be missing) and return Tokenizer's arguments.

    An output ends with whatever any of them calls eos. Raises ValueError, naming the file, for what
    is damaged or would give other ids here.
    """
    path, named = folder / "tokenizer.json", folder / "tokenizer_config.json"
    layout, config = read_json(path), read_json(named) if named.is_file() else {}
    others = [folder / "generation_config.json", folder / "config.json"]
    ends = {p: read_json(p).get("eos_token_id") for p in others if p.is_file()}
    read, stop_ids = path, []
    try:
        parts, first = _parse_layout(layout)
        for read, ids in ends.items():  # noqa: B007 (the file that an error names)
            stop_ids += _parse_stop_ids(ids, parts)
        read = named
        names = _parse_names(config, first, parts, stop_ids)
        own = {"template": config.get(TEMPLATE_KEY, "plain"), "program": _program(folder, config)}
        if own["template"] not in tuple(TEMPLATES):
            known = ", ".join(TEMPLATES)
            raise ValueError(f"chat template {own['template']!r}; known are {known}")
        return {**parts, **names, **own, "stop_ids": stop_ids}
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{read}: not a complete {read.name} ({error!r})") from None
    except (ValueError, OverflowError, regex.error) as error:
        raise ValueError(f"{read}: {error}") from None


def _program(folder: Path, config: dict) -> str:
    """Return the chat template that a model from elsewhere brings, a Jinja program, as text."""
    path = folder / "chat_template.jinja"
    if config.get(TEMPLATE_KEY) == "plain":  # of this project: how it was trained is known
        return ""
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    return str(config.get("chat_template") or "")


def _parse_layout(layout: dict) -> tuple[dict, str | None]:
    """Return ranks, splits, added, control and nfc, and the token put before a text."""
    model = layout["model"]
    for key, allowed in {
        "type": ("BPE",),
        "dropout": (None, 0),
        "continuing_subword_prefix": (None, ""),
        "end_of_word_suffix": (None, ""),
        "byte_fallback": (None, False),
        "ignore_merges": (None, False, True),
    }.items():
        _expect(model.get(key), allowed, f"model.{key}")
    for key in ("truncation", "padding"):
        _expect(layout.get(key), (None,), key)
    normalizer = layout.get("normalizer") or {"normalizers": []}
    steps = normalizer.get("normalizers", [normalizer])
    for step in steps:
        _expect(step["type"], ("NFC",), "normalizer")
    nfc = bool(steps)
    _expect((layout.get("decoder") or {}).get("type"), ("ByteLevel",), "decoder")
    added, control = _parse_added(layout["added_tokens"], model["vocab"], nfc=nfc)
    whole = {**added, **control}
    ranks = {_unspell(text): i for text, i in model["vocab"].items() if text not in whole}
    if len({*ranks.values(), *whole.values()}) < len(ranks) + len(whole):
        raise ValueError("two tokens have one id")
    if model.get("ignore_merges") and len(ranks) < len(model["vocab"]):
        raise ValueError("with model.ignore_merges, added tokens in model.vocab would match twice")
    _check_merges(ranks, model)
    splits = _parse_splits(layout["pre_tokenizer"])
    processor = layout.get("post_processor") or {}
    templates = [
        step["single"]
        for step in processor.get("processors", [processor])
        if step.get("type") == "TemplateProcessing"
    ]
    first = templates[0][0].get("SpecialToken", {}).get("id") if templates else None
    parts = {"ranks": ranks, "splits": splits, "added": added, "control": control, "nfc": nfc}
    return parts, first


def _parse_added(tokens: list, vocab: Mapping[str, int], *, nfc: bool) -> tuple[dict, dict]:
    """Return the ids of added plain tokens and of control tokens."""
    ids: dict[str, int] = {}
    for token_id in vocab.values():
        if type(token_id) is not int or not 0 <= token_id < 1 << 24:
            raise ValueError(f"model.vocab holds the id {token_id!r}")
    for token in tokens:
        text, token_id = token["content"], token["id"]
        odd = token["single_word"] or token["lstrip"] or token["rstrip"]
        if odd or not text or (nfc and token["normalized"]):
            raise ValueError(f"added token {text!r} is matched in a way unknown here")
        text.encode()
        follows = max(len(vocab), max(ids.values(), default=-1) + 1)
        expected = vocab.get(text, ids.get(text, follows))
        if type(token_id) is not int or token_id != expected:
            raise ValueError(
                f"added token {text!r} has the id {token_id!r}, but the tokenizers package would "
                f"give it {expected}"
            )
        ids[text] = token_id
    # The tokenizers package looks for tokens marked `normalized` in a second pass over the text.
    passes = [
        [t["content"] for t in tokens if bool(t["normalized"]) is mark] for mark in (False, True)
    ]
    for first, second in itertools.product(*passes):
        if _overlap(first, second) or _overlap(second, first):
            raise ValueError(f"added tokens {first!r} and {second!r} overlap in two passes")
    control = {token["content"]: token["id"] for token in tokens if token["special"]}
    return {text: i for text, i in ids.items() if text not in control}, control


def _overlap(first: str, second: str) -> bool:
    """Whether text can hold second beginning inside first."""
    ends = (first[i:] for i in range(len(first)))
    return any(end.startswith(second) or second.startswith(end) for end in ends)


def _parse_stop_ids(value: int | list | None, parts: dict) -> list[int]:
    stop_ids = value if isinstance(value, list) else [] if value is None else [value]
    known = {i for kind in ("ranks", "added", "control") for i in parts[kind].values()}
    for token_id in stop_ids:
        if type(token_id) is not int or token_id not in known:
            raise ValueError(f"eos_token_id {token_id!r} is not an id of tokenizer.json")
    return stop_ids


def _parse_names(config: dict, first: str | None, parts: dict, stop_ids: Sequence[int]) -> dict:
    """Return the texts of bos (None if there is none), eos and pad, and whether texts begin so."""
    added, control = parts["added"], parts["control"]
    names: dict[str, str | None] = {}
    for kind, default in (("bos", BOS), ("eos", EOS), ("pad", PAD)):
        given = config.get(f"{kind}_token")
        text = given.get("content") if isinstance(given, dict) else given
        if not isinstance(text, str | None):
            raise ValueError(f"{kind}_token {given!r} is not a text")
        if text is None and default in control:
            text = default
        if text is None and kind == "eos":
            text = next((text for text, i in control.items() if i in stop_ids[:1]), None)
        if text in added:  # a token with such a name is a control token, whatever its mark says
            control[text] = added.pop(text)
        if (text or kind == "eos") and text not in control:
            raise ValueError(f"no control token {text!r} for {kind}_token in tokenizer.json")
        names[kind] = text or None
    names["pad"] = names["pad"] or names["eos"]  # most published tokenizers have no padding
    adds = config.get("add_bos_token")
    _expect(adds, (None, False, True), "add_bos_token")
    adds = names["bos"] in (BOS, first) if adds is None else adds
    return {**names, "add_bos": bool(names["bos"] and adds)}


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
            splits.append(_DIGIT if step["individual_digits"] else _DIGIT + "+")
            continue
        _expect(step["behavior"], ("Isolated",), "pre_tokenizer behavior")
        _expect(step["invert"], (False,), "pre_tokenizer invert")
        _expect(list(step["pattern"]), (["Regex"],), "pre_tokenizer pattern")
        splits.append(step["pattern"]["Regex"])
    _expect(steps[-1]["type"], ("ByteLevel",), "last pre_tokenizer")
    _expect(steps[-1]["add_prefix_space"], (False,), "pre_tokenizer add_prefix_space")
    if steps[-1].get("use_regex", True):
        splits.append(_GPT2_SPLIT)
    for split in splits:
        compile_split(split)
    return splits


def _check_merges(ranks: Mapping[bytes, int], model: dict) -> None:
    """Refuse merges that tiktoken, which knows tokens but no pairs, would apply differently.

    tiktoken makes a token by its last merge and by no other pair (see last_merge): the two agree
    when that pair is listed, after no merge that makes a higher id. Other pairs, of which Llama 3
    lists all, are then never the next merge. Bytes without a token are dropped (tokenizer.py).
    """
    missing = [byte for byte in _IN_TEXT if bytes([byte]) not in ranks]
    unknown = model.get("unk_token")
    if missing and (unknown is not None or len(missing) == len(_IN_TEXT)):
        raise ValueError(
            f"{len(missing)} of 256 bytes are not in the vocabulary, and model.unk_token is "
            f"{unknown!r}: only null, which drops a few such bytes, can be represented exactly"
        )
    before, highest = {}, -1  # the highest id made before a pair
    for number, merge in enumerate(model["merges"]):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or [type(part) for part in parts] != [str, str]:
            raise ValueError(f"model.merges[{number}] is {merge!r}; a merge is two values, tokens")
        left, right = parts
        pair = (_unspell(left), _unspell(right))
        if not {*pair, pair[0] + pair[1]} <= ranks.keys():
            raise ValueError(f"the parts or product of merge {merge!r} are not in the vocabulary")
        before[pair] = highest
        highest = max(highest, ranks[pair[0] + pair[1]])
    for token, token_id in ranks.items():
        pair = last_merge(token, ranks) if len(token) > 1 else None
        if len(token) < 2:
            continue
        dropped = missing and all(bytes([byte]) in ranks for byte in token)
        if pair is None and model.get("ignore_merges") and not dropped:
            continue  # only a piece that is this token as a whole; bytes dropped from it come later
        if before.get(pair, token_id + 1) > token_id:
            raise ValueError(
                f"token {_spell(token)!r} (id {token_id}) is not made by a merge listed in the "
                "order of the ids"
            )
