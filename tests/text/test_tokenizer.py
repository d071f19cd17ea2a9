"""Tokenizer: trained merges, round trips, control tokens, equality with the tokenizers package."""

import json
import os
import random
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.text.bpe import BytePairs, last_merge, learn_merges, split_text
from nanomath.text.tokenizer import Tokenizer

VOCABULARY = (
    "the sum of two numbers is a number and their product is also one we add 12 to 345 and get 357 "
    "def solve(x): return x**2 + 3*x - 1 # a quadratic \\frac{a}{b} \\sqrt{2} $x_1 = y^2$ "
    "caf\u00e9 \u0394x \u2264 \u03c0 \u4e2d\u6587\u6570\u5b66\u9898 \u8ba1\u7b97\u7ed3\u679c "
    "\u043f\u0440\u043e\u0441\u0442\u043e\u0435 \u0447\u0438\u0441\u043b\u043e \U0001f600 \u00f7"
)
WORDS = VOCABULARY.split(" ")


def sample_text(seed: int, num_words: int = 400) -> str:
    rng = random.Random(seed)
    gaps = [" "] * 8 + ["\n", "\n\n    ", "  ", "\t", ""]
    return "".join(rng.choice(WORDS) + rng.choice(gaps) for _ in range(num_words))


def character_texts(form: str) -> list[str]:
    """Texts of form.format(character): the whole basic plane, edges and a sample of the others."""
    edges = (0x1D400, 0x1D7CB, 0x20000, 0x3FFFD, 0x10FFFF)
    codes = {*range(0x10000), *range(0x10000, 0x110000, 53)} | {
        e + d for e in edges for d in (-1, 0)
    }
    chars = [chr(code) for code in sorted(codes) if not 0xD800 <= code < 0xE000]
    return ["".join(form.format(c) for c in chars[i : i + 256]) for i in range(0, len(chars), 256)]


def wild_text(rng: random.Random) -> str:
    """Text no corpus has: control bytes, emoji, rare scripts, token names, odd spaces, runs."""
    pick = [
        lambda: chr(rng.choice([rng.randrange(0x20), rng.randrange(0x80), rng.randrange(0x3000)])),
        lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
        lambda: rng.choice(["<think>", "</think>", "<answer>", "<|eos|>", "<|bos|>", "<|pad|>"]),
        lambda: rng.choice(WORDS),
        lambda: rng.choice([" ", "  ", "\u3000", "\u00a0", "\u0085", "\u2028", "\r\n", "\x1c"]),
        lambda: rng.choice("a1 \n.\u4e2d") * rng.randrange(1, 70),
    ]
    return "".join(rng.choice(pick)() for _ in range(rng.randrange(1, 30)))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([sample_text(seed) for seed in range(20)], 400)


@pytest.fixture(scope="module")
def loaded_by_peer(tokenizer, tmp_path_factory):
    peer = pytest.importorskip("tokenizers", reason="the tokenizers package is not installed")
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    other = peer.Tokenizer.from_file(str(folder / "tokenizer.json"))
    other.encode_special_tokens = True  # control tokens in text are text, as they are here
    return other


