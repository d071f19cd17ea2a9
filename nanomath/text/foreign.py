"""Other people's tokenizer.json, read by the package that defines the file: `tokenizers`.

So the ids are right by construction, byte-level (GPT-2, Llama 3, Qwen, DeepSeek) or in the manner
of SentencePiece (Llama 2). Added here are the two things that this project needs besides: the exact
bytes of each id, as outputs are read while they grow, and control tokens that no text can spell.
The package is in the extra [hub]; a tokenizer trained here does without it (bpe.py).
"""

import json
import re
import secrets
from collections.abc import Collection, Mapping

from nanomath.text.bpe import BYTE_OF

_SPACE = "\u2581"  # SentencePiece spells a space so
_ASIDE = dict.fromkeys(("truncation", "padding", "post_processor"))  # encode() goes without
_PROBE = "a B 12\n\u00e9\u4e2d\U000e0fff"


class ForeignTokens:
    """Encode text as the `tokenizers` package does, but to no control token, whatever it says.

    layout is tokenizer.json as JSON values. Control tokens are those that it marks special and
    those named by other files. Raises ValueError, KeyError or TypeError for what is damaged or
    decodes in a way unknown here.
    """

    def __init__(self, layout: dict, named: Collection[str]):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError(
                "a tokenizer made elsewhere is read by the tokenizers package: "
                "pip install -e '.[hub]' -c constraints.txt"
            ) from None
        if layout["model"].get("continuing_subword_prefix"):  # the package may crash on a wrong one
            raise ValueError("model.continuing_subword_prefix is not known here")
        # The package's `encode_special_tokens` is not enough: a model may hold control tokens as
        # pieces, too. So each goes by a random name in there, and is known by its id alone.
        hidden = {
            token["content"]: secrets.token_hex(16)
            for token in layout["added_tokens"]
            if token["special"] or token["content"] in named
        }
        text = json.dumps(_renamed(layout, hidden))
        # The same matches, but in linear time on a long run of spaces.
        text = text.replace(r'{"Regex": "\\s+$"}', r'{"Regex": "(?<!\\s)\\s+$"}')
        self.first = _first(layout.get("post_processor") or {})
        decoders = {*re.findall(r'"type": "(\w+)"', json.dumps(layout.get("decoder")))}
        try:
            self._peer = Tokenizer.from_str(text)
            probe = self.encode(_PROBE)
        except Exception as error:  # the package has no narrower type
            raise ValueError(f"the tokenizers package refuses it: {error}") from None
        # The rows of a model's embedding follow the file, so ids that the package moves are wrong.
        for token in layout["added_tokens"]:
            name = hidden.get(token["content"], token["content"])
            if self._peer.token_to_id(name) != token["id"]:
                raise ValueError(
                    f"added token {token['content']!r} cannot have the id {token['id']}"
                )
        self.control = {name: self._peer.token_to_id(secret) for name, secret in hidden.items()}
        self.token_bytes = _token_bytes(self._peer, decoders)
        if max(self.token_bytes) >= 1 << 24:
            raise ValueError(f"model.vocab holds the id {max(self.token_bytes)}")
        for token_id in self.control.values():
            self.token_bytes.pop(token_id)
        read = b"".join(self.token_bytes.get(token_id, b"") for token_id in probe)
        shown = self._peer.decode(probe)
        if read.decode("utf-8", "replace").strip() != shown.strip():
            raise ValueError(f"its decoder {sorted(decoders)} is not known here")

    def encode(self, text: str) -> list[int]:
        return self._peer.encode(text, add_special_tokens=False).ids


def _renamed(layout: dict, names: Mapping[str, str]) -> dict:
    """Return layout with tokens renamed, in the model's vocabulary too, and without what makes ids
    a matter of chance or of a limit of length."""
    model = dict(layout["model"], dropout=None)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): i for text, i in model["vocab"].items()}
    else:  # Unigram: pieces with their scores
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if "merges" in model:
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    added = [
        {**token, "content": names.get(token["content"], token["content"])}
        for token in layout["added_tokens"]
    ]
    return {**layout, "model": model, "added_tokens": added, **_ASIDE}


def _first(processor: dict) -> str | None:
    """Return the token that the file puts before a text, if any."""
    for step in processor.get("processors", [processor]):
        if step.get("type") == "TemplateProcessing":
            return step["single"][0].get("SpecialToken", {}).get("id")
    return None


def _token_bytes(peer, decoders: Collection[str]) -> dict[int, bytes]:
    """Return the bytes that each id stands for within a text."""
    found, added = {}, peer.get_added_tokens_decoder()
    for token_id in peer.get_vocab().values():
        text = peer.id_to_token(token_id)
        fallback = re.fullmatch("<0x([0-9A-F]{2})>", text)
        if "ByteLevel" in decoders:
            spelled = token_id not in added and all(char in BYTE_OF for char in text)
            found[token_id] = bytes(BYTE_OF[c] for c in text) if spelled else text.encode()
        elif "ByteFallback" in decoders and fallback:
            found[token_id] = bytes.fromhex(fallback[1])
        else:
            found[token_id] = text.replace(_SPACE, " ").encode()
    return found
