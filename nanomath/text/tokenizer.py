"""Text to token ids and back: train, load, save, encode, decode.

    python -m nanomath.text.tokenizer --corpus corpus.jsonl --vocab_size 1024 --out runs/tokenizer

How text becomes ids is the coder's: byte-level BPE trained here (bpe.py), or what a model from
elsewhere brings (foreign.py). Around it stand control tokens (bos, eos, pad, those of chats), ids
that no text can produce: a page that contains "<|eos|>" is spelled out in bytes. Files have the
Hugging Face layout. Chat templates are chat.py's.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanomath.base.config import one_line_errors, opt, parse
from nanomath.base.files import read_json, read_jsonl, write_json, write_text
from nanomath.base.log import progress
from nanomath.text.bpe import (
    ADDED_TOKENS,
    BOS,
    BYTES,
    CONTROL_TOKENS,
    EOS,
    PAD,
    BytePairs,
    begins_with,
    without_surrogates,
)
from nanomath.text.chat import TEMPLATES, as_jinja
from nanomath.text.foreign import ForeignTokens

TEMPLATE_KEY = "nanomath_chat_template"  # in tokenizer_config.json: what the model was trained with


class Tokenizer:
    """Encode text to ids and back. Build one with `train` or `load`.

    coder does so for plain text; control are the ids that no text produces, bos (may be None), eos
    and pad among them. add_bos is whether texts begin with bos. stop_ids end an output: eos first.
    """

    def __init__(
        self,
        coder: BytePairs | ForeignTokens,
        *,
        bos: str | None = BOS,
        eos: str = EOS,
        pad: str = PAD,
        add_bos: bool = True,
        stop_ids: Sequence[int] = (),
        template: str = "plain",
        program: str = "",
        file: str = "",
    ):
        self.coder, self.control = coder, coder.control
        self.names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        self.bos_id, self.add_bos = self.control.get(bos), add_bos
        self.eos_id, self.pad_id = self.control[eos], self.control[pad]
        self.stop_ids = tuple(dict.fromkeys((self.eos_id, *stop_ids)))
        self.template = template  # chat.py's: its use_template adds to stop_ids, too
        self.program = program  # the chat template that came with the files: never run
        self.file = file or json.dumps(coder.layout(), indent=1, ensure_ascii=False) + "\n"
        self._bytes = coder.token_bytes | dict.fromkeys(self.control.values(), b"")
        self.vocab_size = max(self._bytes) + 1

    @property
    def sample_limit(self) -> int:
        """The ids that may be sampled are those below: bos and pad, of which decoding shows
        nothing, are above, so an output's text is all that the model wrote.

        It is eos_id + 1 in a tokenizer trained here. In one made elsewhere only the control tokens
        (stop_ids apart) and unused ids at the end of the vocabulary are above; others stay below.
        """
        hidden = {*self.control.values()} - {*self.stop_ids}
        return max(self._bytes.keys() - hidden) + 1

    @property
    def token_num_bytes(self) -> list[int]:
        """Bytes of text each id stands for (0 for control tokens): losses become bits per byte."""
        return [len(self._bytes.get(token_id, b"")) for token_id in range(self.vocab_size)]

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of text, between bos (where texts begin with one) and eos if asked.

        Lone surrogates, which no file can hold, become U+FFFD. What a tokenizer made elsewhere has
        no token for becomes its token for such, or is dropped.
        """
        first = [self.bos_id] if bos and self.add_bos else []
        last = [self.eos_id] if eos else []
        return [*first, *self.coder.encode(without_surrogates(text)), *last]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids: control tokens dropped, bytes that are not UTF-8 as U+FFFD.

        The space that SentencePiece puts before a text is kept: ids may be the end of one.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes of ids. Raises ValueError for an id outside the vocabulary."""
        try:
            return b"".join([self._bytes[token_id] for token_id in map(int, ids)])
        except KeyError as error:
            raise ValueError(f"token id {error} is not in this vocabulary") from None

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, show_progress: bool = False
    ) -> "Tokenizer":
        """Learn byte-level BPE from texts.

        Ids: 256 bytes, merges in the order learned, added tokens, eos, bos, pad. vocab_size counts
        all of them; it comes out smaller where no pair of tokens is left that occurs twice.
        Raises ValueError when vocab_size has no room or the texts are empty.
        """
        least = len(BYTES) + len(ADDED_TOKENS) + len(CONTROL_TOKENS)
        if vocab_size < least:
            raise ValueError(
                f"vocab_size {vocab_size} is too small: 256 bytes, {len(ADDED_TOKENS)} added and "
                f"{len(CONTROL_TOKENS)} control tokens need {least}"
            )
        texts = map(without_surrogates, texts)
        return cls(BytePairs.train(texts, vocab_size - least, show_progress=show_progress))

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json (Hugging Face's layout; of a tokenizer made elsewhere the text that
        was read), tokenizer_config.json and generation_config.json: bos, pad and all ids that end
        an output."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        names = {"add_bos_token": self.add_bos, **self.names, TEMPLATE_KEY: self.template}
        chat = {"chat_template": as_jinja(self)}
        write_json(folder / "tokenizer_config.json", {**kind, **names, **chat})
        ids = {"bos_token_id": self.bos_id, "pad_token_id": self.pad_id}
        write_json(folder / "generation_config.json", {"eos_token_id": list(self.stop_ids), **ids})
        file = self.file
        if self.add_bos and self.coder.first != self.names["bos_token"]:
            bos = begins_with(
                self.names["bos_token"], self.bos_id
            )  # transformers asks this file alone
            file = json.dumps({**json.loads(file), "post_processor": bos}, ensure_ascii=False)
        # last: where it is, the folder is complete
        write_text(folder / "tokenizer.json", file)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Read tokenizer.json, and where they are tokenizer_config.json, generation_config.json and
        config.json: an output ends with whatever any of them calls eos.

        Raises FileNotFoundError, or ValueError naming the file that is damaged or not known here.
        """
        folder = Path(folder)
        path, named = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; make one with: "
                f"python -m nanomath.text.tokenizer --out {folder}"
            )
        layout, config = read_json(path), read_json(named) if named.is_file() else {}
        others = [folder / "generation_config.json", folder / "config.json"]
        ends = {p: read_json(p).get("eos_token_id") for p in others if p.is_file()}
        read, stop_ids = named, []  # read: the file that an error names
        try:
            names = {kind: _name(config, kind) for kind in ("bos", "eos", "pad")}
            read = path
            coder = BytePairs.read(layout) or ForeignTokens(layout, {*names.values()})
            for read, ids in ends.items():  # noqa: B007 (an error names it)
                stop_ids += _known_ids(ids, coder)
            read = named
            settings = _settings(config, names, coder, stop_ids)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{read}: not a complete {read.name} ({error!r})") from None
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{read}: {error}") from None
        program, file = _program(folder, config), path.read_bytes().decode()
        return cls(coder, **settings, stop_ids=stop_ids, program=program, file=file)