def naive_merge(word: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Replace a pair in a word, from the left."""
    at, word = 0, [*word]
    while at < len(word) - 1:
        if (word[at], word[at + 1]) == pair:
            word[at : at + 2] = [new_id]
        at += 1
    return word


def naive_merges(piece_counts: dict[bytes, int], num_merges: int) -> list[tuple[int, int]]:
    """Byte-pair encoding by its definition: count every pair anew before each merge."""
    words = {piece: list(piece) for piece in piece_counts}
    merges = []
    while len(merges) < num_merges:
        counts = Counter()
        for piece, word in words.items():
            for pair in zip(word, word[1:]):
                counts[pair] += piece_counts[piece]
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        for piece, word in words.items():
            words[piece] = naive_merge(word, best, 256 + len(merges))
        merges.append(best)
    return merges


@pytest.mark.parametrize("seed", range(12))
def test_incremental_trainer_equals_naive_recount(seed):
    """The trainer makes the merges of a full recount before each, ties and overlaps included."""
    rng = random.Random(seed)
    alphabet = b"ab" if seed % 2 else b"abcde "
    pieces = {
        bytes(rng.choice(alphabet) for _ in range(rng.randrange(1, 14))): rng.randrange(1, 9)
        for _ in range(60)
    }
    expected = naive_merges(pieces, 120)
    assert learn_merges(pieces, 120) == expected
    assert learn_merges(dict(reversed(pieces.items())), 120) == expected  # order of text is free
    assert len(expected) > 30


def test_trained_pieces_encode_as_the_merges_say():
    """tiktoken, which knows no pairs, applies the learned merges to every training piece."""
    text = sample_text(1)
    trained = Tokenizer.train([text], 500)
    ranks, pieces = trained.coder.ranks, split_text(text)
    pairs = [last_merge(token, ranks) for token in [*ranks][256:]]
    merges = [tuple(ranks[half] for half in pair) for pair in pairs]
    assert merges == learn_merges(Counter(piece.encode() for piece in pieces), len(merges))
    for piece in {*pieces}:
        word = list(piece.encode())
        for number, pair in enumerate(merges):
            word = naive_merge(word, pair, 256 + number)
        assert trained.encode(piece) == word


def test_same_text_gives_same_file(tmp_path):
    """Training is deterministic: the same texts give the same tokenizer.json byte for byte."""
    texts = [sample_text(seed) for seed in range(4)]
    for name in "ab":
        Tokenizer.train(texts, 400).save(tmp_path / name)
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in "ab"]
    assert files[0] == files[1]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_round_trip(tokenizer, text):
    """decode(encode(x)) == x for every valid unicode string."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert sum(tokenizer.token_num_bytes[i] for i in ids) == len(text.encode())


def test_round_trip_of_every_character(tokenizer):
    """Every character of the basic plane and a sample of the others survive between letters."""
    for text in character_texts("x{}"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_that_are_not_utf8_decode(tokenizer):
    """Any ids decode: exactly as bytes, with U+FFFD as text, and all 256 bytes are reachable."""
    assert tokenizer.decode_bytes(range(256)) == bytes(range(256))
    assert tokenizer.decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    assert tokenizer.decode([0xE4, 0xB8]) == "\ufffd"
    everything = tokenizer.decode_bytes(range(tokenizer.vocab_size))
    added = b"<think></think><answer></answer>"
    assert everything == b"".join(tokenizer.coder.ranks) + added
    for outside in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="not in this vocabulary"):
            tokenizer.decode([outside])


def test_lone_surrogates_become_replacement_characters(tokenizer):
    """A lone surrogate encodes as U+FFFD, a pair as the character it spells."""
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("\U0001f600")


def test_layout_of_ids(tokenizer):
    """256 bytes, then merges, then added tokens, then eos, bos, pad: vocab_size counts them all."""
    assert tokenizer.vocab_size == 400 == len(tokenizer.coder.ranks) + 4 + 3
    assert list(tokenizer.coder.added.values()) == [393, 394, 395, 396]
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (397, 398, 399)
    assert all(tokenizer.coder.ranks[bytes([byte])] == byte for byte in range(256))


def test_sample_limit_leaves_out_what_decoding_hides(tokenizer):
    """Below the limit lie eos and every id that decodes to text, and no other control token; in a
    tokenizer made elsewhere only a tail of control tokens and unused ids is cut, eos never."""
    assert tokenizer.sample_limit == tokenizer.eos_id + 1 == 398
    assert all(tokenizer.decode_bytes([i]) for i in range(tokenizer.sample_limit - 1))
    bytes_only = dict.fromkeys(range(256), b"x")
    for control, added, limit in (
        ({"b": 256, "e": 257, "p": 258, "q": 259}, {}, 258),  # b, in between, stays
        ({"e": 256, "b": 257, "p": 300}, {290: b"<x>"}, 291),
        ({"b": 256, "p": 257, "e": 258}, {}, 259),
        ({"e": 256, "b": 257, "p": 258}, {259: b"<x>"}, 260),
    ):
        coder = SimpleNamespace(token_bytes={**bytes_only, **added}, control=control)
        other = Tokenizer(coder, bos="b", eos="e", pad="p", file="{}")
        assert other.sample_limit == limit, control


def test_added_tokens_are_one_id_and_control_tokens_none(tokenizer):
    """<think> in text is its one id; a control token's name in text is spelled out in bytes."""
    ids = tokenizer.encode("a<think>b</think><answer>1</answer>", bos=True, eos=True)
    assert ids == [398, ord("a"), 393, ord("b"), 394, 395, ord("1"), 396, 397]
    assert tokenizer.decode(ids) == "a<think>b</think><answer>1</answer>"
    for name in ("<|bos|>", "<|eos|>", "<|pad|>", "<|eos|><|eos|>", "<<think>|eos|>"):
        ids = tokenizer.encode(f"x{name}y")
        assert max(ids) < 397
        assert tokenizer.decode(ids) == f"x{name}y"
    assert tokenizer.encode("<<think>") == [*tokenizer.encode("<"), 393]
    assert 393 not in tokenizer.encode("< think>")


def test_numbers_and_pieces_are_capped(tokenizer):
    """A token with a digit is digits alone, three at most; long numbers are cut from the left;
    a piece is at most 32 characters; pieces join to the text."""
    for token in tokenizer.coder.ranks:
        if any(byte in b"0123456789" for byte in token):
            assert token.isdigit() and len(token) <= 3
    assert split_text("1234567.89") == ["123", "456", "7", ".", "89"]
    assert split_text("x=12 cats\n\n  ok \u4e2d\u6587ab") == [
        *["x", "=", "12", " cats", "\n\n", " ", " ok", " ", "\u4e2d\u6587", "ab"]
    ]
    rng = random.Random(0)
    for _ in range(500):
        text = wild_text(rng)
        pieces = split_text(text)
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 33  # 32 and the space before


@pytest.mark.parametrize("char", [" ", "a", "1", "\n", "\t", ".", "\u4e2d", "\U0001f600", "\x00"])
def test_a_million_equal_characters(tokenizer, char):
    """Runs that overflow tiktoken's own pattern encode and come back."""
    text = char * 1_000_000
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_training_on_a_long_run():
    """A run of a million letters trains: its pieces are capped like those of encode."""
    trained = Tokenizer.train(["a" * 1_000_000 + " " * 1_000_000], 400)
    assert max(map(len, trained.coder.ranks)) == 32
    assert len(trained.encode("a" * 3200)) == 100


def test_save_and_load_give_the_same_tokenizer(tokenizer, tmp_path):
    """load(save(t)) has t's ids, pieces and control tokens."""
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert isinstance(again.coder, BytePairs) and again.file == tokenizer.file
    assert (again.coder.ranks, again.control) == (tokenizer.coder.ranks, tokenizer.control)
    assert (again.eos_id, again.bos_id, again.pad_id) == (397, 398, 399)
    (tmp_path / "tokenizer_config.json").unlink()  # the default names are found without it
    assert Tokenizer.load(tmp_path).eos_id == 397


def test_ids_equal_the_tokenizers_package(tokenizer, loaded_by_peer):
    """The saved file gives the tokenizers package the same ids, on real and on wild text."""
    rng = random.Random(7)
    texts = [wild_text(rng) for _ in range(10_000)]
    texts += [line for seed in range(50, 60) for line in sample_text(seed).splitlines(True)]
    texts += Path(__file__).read_text().splitlines(True)
    expected = [
        encoding.ids for encoding in loaded_by_peer.encode_batch(texts, add_special_tokens=False)
    ]
    assert [tokenizer.encode(text) for text in texts] == expected
    for ids in expected[:500]:
        assert loaded_by_peer.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)


