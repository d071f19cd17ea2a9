"""tokenizer.json of the published families: the ids of the tokenizers package, in and out again."""

import copy
import functools
import json
import os
import random
import re
import sysconfig
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.text.foreign import _DIGIT, _SPELLING, compile_split
from nanomath.text.tokenizer import Tokenizer, learn_merges

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


@functools.cache
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


def check_family(folder: Path, tmp_path: Path, texts: list[str]) -> None:
    """Compare ids, imported and exported again, with control tokens' names as text and as ids."""
    ours, other = Tokenizer.load(folder), peer_of(folder)
    assert_same_ids(ours, other, texts)
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    for name in ("ranks", "splits", "added", "control", "names", "add_bos", "stop_ids", "nfc"):
        assert getattr(again, name) == getattr(ours, name), name
    assert_same_ids(ours, peer_of(tmp_path), texts[-4000:])
    other.encode_special_tokens = False
    names = re.compile("(" + "|".join(sorted(map(re.escape, ours.control), key=len)[::-1]) + ")")
    for text in texts[-4000:]:
        ids = []
        for part in names.split(text):
            ids += [ours.control[part]] if part in ours.control else ours.encode(part)
        assert ids == other.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids) == names.sub("", text) or ours.nfc


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_the_tokenizers_package(folders, tmp_path, family):
    """An imported file, and the one exported from it, give the tokenizers package's ids; names of
    control tokens are text, or their ids where looked up: 2,000 lines for each of six families."""
    check_family(folders[family], tmp_path, [*corpus_lines()[::11], *ODD, *odd_texts(1, 1200)])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_on_many_lines(folders, tmp_path, family):
    """The same on at least 10,000 lines for each family."""
    texts = [*corpus_lines(), *odd_texts(2, 9000)]
    assert len(texts) > 10_000
    check_family(folders[family], tmp_path, texts)