def _name(config: dict, kind: str) -> str | None:
    given = config.get(f"{kind}_token")
    text = given.get("content") if isinstance(given, dict) else given
    if not isinstance(text, str | None):
        raise ValueError(f"{kind}_token {given!r} is not a text")
    return text or None


def _known_ids(value: int | list | None, coder: BytePairs | ForeignTokens) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    known = coder.token_bytes.keys() | {*coder.control.values()}
    for token_id in ids:
        if type(token_id) is not int or token_id not in known:
            raise ValueError(f"eos_token_id {token_id!r} is not an id of tokenizer.json")
    return ids


def _settings(
    config: dict,
    names: Mapping[str, str | None],
    coder: BytePairs | ForeignTokens,
    stop_ids: Sequence[int],
) -> dict:
    """Return the names of bos (None if there is none), eos and pad, whether texts begin with bos,
    and the chat template."""
    control, names = coder.control, dict(names)
    for kind, default in (("bos", BOS), ("eos", EOS), ("pad", PAD)):
        if names[kind] is None and default in control:
            names[kind] = default
    if names["eos"] is None:
        ends = [name for name, token_id in control.items() if token_id in stop_ids[:1]]
        names["eos"] = ends[0] if ends else None
    names["pad"] = names["pad"] or names["eos"]  # most published tokenizers have no padding
    for kind, name in names.items():
        if (name or kind == "eos") and name not in control:
            raise ValueError(f"no control token {name!r} for {kind}_token in tokenizer.json")
    template, add_bos = config.get(TEMPLATE_KEY, "plain"), config.get("add_bos_token")
    if template not in tuple(TEMPLATES):
        raise ValueError(f"chat template {template!r}; known are {', '.join(TEMPLATES)}")
    if add_bos is None:  # as the file itself says
        add_bos = names["bos"] == coder.first
    if type(add_bos) is not bool:
        raise ValueError(f"add_bos_token {add_bos!r} is neither true nor false")
    return {**names, "add_bos": add_bos and names["bos"] is not None, "template": template}


def _program(folder: Path, config: dict) -> str:
    """Return the chat template that a model from elsewhere brings, a Jinja program, as text."""
    path = folder / "chat_template.jinja"
    if config.get(TEMPLATE_KEY) == "plain":  # of this project: how it was trained is known
        return ""
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    return str(config.get("chat_template") or "")


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