def test_every_character_splits_as_in_the_tokenizers_package(tokenizer, loaded_by_peer):
    """No character is a letter here and a sign there: classes depend on no Unicode version."""
    texts = character_texts("a{0}1 {0}b")
    expected = [
        encoding.ids for encoding in loaded_by_peer.encode_batch(texts, add_special_tokens=False)
    ]
    assert [tokenizer.encode(text) for text in texts] == expected


def test_ids_equal_on_benchmark_texts(tokenizer, loaded_by_peer):
    """Real questions, English and Chinese: same ids as the tokenizers package, exact round trip."""
    folder = os.environ.get("NANOMATH_DATA")
    if not folder:
        pytest.skip("NANOMATH_DATA is not set")
    names = ("gsm8k_test", "math_test", "cmath_test", "mgsm_zh", "ocw_test", "gaokao_mathqa")
    texts = []
    for name in names:
        lines = (Path(folder) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:400]
        texts += [str(value) for line in lines for value in json.loads(line).values()]
    expected = [
        encoding.ids for encoding in loaded_by_peer.encode_batch(texts, add_special_tokens=False)
    ]
    ours = [tokenizer.encode(text) for text in texts]
    assert ours == expected
    assert [tokenizer.decode(ids) for ids in ours] == texts


def test_loads_what_the_tokenizers_package_trained(tmp_path):
    """A byte-level BPE of another make (GPT-2's split, NFC) loads with the same ids."""
    peer = pytest.importorskip("tokenizers", reason="the tokenizers package is not installed")
    other = peer.Tokenizer(peer.models.BPE())
    other.normalizer = peer.normalizers.NFC()
    other.pre_tokenizer = peer.pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.decoder = peer.decoders.ByteLevel()
    trainer = peer.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|end|>"],
        initial_alphabet=peer.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    other.train_from_iterator([sample_text(seed) for seed in range(10)], trainer)
    other.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": {"content": "<|end|>"}, "eos_token": "<|end|>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    ours = Tokenizer.load(tmp_path)
    assert ours.eos_id == ours.pad_id == 0
    assert (ours.bos_id, ours.encode("", bos=True)) == (0, [])  # named, but put before no text
    assert (ours.vocab_size, ours.file) == (500, (tmp_path / "tokenizer.json").read_text())
    other.encode_special_tokens = True
    common = [chr(code) for code in range(0x250)]
    texts = [sample_text(90), "e\u0301a \u00c5\u212b  1234 it's\n\n x<|end|>", "".join(common)]
    for text in texts:
        assert ours.encode(text) == other.encode(text).ids
        assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFC", text)


