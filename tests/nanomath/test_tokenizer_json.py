"""tokenizer.json of the published families: the ids of the tokenizers package, in and out again."""

import json
import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanomath.tokenizer import Tokenizer

peer = pytest.importorskip("tokenizers", reason="the tokenizers package is not installed")

# Patterns as published in each family's tokenizer.json.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
DEEPSEEK_LLM = (
    "[\r\n]",
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    "\\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
)
DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_LLM[4])
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
BYTES_APART = "\u00f8\u00f6\u00fa\u00ff\u00f5\u00f7\u00fb\u00fd\u00c0\u00f9\u00c1\u00fe\u00fc"
BEGIN, END = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
FAMILIES = {
    # name: splits, NFC, digits one by one, control tokens, plain added tokens
    "gpt2": ((), False, False, ["<|endoftext|>"], []),
    "llama3": (
        (LLAMA3,),
        False,
        False,
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
        + [f"<|reserved_special_token_{n}|>" for n in range(251)]
        + ["<|eot_id|>"],
        [],
    ),
    "qwen2": (
        (QWEN2,),
        True,
        False,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<think>", "</think>"],
    ),
    "deepseek_llm": (DEEPSEEK_LLM, False, True, [BEGIN, END], [*BYTES_APART]),
    "deepseek_coder": (DEEPSEEK_CODER, False, True, [BEGIN, END], [*BYTES_APART, "<|User|>"]),
    "deepseek_v3": (
        DEEPSEEK_V3,
        False,
        False,
        [BEGIN, END],
        ["<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<think>", "</think>"],
    ),
}
NAMES = {
    "gpt2": {},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen2": {
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    },
}
DEEPSEEK_NAMES = {
    "add_bos_token": True,
    "bos_token": {"__type": "AddedToken", "content": BEGIN, "normalized": True},
    "eos_token": {"__type": "AddedToken", "content": END, "normalized": True},
    "pad_token": None,
}


def corpus_lines() -> list[str]:
    """Python sources of the standard library and, with NANOMATH_DATA, English and Chinese sums."""
    lines = []
    for name in ("argparse", "ast", "typing", "inspect", "textwrap", "fractions", "statistics"):
        path = Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py"
        lines += path.read_text(encoding="utf-8").splitlines(True)
    folder = os.environ.get("NANOMATH_DATA")
    for name in ("math_test", "cmath_test", "mgsm_zh") if folder else ():
        rows = (Path(folder) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:400]
        lines += [str(value) for row in rows for value in json.loads(row).values()]
    return lines


ODD = (
    *("\u00f7", "12 \u00f7 3 = 4", "F\u00fchrer \u00c0 \u00fe", "na\u00efve caf\u00e9"),
    *("\u4e2d\u6587\u6570\u5b66\u9898\u3002", "\u3000\u4e2d \u6587", "\u3042", "\ud55c\uad6d"),
    *("\\frac{a}{b} \\sqrt{2}", "$x_1 = y^2$", "it's IT'S we'\u017f I'LL", "def f(x):\n\treturn x"),
    *("\U0001f600\U0001f468\u200d\U0001f469", "\x00\x01\x1c\x1f\x7f\x85", "\u2028\u2029", "''s"),
    *("e\u0301 \u212b \u1e9b\u0323", "\uff11\uff12 1234567 \u0661", "   \n\n  \r\n\t ", "  x  "),
    *("<|endoftext|>", "<|eot_id|>", "<think>", "<tool_call>", "<|im_start|>", BEGIN, END),
    *("<|User|>", "<|", "<", ">", "|>", "<<think>>", "\ufeff", "\U0010ffff", "\u0f3a\u1680"),
    *("=" * 70, " " * 70),
)  # fmt: skip


def odd_texts(seed: int, num: int) -> Iterator[str]:
    rng = random.Random(seed)
    words = [*ODD, *"abc 1\n"]
    for _ in range(num):
        text = "".join(rng.choice(words) for _ in range(rng.randrange(1, 9)))
        yield text + "".join(
            chr(rng.choice((0x80, 0x3000, 0xD800)) % 0x3000 + rng.randrange(99))
            for _ in range(rng.randrange(3))
        )


def published(family: str, folder: Path) -> Path:
    """Train a tokenizer with the tokenizers package, as the family's file describes it."""
    splits, nfc, digits, control, added = FAMILIES[family]
    other = peer.Tokenizer(peer.models.BPE(ignore_merges=family == "llama3"))
    steps = [peer.pre_tokenizers.Split(peer.Regex(split), "isolated") for split in splits]
    steps += [peer.pre_tokenizers.Digits(individual_digits=True)] if digits else []
    byte_level = peer.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)
    other.pre_tokenizer = (
        peer.pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level
    )
    other.normalizer = peer.normalizers.NFC() if nfc else peer.normalizers.Sequence([])
    other.decoder = peer.decoders.ByteLevel()
    apart = {*BYTES_APART} if BYTES_APART[0] in added else set()
    trainer = peer.trainers.BpeTrainer(
        vocab_size=1200,
        initial_alphabet=sorted({*peer.pre_tokenizers.ByteLevel.alphabet()} - apart),
        show_progress=False,
    )
    other.train_from_iterator(corpus_lines()[::3], trainer)
    normalized = family.startswith("deepseek") and family != "deepseek_v3"
    other.add_tokens([peer.AddedToken(text, normalized=normalized) for text in added])
    other.add_special_tokens([peer.AddedToken(text, normalized=normalized) for text in control])
    if family == "llama3":
        bos = (control[0], other.token_to_id(control[0]))
        template = peer.processors.TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B", special_tokens=[bos]
        )
        byte_level = peer.processors.ByteLevel(trim_offsets=False)
        other.post_processor = peer.processors.Sequence([byte_level, template])
    folder.mkdir()
    other.save(str(folder / "tokenizer.json"))
    names = NAMES.get(family, DEEPSEEK_NAMES)
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    ends = [other.token_to_id(text) for text in control[-1:] + control[1:2]] or None
    if family == "gpt2":
        ends = ends[0]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {family: published(family, root / family) for family in FAMILIES}


def peer_of(folder: Path):
    other = peer.Tokenizer.from_file(str(folder / "tokenizer.json"))
    other.encode_special_tokens = True  # control tokens in text are text, as they are here
    return other


def assert_same_ids(ours: Tokenizer, other, texts: list[str]) -> None:
    expected = other.encode_batch(texts, add_special_tokens=False)
    for text, encoding in zip(texts, expected, strict=True):
        assert ours.encode(text) == encoding.ids, text


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_the_tokenizers_package(folders, tmp_path, family):
    """An imported file, and the one exported from it, give the tokenizers package's ids."""
    ours, other = Tokenizer.load(folders[family]), peer_of(folders[family])
    texts = [*corpus_lines(), *ODD, *odd_texts(1, 3000)]
    assert len(texts) > 10_000
    assert_same_ids(ours, other, texts)
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    for name in (
        "ranks",
        "splits",
        "added",
        "control",
        "names",
        "add_bos",
        "stop_ids",
        "nfc",
        "sample_limit",
    ):
        assert getattr(again, name) == getattr(ours, name), name
    assert_same_ids(ours, peer_of(tmp_path), texts[-4000:])