@pytest.mark.slow
def test_ids_equal_on_real_files(tmp_path):
    """Every tokenizer in the folder NANOMATH_TOKENIZERS: the same on at least 10,000 lines."""
    root = os.environ.get("NANOMATH_TOKENIZERS")
    if not root:
        pytest.skip("NANOMATH_TOKENIZERS is not set: a folder of folders with a tokenizer.json")
    files = sorted(Path(root).glob("*/tokenizer.json"))
    assert files, f"{root} has no */tokenizer.json"
    for file in files:
        check_family(
            file.parent, tmp_path / file.parent.name, [*corpus_lines(), *odd_texts(3, 9000)]
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(folders, family):
    """decode(encode(x)) is x, or NFC(x) where the model has NFC, for every valid unicode string."""
    ours = Tokenizer.load(folders[family])
    alphabet = st.characters(exclude_categories=("Cs",))
    texts = st.lists(st.one_of(st.text(alphabet, max_size=9), st.sampled_from(ODD)), max_size=6)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(parts=texts)
    def check(parts):
        text = "".join(parts)
        ids = ours.encode(text)
        if ours.nfc:  # added tokens are cut out before, so text beside one does not compose with it
            assert unicodedata.normalize("NFC", ours.decode(ids)) == unicodedata.normalize(
                "NFC", text
            )
        else:
            assert ours.decode(ids) == text
            assert sum(ours.token_num_bytes[i] for i in ids) == len(text.encode())
        assert not {*ids} & {*ours.control.values()}

    check()


def test_special_ids_of_each_family(folders):
    """bos, eos, pad and the ids that end an output are those the published files name."""
    loaded = {family: Tokenizer.load(folder) for family, folder in folders.items()}
    gpt2, llama, qwen, math = (loaded[f] for f in ("gpt2", "llama3", "qwen2", "deepseek_llm"))
    for ours, bos, eos, pad, stops in (
        (gpt2, None, "<|endoftext|>", "<|endoftext|>", ["<|endoftext|>"]),
        (llama, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", ["<|eot_id|>", "<|end_of_text|>"]),
        (qwen, None, "<|im_end|>", "<|endoftext|>", ["<|im_end|>", "<|im_start|>"]),
        (math, BEGIN, END, END, [END]),
    ):
        assert ours.names == {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        assert ours.stop_ids == tuple(ours.control[name] for name in stops)
        assert ours.eos_id == ours.stop_ids[0]
        first = [] if bos is None else [ours.control[bos]]
        assert ours.encode("a b", bos=True, eos=True) == [*first, *ours.encode("a b"), ours.eos_id]
    assert math.encode("12\u00f73")[2] == math.added["\u00f7"] == math.vocab_size - 10
    assert math.decode([math.added["\u00f7"]]) == "\u00f7"
    assert llama.sample_limit == llama.vocab_size  # <|eot_id|> is the last and may be sampled
    assert qwen.sample_limit == qwen.control["<|im_end|>"] + 1


def test_exported_folder_loads_in_transformers(folders, tmp_path):
    """AutoTokenizer reads what `save` writes: same ids, bos where texts begin so, eos, pad."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for family, folder in folders.items():
        ours = Tokenizer.load(folder)
        ours.save(tmp_path / family)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / family)
        for text in (
            "Let x = 12 \u00f7 3.",
            "caf\u00e9\n\n  \u4e2d\u6587 it's",
            "<think>a</think>",
        ):
            assert theirs(text)["input_ids"] == ours.encode(text, bos=True)
            assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        special = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
        assert special == (ours.bos_id, ours.eos_id, ours.pad_id)
        read = transformers.GenerationConfig.from_pretrained(tmp_path / family)
        assert tuple(read.eos_token_id) == ours.stop_ids


CHARS = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]


def matched_by_peer(step) -> set[str]:
    blocks = ("".join(CHARS[i : i + 4096]) for i in range(0, len(CHARS), 4096))
    return {*CHARS}.difference(
        *(part for block in blocks for part, _ in step.pre_tokenize_str(block))
    )


def assert_same_class(pattern: str) -> None:
    compiled = compile_split(pattern)
    ours = {char for char in CHARS if compiled.match(char)}
    different = ours ^ matched_by_peer(peer.pre_tokenizers.Split(peer.Regex(pattern), "removed"))
    assert not different, (pattern, len(different))


SLOW_PATTERNS = (r"\p{L}", r"\p{N}", r"[^\r\n\p{L}\p{P}\p{S}]")


@pytest.mark.parametrize(
    "pattern",
    [
        r"[^\s\p{L}\p{N}]",
        *(pytest.param(pattern, marks=pytest.mark.slow) for pattern in SLOW_PATTERNS),
    ],
)
def test_every_code_point_is_of_one_class(pattern):
    """A class holds the same of all 1,112,064 characters here and in the tokenizers package, though
    17,810 of them have a class in one package and none in the other."""
    assert_same_class(pattern)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [*"LMNPSZ", "Lu", "Lt", "Lm", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pd", "Sm", "Sc", "So"],
)
def test_every_code_point_is_of_one_category(name):
    """The same of every general category that a pattern may name."""
    assert_same_class(f"\\p{{{name}}}")


@pytest.mark.slow
def test_every_digit_and_contraction():
    """The Digits step and contractions without case match the same characters in both packages."""
    digits = peer.pre_tokenizers.Digits(individual_digits=True)
    ours = compile_split(_DIGIT)
    for char in CHARS:
        if ours.match(char) or char.isnumeric() or regex.match(r"\p{N}", char):
            assert bool(ours.match(char)) == (len(digits.pre_tokenize_str(f"a{char}a")) == 3), char
    split = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    ours, theirs = compile_split(split), peer.pre_tokenizers.Split(peer.Regex(split), "removed")
    for form in ("'{}", "'{}e", "'r{}", "'{}l", "'l{}"):
        for char in CHARS:
            text = form.format(char)
            assert bool(ours.fullmatch(text)) == (not theirs.pre_tokenize_str(text)), text


def test_nfc_differs_only_in_the_order_of_rare_marks():
    """NFC of every character alone is the tokenizers package's; its older tables order at most 200
    rare combining marks (98 with Unicode 14's unicodedata) otherwise beside other marks."""
    theirs = peer.normalizers.NFC()
    nfc = functools.partial(unicodedata.normalize, "NFC")
    text = "\n".join(CHARS[11:])
    assert nfc(text) == theirs.normalize_str(text)
    marks = [char for char in CHARS if unicodedata.category(char)[0] == "M"]
    forms = [f"a\u0323{char}b a{char}\u0323\u0301" for char in marks]
    assert sum(nfc(form) != theirs.normalize_str(form) for form in forms) <= 200


RUNS = {"space": " ", "letter": "a", "digit": "1", "newline": "\n", "sign": "=", "less": "<"}
RUNS |= {
    "emoji": "\U0001f600",
    "chinese": "\u4e2d",
    "zero": "\x00",
    "mark": "\u0301",
    "wide": "\u3000",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_of_equal_characters(folders, family):
    """A run of 20,000 equal characters, alone and before text, has the tokenizers package's ids."""
    ours, other = Tokenizer.load(folders[family]), peer_of(folders[family])
    quick = 2000 if family.startswith("deepseek") else 20_000  # quadratic there: `\\s+$`
    texts = [char * (quick if char in " \u3000" else 20_000) for char in RUNS.values()]
    assert_same_ids(ours, other, [*texts, *(text[:2000] + "\u4e2dx" for text in texts)])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_million_equal_characters(folders, family):
    """A million equal characters encode within a minute and come back, alone and before text."""
    ours = Tokenizer.load(folders[family])
    for name, char in RUNS.items():
        for text in (char * 1_000_000, char * 1_000_000 + "\u4e2dx"):
            start = time.perf_counter()
            ids = ours.encode(text)
            print(f"{family}, {name}: {time.perf_counter() - start:.1f} s, {len(ids)} tokens")
            assert time.perf_counter() - start < 60
            assert ours.decode(ids) == text


def test_merges_equal_the_tokenizers_trainer():
    """On the same pieces the trainer makes the merges of the tokenizers package's, all of them:
    ties go to the smaller ids in both, so bytes are numbered in its alphabet's order here."""
    step = peer.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = peer.trainers.BpeTrainer(
        vocab_size=256 + 2000,
        initial_alphabet=step.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    other = peer.Tokenizer(peer.models.BPE())
    other.pre_tokenizer = step
    lines = corpus_lines()[::4]
    other.train_from_iterator(lines, trainer)
    expected = json.loads(other.to_str())["model"]["merges"]
    order = {char: number for number, char in enumerate(sorted(_SPELLING))}
    pieces: dict[bytes, int] = {}
    for line in lines:
        for piece, _ in step.pre_tokenize_str(line):
            key = bytes(order[char] for char in piece)
            pieces[key] = pieces.get(key, 0) + 1
    tokens = sorted(_SPELLING)
    found = []
    for left, right in learn_merges(pieces, 2000):
        found.append([tokens[left], tokens[right]])
        tokens.append(tokens[left] + tokens[right])
    assert found == [merge.split(" ") if isinstance(merge, str) else merge for merge in expected]
    assert len(found) == 2000


@pytest.mark.slow
def test_training_speed():
    """4,096 merges on 10 MB of sources and sums take at most 60 s."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*/*.py"))
    texts, num_bytes = corpus_lines()[:], 0
    for path in paths:
        if num_bytes < 9_500_000 and "site-packages" not in str(path):
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
            num_bytes += len(texts[-1].encode())
    num_bytes = sum(len(text.encode()) for text in texts)
    start = time.process_time()
    trained = Tokenizer.train(texts, 256 + 4096 + 7)
    print(f"{num_bytes / 1e6:.1f} MB: {time.process_time() - start:.1f} s")
    assert time.process_time() - start < 60 and num_bytes > 10_000_000
    assert trained.vocab_size == 256 + 4096 + 7


def places(value, path=()) -> Iterator[tuple]:
    """Paths to the values in JSON, of long lists and objects the first three."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items)[:3] if len(value) > 20 else items:
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))
        else:
            yield (*path, key)


def replaced(value, path: tuple, new):
    if not path:
        return new
    copied = copy.copy(value)
    copied[path[0]] = replaced(value[path[0]], path[1:], new)
    return copied


def test_wrong_values_are_named_or_harmless(folders, tmp_path):
    """Null, a number, a text, a list or an object in any place of the three files: one ValueError
    that names the file, or a tokenizer with the tokenizers package's ids."""
    texts = ["Let x = 12 \u00f7 3.\n\n", "it's <think> <|eot_id|>", "  \u4e2d\u6587 e\u0301"]
    Tokenizer.train(texts * 9, 290).save(tmp_path)
    outcomes = {True: 0, False: 0}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        file = tmp_path / name
        whole = json.loads(file.read_text())
        for path in places(whole):
            for new in (None, 7, -1.5, "x", [], {}, [None], {"x": 1}, True):
                file.write_text(json.dumps(replaced(whole, path, new)))
                try:
                    ours = Tokenizer.load(tmp_path)
                except ValueError as error:
                    assert name in str(error) and "\n" not in str(error)
                    outcomes[False] += 1
                    continue
                outcomes[True] += 1
                try:
                    other = peer_of(tmp_path)
                except Exception:  # the tokenizers package reads less, by its own exception type
                    continue
                assert_same_ids(ours, other, texts)
        text = json.dumps(whole)
        for cut in range(0, len(text), 97):
            file.write_text(text[:cut])
            with pytest.raises(ValueError, match=f"{name}: not JSON"):
                Tokenizer.load(tmp_path)
        file.write_text(text)
    assert min(outcomes.values()) > 100, outcomes


@pytest.mark.parametrize(
    ("pattern", "odd"),
    [
        (r"\w+", r"\w"),
        (r"\p{Ll}+", r"\p"),
        (r"\P{L}+", r"\P"),
        (r"\X", r"\X"),
        (r"a\b", r"\b"),
        (r"[a-z&&[^b]]", "&&"),
        (r"[a-z--b]", "--"),
        (r"[[:alpha:]]+", "[:"),
        (r"(?m:a.)", "(?"),
        (r"(?<x>a)", "(?"),
        (r"a{1,2}+", "{1,2}+"),
        (r"(?i:\u017f)", "(?i:"),
        (r"(a)b", ""),
        (r"a*", ""),
    ],
)
def test_patterns_two_engines_may_read_in_two_ways_are_refused(pattern, odd):
    """Each such pattern is refused with the part that is the reason."""
    with pytest.raises(ValueError, match="cannot be represented exactly") as caught:
        compile_split(pattern)
    assert odd in str(caught.value)


@pytest.mark.parametrize(("first", "second"), [("<ab", "b>"), ("b>", "<ab"), ("<a", "<ab>")])
def test_added_tokens_of_two_passes_never_overlap(tmp_path, first, second):
    """The tokenizers package looks for `normalized` tokens after the others, not by length: tokens
    of both kinds that can overlap in a text are refused, of one kind they load with its ids."""
    Tokenizer.train(["abc ab b> <a"] * 9, 270, added_tokens=(first, second)).save(tmp_path)
    texts = ["x<ab>y", "<b>", "<<abb>", "b><ab"]
    file = tmp_path / "tokenizer.json"
    layout = json.loads(file.read_text())
    for number, alike in ((0, False), (1, True)):
        layout["added_tokens"][number]["normalized"] = True
        file.write_text(json.dumps(layout))
        if alike:
            assert_same_ids(Tokenizer.load(tmp_path), peer_of(tmp_path), texts)
        else:
            with pytest.raises(ValueError, match="overlap in two passes"):
                Tokenizer.load(tmp_path)
    layout["normalizer"] = {
        "type": "NFC"
    }  # the second pass sees the text in NFC, the first does not
    file.write_text(json.dumps(layout))
    with pytest.raises(ValueError, match="matched in a way unknown here"):
        Tokenizer.load(tmp_path)


def test_added_tokens_are_no_pieces_where_merges_are_ignored(tmp_path):
    """Added tokens that stand in model.vocab too load; with ignore_merges the tokenizers package
    finds them there as pieces, even control tokens, so that is refused."""
    Tokenizer.train(["abc abc"] * 9, 300).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    layout = json.loads(file.read_text())
    layout["model"]["vocab"] |= {token["content"]: token["id"] for token in layout["added_tokens"]}
    file.write_text(json.dumps(layout))
    assert_same_ids(Tokenizer.load(tmp_path), peer_of(tmp_path), ["abc<think>", "<|eos|>"])
    layout["model"]["ignore_merges"] = True
    file.write_text(json.dumps(layout))
    with pytest.raises(ValueError, match="model.vocab would match twice"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("pattern", [r"x+$", r"^x+", r"\s+$", r"x(?=.)"])
def test_ends_of_lines_are_those_of_the_tokenizers_package(pattern):
    """`^` and `$` match at every line, and a dot no line break, in both packages."""
    text = "xx\nx \n  \n\nxx x  \n"
    theirs = peer.pre_tokenizers.Split(peer.Regex(pattern), "isolated").pre_tokenize_str(text)
    ours = [piece for piece in compile_split(pattern).split(text) if piece]
    assert ours == [piece for piece, _ in theirs]


def without_bytes(folder: Path, missing: list[int], *, also: str = "", **model) -> Path:
    """Write a tokenizer trained with the tokenizers package whose vocabulary lacks some bytes.

    also: a text that is one token whatever its bytes.
    """
    other = peer.Tokenizer(peer.models.BPE())
    other.pre_tokenizer = peer.pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.decoder = peer.decoders.ByteLevel()
    trainer = peer.trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=[*_SPELLING], show_progress=False
    )
    other.train_from_iterator([*ODD, *corpus_lines()[:400]] * 2, trainer)
    layout = json.loads(other.to_str())
    gone = {_SPELLING[byte] for byte in missing}
    kept = [token for token in layout["model"]["vocab"] if not gone & {*token}]
    kept += ["".join(_SPELLING[byte] for byte in also.encode())] * bool(also)
    vocab = {token: number for number, token in enumerate(kept)}
    merges = [pair for pair in layout["model"]["merges"] if not gone & {*"".join(pair)}]
    layout["model"] |= {"vocab": vocab, "merges": merges, **model}
    marks = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    end = {"id": len(kept), "content": "<|endoftext|>", "special": True, **marks}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({**layout, "added_tokens": [end]}))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return folder


SMOLLM = [0xC0, 0xC1, 0xF1, 0xF2, 0xF5, 0xF6, 0xFD, 0xFE]  # so many and such


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_bytes_without_a_token_are_dropped(tmp_path, seed, ignore_merges):
    """A vocabulary that lacks 8 bytes, or any 1 to 200: the tokenizers package's ids for texts that
    hold them, imported and exported again. What is beside a dropped byte merges over it; a piece
    that is a token as a whole is that one, where merges may be ignored."""
    rng = random.Random(seed)
    missing = rng.sample(range(256), (8, 4, 100, 200)[seed]) if seed else SMOLLM
    model = {"ignore_merges": True, "also": "\U00040000"} if ignore_merges else {}
    if 0xF1 not in missing:
        missing.append(0xF1)
    ours = Tokenizer.load(without_bytes(tmp_path / "x", missing, **model))
    ours.save(tmp_path / "again")
    starts = (0, 0x80, 0x4E2D, 0x1F600, 0x40000, 0x90000, 0x10FF00)
    texts = [*odd_texts(seed, 300), *ODD, "x\U00040000y", "\U00040000\U00040000"]
    texts += ["".join(chr(rng.choice(starts) + rng.randrange(99)) for _ in "12345") for _ in texts]
    for tokenizer, folder in ((ours, "x"), (Tokenizer.load(tmp_path / "again"), "again")):
        assert_same_ids(tokenizer, peer_of(tmp_path / folder), texts)
    assert sum(ours.decode(ours.encode(text)) != text for text in texts) > 10
    everything = "".join(map(chr, range(0x20, 0x250)))
    kept = bytes(byte for byte in everything.encode() if byte not in missing)
    assert ours.decode_bytes(ours.encode(everything)) == kept


def test_missing_bytes_that_cannot_be_exact_are_refused(tmp_path):
    """A token for unknown bytes, no byte at all, and tokens that only a whole piece can become, of
    which a piece may be left where bytes are dropped, are refused by name."""
    for number, (missing, model, message) in enumerate(
        (
            (SMOLLM, {"unk_token": "<|endoftext|>"}, "2 of 256 bytes .* unk_token is '<|endoft"),
            ([*range(256)], {}, "243 of 256 bytes are not in the vocabulary"),
            (SMOLLM, {"ignore_merges": True, "also": "\1\2\3"}, "is not made by a merge"),
        )
    ):
        folder = without_bytes(tmp_path / str(number), missing, **model)
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(folder)
    whole = Tokenizer.load(without_bytes(tmp_path / "whole", [0xF5], **model))
    assert len(whole.encode("\1\2\3")) == 1  # bytes that no text has are not missed


@pytest.mark.parametrize("merge", ["a b c", "ab", ["a"], ["a", "b", "c"], ["a", 1], None, 7, {}])
def test_merges_have_two_parts(tmp_path, merge):
    """A merge of one part, of three or of no texts is named with its place."""
    folder = without_bytes(tmp_path / "x", [])
    layout = json.loads((folder / "tokenizer.json").read_text())
    layout["model"]["merges"].insert(3, merge)
    (folder / "tokenizer.json").write_text(json.dumps(layout))
    with pytest.raises(ValueError, match=r"tokenizer\.json: model\.merges\[3\] is .* two "):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("named", "generation", "config", "stops"),
    [
        ("<|eot_id|>", None, None, ["<|eot_id|>"]),
        ("<|eot_id|>", None, "<|end_of_text|>", ["<|eot_id|>", "<|end_of_text|>"]),
        ("<|eot_id|>", [], ["<|end_of_text|>"], ["<|eot_id|>", "<|end_of_text|>"]),
        (None, None, "<|end_of_text|>", ["<|end_of_text|>"]),
        (None, "<|eot_id|>", "<|end_of_text|>", ["<|eot_id|>", "<|end_of_text|>"]),
        ("<|eot_id|>", ["<|eot_id|>"], ["<|eot_id|>"], ["<|eot_id|>"]),
    ],
)
def test_samples_end_with_what_any_file_calls_eos(
    folders, tmp_path, named, generation, config, stops
):
    """stop_ids are the eos of tokenizer_config.json, generation_config.json and config.json, each
    once, the first eos_id; an id that the tokenizer lacks is named with its file."""
    (tmp_path / "tokenizer.json").write_bytes((folders["llama3"] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    ids = Tokenizer.load(folders["llama3"]).control

    def numbers(ends):
        return [ids[end] for end in ends] if isinstance(ends, list) else ids.get(ends)

    for name, ends in (("generation_config.json", generation), ("config.json", config)):
        if ends is not None:
            (tmp_path / name).write_text(json.dumps({"eos_token_id": numbers(ends)}))
    ours = Tokenizer.load(tmp_path)
    assert ours.stop_ids == tuple(ids[stop] for stop in stops) and ours.eos_id == ours.stop_ids[0]
    for name in ("generation_config.json", "config.json"):
        (tmp_path / name).write_text('{"eos_token_id": 999999}')
        with pytest.raises(ValueError, match=f"{name}: eos_token_id 999999 is not an id of"):
            Tokenizer.load(tmp_path)
        (tmp_path / name).unlink()