def _edit(layout: dict, path: str, value) -> None:
    *parents, last = path.split("/")
    for key in parents:
        layout = layout[int(key) if key.isdigit() else key]
    if value is KeyError:
        del layout[last]
    else:
        layout[int(last) if last.isdigit() else last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model/type", "Unigram"),
        ("model/dropout", 0.5),
        ("model/byte_fallback", True),
        ("model/ignore_merges", True),
        ("model/merges/0", "a b c"),
        ("model/merges/5", ["Q", "Z"]),
        ("model/merges", []),
        ("model/vocab", {"a": 0}),
        ("model/vocab/a", 97.0),
        ("model/vocab/a", 2**31),
        ("model", KeyError),
        ("normalizer", {"type": "NFKC"}),
        ("decoder", None),
        ("truncation", {"max_length": 2}),
        ("pre_tokenizer", None),
        ("pre_tokenizer/pretokenizers/0/behavior", "Removed"),
        ("pre_tokenizer/pretokenizers/0/pattern", {"Regex": "a("}),
        ("pre_tokenizer/pretokenizers/2/add_prefix_space", True),
        ("added_tokens/0/lstrip", True),
        ("added_tokens/0/special", KeyError),
        ("added_tokens/5/id", 1000),
    ],
)
def test_a_changed_file_is_anothers(tokenizer, tmp_path, path, value):
    """A file that differs in one value from what is written here is not taken for ours: either the
    tokenizers package's ids come of it, or one line that names it."""
    peer = pytest.importorskip("tokenizers", reason="the tokenizers package is not installed")
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    layout = json.loads(file.read_text())
    assert isinstance(BytePairs.read(layout), BytePairs)
    _edit(layout, path, value)
    assert BytePairs.read(layout) is None
    file.write_text(json.dumps(layout))
    try:
        changed = Tokenizer.load(tmp_path)
    except ValueError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
        return
    layout["model"]["dropout"] = layout["truncation"] = None  # chance and a limit are left out
    other = peer.Tokenizer.from_str(json.dumps(layout))
    for text in ("the sum\n of 12 numbers", " <think> a \u2460 \u4e2d\u6587 </think>"):
        ids = other.encode(text, add_special_tokens=False).ids
        assert changed.encode(text) == ids
        assert changed.decode(ids) == other.decode(ids, skip_special_tokens=False)


def test_whatever_merges_a_file_lists_its_ids_are_those_of_the_tokenizers_package(
    tokenizer, tmp_path
):
    """Random vocabularies, most of which no training would make: tiktoken, which knows no pairs,
    reads those in which every token is made by its last merge; the package reads the others."""
    peer = pytest.importorskip("tokenizers", reason="the tokenizers package is not installed")
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    layout = json.loads(file.read_text())
    (tmp_path / "generation_config.json").unlink()  # its id of eos will be another
    vocab = layout["model"]["vocab"]
    rng = random.Random(3)
    outcomes = Counter()
    for number in range(400):
        tokens, merges = ["a", "b", "c"], []
        for _ in range(rng.randrange(2, 9)):
            left, right = rng.choice(tokens[number % 3 :]), rng.choice(tokens)
            if left + right not in tokens:
                tokens.append(left + right)
                merges.append(f"{left} {right}")
        if number % 5 == 0:
            merges.insert(0, merges.pop(rng.randrange(len(merges))))
        new = {text: 256 + i for i, text in enumerate(tokens[3:])}
        layout["model"] |= {
            "vocab": {text: i for text, i in vocab.items() if i < 256} | new,
            "merges": merges,
        }
        for i, token in enumerate(layout["added_tokens"]):
            token["id"] = 256 + len(new) + i
        bos = layout["post_processor"]["special_tokens"]["<|bos|>"]
        bos["ids"] = [256 + len(new) + 5]
        file.write_text(json.dumps(layout))
        ours = Tokenizer.load(tmp_path)
        outcomes[type(ours.coder).__name__] += 1
        other = peer.Tokenizer.from_file(str(file))
        texts = ["".join(rng.choices("abc", k=rng.randrange(1, 25))) for _ in range(40)]
        assert [ours.encode(text) for text in texts] == [
            found.ids for found in other.encode_batch(texts, add_special_tokens=False)
        ], merges
    assert len(outcomes) == 2 and min(outcomes.values()) > 50, outcomes


def test_damaged_files_are_named(tokenizer, tmp_path):
    """A missing, cut or foreign file is one error that names it."""
    with pytest.raises(FileNotFoundError, match="nanomath.text.tokenizer"):
        Tokenizer.load(tmp_path / "none")
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"[1]", b"\xff\xfe"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="tokenizer.json: not"):
            Tokenizer.load(tmp_path)


def test_bad_training_input_is_refused():
    """No text and no room are errors."""
    with pytest.raises(ValueError, match="no text"):
        Tokenizer.train([""], 300)
    with pytest.raises(ValueError, match="need 263"):
        Tokenizer.train(["abc"], 262)
    assert Tokenizer.train(["abab" * 3], 1000).vocab_size < 300  # stops when no pair repeats


def _command(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "nanomath.text.tokenizer", *args]
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60)


def test_command_trains_skips_and_refuses(tmp_path):
    """The command trains, says bytes per token, skips when done, refuses other settings."""
    corpus = tmp_path / "corpus.jsonl"
    pages = [json.dumps({"text": sample_text(seed)}) + "\n" for seed in range(40)]
    corpus.write_text("".join(pages))
    flags = ["--corpus", str(corpus), "--out", str(tmp_path / "out"), "--vocab_size"]
    first = _command(*flags, "500")
    assert first.returncode == 0, first.stderr
    assert "500 tokens from" in first.stdout
    trained = Tokenizer.load(tmp_path / "out")
    held_out = [sample_text(seed) for seed in (0, 20)]
    ratio = sum(len(t.encode()) for t in held_out) / sum(len(trained.encode(t)) for t in held_out)
    assert f"{ratio:.3f}".rstrip("0") in first.stdout
    stamp = (tmp_path / "out" / "tokenizer.json").stat().st_mtime_ns
    again = _command(*flags, "500")
    assert again.returncode == 0
    assert "skipped" in again.stdout
    assert (tmp_path / "out" / "tokenizer.json").stat().st_mtime_ns == stamp
    other = _command(*flags, "600")
    assert other.returncode != 0
    assert "remove it or give another --out" in other.stderr
    missing = _command("--corpus", str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "x"))
    assert missing.returncode != 0
    assert (
        missing.stderr.strip()
        == f"--corpus {tmp_path / 'no.jsonl'} is missing; make one with: python build_corpus.py"
    )
    corpus.write_text("nothing\n" * 30)
    damaged = _command("--corpus", str(corpus), "--out", str(tmp_path / "x"))
    assert damaged.returncode != 0
    assert damaged.stderr.strip().splitlines()[-1].startswith("error: 30 of 30 lines are bad")
    assert "Traceback" not in damaged.stderr


def test_numbers_of_the_solutions_are_single_tokens(tmp_path):
    """With --solutions every number they hold is one token; pages alone spell it."""
    corpus, solutions = tmp_path / "corpus.jsonl", tmp_path / "solutions.jsonl"
    pages = [json.dumps({"text": f"Theorem {seed} of the page"}) + "\n" for seed in range(9)]
    corpus.write_text("".join(pages))
    rows = [{"prompt": f"{n} 2 ->\n", "solution": f"{n}+2={n + 2}"} for n in range(10, 48)]
    solutions.write_text("".join(json.dumps(row) + "\n" for row in 3 * rows))
    out = ["--corpus", str(corpus), "--vocab_size", "400", "--out"]
    for folder, flags in (("with", ["--solutions", str(solutions)]), ("without", [])):
        done = _command(*out, str(tmp_path / folder), *flags)
        assert done.returncode == 0, done.stderr
    assert {len(Tokenizer.load(tmp_path / "with").encode(str(n))) for n in range(10, 50)} == {1}
    assert {len(Tokenizer.load(tmp_path / "without").encode(str(n))) for n in range(10, 50)} == {2}
    changed = _command(*out, str(tmp_path / "with"))
    assert "remove it or give another --out" in changed.stderr
    missing = _command(*out, str(tmp_path / "x"), "--solutions", str(tmp_path / "no.jsonl"))
    assert missing.stderr.strip() == f"--solutions {tmp_path / 'no.jsonl'} is missing"


def test_report_speed(record_property):
    """Trains 1 MB to 1,024 tokens; the time is reported, not judged."""
    texts = [sample_text(seed, 2000) for seed in range(100)]
    num_bytes = sum(len(text.encode()) for text in texts)
    start = time.perf_counter()
    trained = Tokenizer.train(texts, 1024)
    train_s = time.perf_counter() - start
    start = time.perf_counter()
    num_tokens = sum(len(trained.encode(text)) for text in texts)
    encode_s = time.perf_counter() - start
    report = f"{num_bytes / 1e6:.1f} MB: train {train_s:.2f} s, encode {encode_s:.2f} s"
    print(f"{report}, {num_bytes / num_tokens:.2f} bytes per token")
    record_property("tokenizer", report)
    assert num_tokens < num_bytes
