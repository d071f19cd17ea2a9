"""Token shards, packing, weights and JSONL: coverage, masks, counts and clear errors."""

import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanomath import data
from nanomath.base import files as jsonl
from nanomath.base.files import read_examples, read_jsonl
from nanomath.data import (
    PackedExamples,
    TokenShards,
    encode_examples,
    epoch_order,
    write_shards,
)
from nanomath.text.tokenizer import Tokenizer


def write_counting_shards(folder, num_tokens: int, *, vocab_size: int = 70_000, **kwargs) -> dict:
    """Write tokens 0, 1, 2, ... in documents of uneven length."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, num_tokens), size=min(9, num_tokens - 1), replace=False))
    docs = np.split(np.arange(num_tokens), cuts)
    return write_shards(folder, [d.tolist() for d in docs], vocab_size=vocab_size, **kwargs)


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(1000, 2), (65_536, 2), (65_537, 4)])
def test_shards_hold_the_tokens_exactly(tmp_path, vocab_size, itemsize):
    """The row of shards is the documents joined, in uint16 where ids fit, else uint32."""
    rng = np.random.default_rng(1)
    docs = [rng.integers(0, vocab_size, size=n).tolist() for n in (5, 1, 0, 40, 17, 3)]
    docs[3][:2] = [vocab_size - 1, 0]
    index = write_shards(tmp_path / "t", docs, vocab_size=vocab_size, shard_tokens=20)
    sizes = [(tmp_path / "t" / s["name"]).stat().st_size for s in index["shards"]]
    assert sizes == [46 * itemsize, 20 * itemsize]  # a document is never cut
    shards = TokenShards(tmp_path / "t")
    joined = [token for doc in docs for token in doc]
    assert shards.read(0, 10**6).tolist() == joined
    assert shards.read(44, 5).tolist() == joined[44:49]  # across the border
    assert (shards.num_tokens, shards.num_bytes) == (66, None)
    assert shards.vocab_size == vocab_size


@pytest.mark.parametrize(("num_tokens", "context", "batch_size"), [(101, 10, 4), (97, 7, 5)])
def test_every_window_comes_once_per_epoch(tmp_path, num_tokens, context, batch_size):
    """Over each epoch every window, and so every target, comes once; epochs differ in order."""
    write_counting_shards(tmp_path / "t", num_tokens, shard_tokens=13)
    shards = TokenShards(tmp_path / "t")
    num_windows = shards.num_windows(context)
    assert num_windows == (num_tokens - 1) // context
    steps = 3 * num_windows  # batch_size epochs of num_windows rows, thrice
    starts = []
    for step in range(steps):
        tokens_BT = shards.batch(step, batch_size, context, seed=3)
        assert tokens_BT.dtype == torch.int64
        assert tokens_BT.shape == (batch_size, context + 1)
        first_B = tokens_BT[:, :1]
        assert torch.equal(tokens_BT, first_B + torch.arange(context + 1))
        starts += first_B[:, 0].tolist()
    epochs = np.array(starts).reshape(-1, num_windows)
    expected = list(range(0, num_windows * context, context))
    for epoch in epochs:
        assert sorted(epoch) == expected
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_batches_are_a_pure_function_of_seed_and_step(tmp_path):
    """Any step asked for first gives what a run in order gives, in a fresh process too."""
    write_counting_shards(tmp_path / "t", 1001)
    in_order = [TokenShards(tmp_path / "t").batch(step, 6, 20, 5) for step in range(30)]
    data._permutation.cache_clear()
    fresh = TokenShards(tmp_path / "t")
    for step in (29, 3, 17, 0):
        assert torch.equal(fresh.batch(step, 6, 20, 5), in_order[step])
    code = (
        "import sys; from nanomath.data import TokenShards; "
        "print(TokenShards(sys.argv[1]).batch(17, 6, 20, 5).tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "t")]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert json.loads(result.stdout) == in_order[17].tolist()
    assert not torch.equal(fresh.batch(0, 6, 20, 6), in_order[0])


def test_pretraining_weights_are_global(tmp_path):
    """Rows of a rank keep weights 1 / (all tokens of the global batch); the last column is 0."""
    write_counting_shards(tmp_path / "t", 500)
    shards = TokenShards(tmp_path / "t")
    whole = shards.train_batch(2, 6, 16, 0)
    assert whole.weights_BT.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert whole.weights_BT[:, :-1].unique().tolist() == [pytest.approx(1 / 96)]
    assert whole.weights_BT[:, -1].unique().tolist() == [0.0]
    part = whole.rows(slice(1, 3))
    assert torch.equal(part.weights_BT, whole.weights_BT[1:3])
    assert torch.equal(part.tokens_BT, whole.tokens_BT[1:3])
    assert part.segments_BT is None


@pytest.mark.parametrize("num_tokens", [2, 11, 12, 20, 21, 61])
def test_sequential_predicts_every_token_but_the_first_once(tmp_path, num_tokens):
    """Validation windows have each token but the first as target once, the rest included."""
    write_counting_shards(tmp_path / "t", num_tokens)
    rows = list(TokenShards(tmp_path / "t").sequential(10, batch_size=4))
    targets = [token for row_BT in rows for row in row_BT for token in row[1:].tolist()]
    assert targets == list(range(1, num_tokens))
    assert all(row_BT.shape[1] <= 11 and row_BT.shape[0] <= 4 for row_BT in rows)


def test_bits_per_byte_from_the_index(tmp_path):
    """num_bytes is the size of the text in UTF-8, so a uniform model has log2(V) T / bytes."""
    texts = ["the sum of 12 and 30 is 42 <think>\u4e2d\u6587</think>", "\u00e9t\u00e9 \U0001f600"]
    tokenizer = Tokenizer.train(texts, 280)
    docs = [tokenizer.encode(text, bos=True, eos=True) for text in texts]
    counts = tokenizer.token_num_bytes
    write_shards(
        tmp_path / "t",
        docs,
        vocab_size=tokenizer.vocab_size,
        token_num_bytes=counts,
        shard_tokens=9,
    )
    shards = TokenShards(tmp_path / "t")
    assert shards.num_bytes == sum(len(text.encode()) for text in texts)
    nats = sum(math.log(280) * row_BT[:, 1:].numel() for row_BT in shards.sequential(8))
    expected = math.log2(280) * (sum(map(len, docs)) - 1) / shards.num_bytes
    assert nats / math.log(2) / shards.num_bytes == pytest.approx(expected, rel=1e-12)


def test_interrupted_writing_leaves_no_folder(tmp_path):
    """A failure while writing leaves nothing; a finished folder is not overwritten."""

    def documents():
        yield [1, 2, 3]
        raise OSError("disk")

    for bad in (documents(), [[1, 2], [3, 10]], [[-1]], [], [[]]):
        with pytest.raises((OSError, ValueError)):
            write_shards(tmp_path / "t", bad, vocab_size=10)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / ".tmp-t").mkdir()  # what a killed run leaves
    (tmp_path / ".tmp-t" / "shard-00007.bin").write_bytes(b"xx")
    write_shards(tmp_path / "t", [[1, 2, 3]], vocab_size=10)
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["index.json", "shard-00000.bin"]
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    with pytest.raises(FileExistsError, match="remove it"):
        write_shards(tmp_path / "t", [[4]], vocab_size=10)


def test_damaged_shards_are_named(tmp_path):
    """No folder, a cut shard, a path outside, a damaged index: one error that names it."""
    with pytest.raises(FileNotFoundError, match="no token shards"):
        TokenShards(tmp_path / "none")
    folder = tmp_path / "t"
    write_counting_shards(folder, 50)
    index = json.loads((folder / "index.json").read_text())
    with pytest.raises(ValueError, match="lower --context"):
        TokenShards(folder).batch(0, 1, 50, 0)
    (folder / "shard-00000.bin").write_bytes(b"\0" * 198)
    with pytest.raises(ValueError, match="shard-00000.bin: missing or not the 50 tokens"):
        TokenShards(folder)
    (tmp_path / "outside.bin").write_bytes(b"\0" * 200)
    index["shards"][0]["name"] = "../outside.bin"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside.bin: missing"):
        TokenShards(folder)
    for text in ("{", "[]", "{}", json.dumps({**index, "num_tokens": 51})):
        (folder / "index.json").write_text(text)
        with pytest.raises(ValueError, match="index.json: damaged"):
            TokenShards(folder)


def test_flipped_bits_of_a_shard_are_found_and_named(tmp_path):
    """One flipped bit in any shard is found by the rank whose part it is, and named."""
    write_counting_shards(tmp_path / "t", 50, shard_tokens=13)
    shards = TokenShards(tmp_path / "t")
    num_shards = len(list((tmp_path / "t").glob("*.bin")))
    assert num_shards >= 3
    shards.verify()
    for number in range(num_shards):
        path = tmp_path / "t" / f"shard-{number:05d}.bin"
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=f"{path.name}: damaged, its sha256"):
            shards.verify()
        failed = []
        for rank in range(2):
            try:
                TokenShards(tmp_path / "t").verify(slice(rank, None, 2))
            except ValueError:
                failed.append(rank)
        assert failed == [number % 2]
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw)


def test_sources_are_told_apart(tmp_path, monkeypatch):
    """An edit of the same length is seen; a copy under another name and time is the same; a file
    of known size and time is not read again."""
    text, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    vocabulary = tmp_path / "tokenizer.json"
    text.write_text("abcd"), other.write_text("abcd"), vocabulary.write_text("{}")
    known = data.describe_source(text, vocabulary)
    os.utime(other, ns=(5, 5))
    assert data.describe_source(other, vocabulary, known)["sha256"] == known["sha256"]
    other.write_text("abce")
    assert data.describe_source(other, vocabulary, known)["sha256"] != known["sha256"]
    vocabulary.write_text("[]")
    read = []
    monkeypatch.setattr(data, "file_sha256", lambda path: read.append(path) or "x")
    assert data.describe_source(text, vocabulary, known) == {**known, "tokenizer_sha256": "x"}
    assert read == [vocabulary]


def test_epoch_order_spans_epochs():
    """A batch larger than an epoch takes whole epochs in turn and the rest of the next."""
    order = np.concatenate([epoch_order(5, step, 12, seed=1) for step in range(5)])
    for epoch in order.reshape(-1, 5):
        assert sorted(epoch) == [0, 1, 2, 3, 4]
    assert order.reshape(-1, 5).tolist() == [
        epoch_order(5, epoch, 5, seed=1).tolist() for epoch in range(12)
    ]


def random_examples(num: int, seed: int = 0, longest: int = 14):
    """Examples whose ids tell which example and place they come from: 1000 * (i + 1) + place."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(num):
        prompt, solution = rng.integers(1, longest), rng.integers(1, longest)
        ids = [1000 * (i + 1) + place for place in range(prompt + solution)]
        examples.append((ids[:prompt], ids[prompt:]))
    return examples


def test_packed_rows_hold_every_example_once_and_whole():
    """Each example lies once, whole and in order, in one segment; positions restart; the rest is
    padding in segment 0."""
    examples = random_examples(60)
    packed = PackedExamples(examples, 40, seed=2, pad_id=7)
    seen = {}
    for row in range(packed.num_rows):
        segments = packed.segments_RT[row]
        assert segments[segments > 0].tolist() == sorted(segments[segments > 0])
        assert np.all(segments[np.argmin(segments) :] == 0) or segments.min() > 0
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            tokens = packed.tokens_RT[row][inside].tolist()
            seen[tokens[0] // 1000 - 1] = tokens
            assert packed.positions_RT[row][inside].tolist() == list(range(len(tokens)))
        assert set(packed.tokens_RT[row][segments == 0]) <= {7}
        assert set(packed.positions_RT[row][segments == 0]) <= {0}
    assert seen == {i: [*prompt, *solution] for i, (prompt, solution) in enumerate(examples)}
    assert sorted(i for members in packed.members for i in members) == list(range(60))
    assert packed.dropped == []


def test_loss_is_on_solution_tokens_of_the_same_example_only():
    """Trained positions are those whose next token is a solution token of their own example: the
    first from the prompt's end, the EOS included, never across examples."""
    examples = random_examples(60, seed=4)
    packed = PackedExamples(examples, 40, seed=2)
    targets = []
    for row, column in zip(*np.nonzero(packed.trained_RT)):
        assert packed.segments_RT[row, column] == packed.segments_RT[row, column + 1] > 0
        targets.append(int(packed.tokens_RT[row, column + 1]))
    assert sorted(targets) == sorted(token for _, solution in examples for token in solution)
    assert not packed.trained_RT[:, -1].any()


def test_one_packed_row_by_hand():
    """Two examples of a row, written out number by number."""
    packed = PackedExamples([([1, 2], [3, 4, 9]), ([5], [6, 9])], 10, seed=0)
    batch = packed.batch(0, 1, seed=0)
    first = [[1, 2, 3, 4, 9], [5, 6, 9]]
    order = packed.members[0]
    assert batch.tokens_BT.tolist() == [[*first[order[0]], *first[order[1]], 0, 0]]
    if order == [0, 1]:
        segments, positions = [1, 1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 1, 2, 3, 4, 0, 1, 2, 0, 0]
        trained = [0, 1, 1, 1, 0, 1, 1, 0, 0, 0]
    else:
        segments, positions = [1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [0, 1, 2, 0, 1, 2, 3, 4, 0, 0]
        trained = [1, 1, 0, 0, 1, 1, 1, 0, 0, 0]
    assert batch.segments_BT.tolist() == [segments]
    assert batch.positions_BT.tolist() == [positions]
    assert torch.equal(batch.weights_BT, torch.tensor([trained]) / 5)


def test_example_without_prompt_trains_no_first_token():
    """Without a prompt nothing stands before the first solution token, so it is no target."""
    packed = PackedExamples([([], [11, 12, 13]), ([], [21, 22, 23])], 6, seed=0)
    assert packed.trained_RT.tolist() == [[True, True, False, True, True, False]]
    dropped = PackedExamples([([], [11]), ([1], []), ([1], [2])], 6, seed=0).dropped
    assert dropped == [(0, 1), (1, 1)]


def test_too_long_examples_are_dropped_counted_and_named():
    """An example longer than the context is left out and named; one that just fits is kept."""
    examples = [([1] * 4, [2] * 4), ([1] * 4, [2] * 5), ([1], [2] * 30)]
    packed = PackedExamples(examples, 8)
    assert packed.dropped == [(1, 9), (2, 31)]
    assert packed.members == [[0]]
    assert (
        "2 dropped, too long or nothing to train: 1 (9 tokens), 2 (31 tokens)" in packed.summary()
    )
    assert "1 examples in 1 rows of 8 tokens, 100.0% full" in packed.summary()
    with pytest.raises(ValueError, match="none of 3 examples fits a context of 7"):
        PackedExamples(examples, 7)


def test_packed_batches_cover_rows_and_weights_sum_to_one():
    """Every row comes once per epoch; weights are 1 / (trained tokens of the global batch) before
    ranks slice, on trained positions only; any step can be asked for first."""
    packed = PackedExamples(random_examples(90, seed=5), 40, seed=1)
    batch_size, seen = 4, []
    batches = [packed.batch(step, batch_size, seed=9) for step in range(packed.num_rows)]
    for step, batch in enumerate(batches):
        order = epoch_order(packed.num_rows, step, batch_size, 9)
        seen += order.tolist()
        num_trained = packed.trained_RT[order].sum()
        expected_BT = packed.trained_RT[order] / num_trained
        assert np.abs(batch.weights_BT.numpy() - expected_BT).max() < 1e-9
        assert batch.weights_BT.double().sum().item() == pytest.approx(1.0, abs=1e-6)
        assert np.array_equal(batch.tokens_BT.numpy(), packed.tokens_RT[order])
        part = batch.rows(slice(2, 4))
        for name in ("tokens_BT", "weights_BT", "segments_BT", "positions_BT"):
            assert torch.equal(getattr(part, name), getattr(batch, name)[2:4])
    for epoch in np.array(seen).reshape(-1, packed.num_rows):
        assert sorted(epoch) == list(range(packed.num_rows))
    again = PackedExamples(random_examples(90, seed=5), 40, seed=1)
    assert torch.equal(again.batch(7, 4, seed=9).tokens_BT, batches[7].tokens_BT)
    assert PackedExamples(random_examples(90, seed=5), 40, seed=2).members != packed.members


def test_packing_wastes_little():
    """Rows of short examples are at least 95% full, and neighbours are random, not sorted."""
    examples = random_examples(2000, seed=6, longest=40)
    packed = PackedExamples(examples, 256, seed=0)
    fill = sum(len(p) + len(s) for p, s in examples) / (packed.num_rows * 256)
    assert fill > 0.95
    lengths = [np.mean([len(examples[i][0]) for i in m]) for m in packed.members if len(m) > 3]
    assert np.std(lengths) < 8


def test_encoded_examples_end_in_eos():
    """Prompts start with bos, solutions end with eos, and the two are encoded apart."""
    tokenizer = Tokenizer.train(["ab ab ab"], 264)
    pairs = encode_examples(tokenizer, [("a", "b"), ("", "ab")])
    assert pairs[0] == ([tokenizer.bos_id, ord("a")], [ord("b"), tokenizer.eos_id])
    assert pairs[1] == ([tokenizer.bos_id], [*tokenizer.encode("ab"), tokenizer.eos_id])


def test_jsonl_numbers_lines_and_forgives_harmless_things(tmp_path):
    """Line numbers count from 1 with blank lines; BOM, CRLF, escaped NUL and gzip are read."""
    body = b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": "\\u0000\xe4\xb8\xad"}\n{"a": 3}'
    (tmp_path / "x.jsonl").write_bytes(body)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(body))
    expected = [(1, {"a": 1}), (3, {"a": "\0\u4e2d"}), (4, {"a": 3})]
    assert list(read_jsonl(tmp_path / "x.jsonl")) == expected
    assert list(read_jsonl(tmp_path / "x.jsonl.gz")) == expected


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": ', "not JSON"),
        (b'{"text": "a\0b"}', "a NUL byte, not JSON"),
        (b'{"text": "\xff"}', "not UTF-8 (byte 10)"),
        (b'["text"]', "not a JSON object"),
        (b'{"text": 5}', "no text under 'text'; it has ['text']"),
        (b'{"title": "x"}', "no text under 'text'; it has ['title']"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "' + b"a" * 5000 + b'"}', "longer than"),
    ],
)
def test_bad_lines_are_named_skipped_and_limited(tmp_path, capsys, monkeypatch, line, problem):
    """One bad line in 200 is skipped and named on stderr; where it is too much, the file is
    refused with the first bad line named."""
    path = tmp_path / "x.jsonl"
    limit = 4096 if problem == "longer than" else jsonl.MAX_LINE_BYTES
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", limit)
    good = [json.dumps({"text": str(i)}).encode() for i in range(200)]
    path.write_bytes(b"\n".join([*good[:50], line, *good[50:]]))
    rows = list(read_jsonl(path, required=("text",)))
    assert [row["text"] for _, row in rows] == [str(i) for i in range(200)]
    assert [number for number, _ in rows] == [*range(1, 51), *range(52, 202)]
    said = capsys.readouterr().err
    assert "skipped 1 of 201 lines" in said
    assert f"{path}:51: {problem}" in said
    with pytest.raises(ValueError, match="1 of 201 lines are bad, more than 0.1%") as caught:
        list(read_jsonl(path, required=("text",), max_bad_fraction=0.001))
    assert f"{path}:51: {problem}" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_bad_files_are_refused(tmp_path):
    """Missing, empty, UTF-16, truncated gzip and wholly bad files are one error each."""
    path = tmp_path / "x.jsonl"
    with pytest.raises(FileNotFoundError, match="missing"):
        list(read_jsonl(path))
    for content, message in (
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        ("\ufeff{}".encode("utf-16-le"), r"1 of 1 lines are bad.*: not UTF-8 \(byte 0\)"),
        (b"text\n" * 5000, "1000 of 1000 lines are bad"),  # it stops reading early
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(read_jsonl(path))
    packed = gzip.compress(b'{"a": 1}\n' * 1000)
    (tmp_path / "x.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match="damaged gzip"):
        list(read_jsonl(tmp_path / "x.jsonl.gz"))
    (tmp_path / "y.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="damaged gzip"):
        list(read_jsonl(tmp_path / "y.jsonl.gz"))


@pytest.mark.parametrize("keys", jsonl.EXAMPLE_KEYS)
def test_examples_of_three_layouts(tmp_path, keys):
    """prompt/solution, question/answer and problem/solution are read; others are refused."""
    path = tmp_path / "x.jsonl"
    rows = [{keys[0]: f"q{i}", keys[1]: f"s{i}", "level": 3} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_examples(path) == [("q0", "s0"), ("q1", "s1"), ("q2", "s2")]
    path.write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match="wanted prompt/solution or question/answer or problem"):
        read_examples(path)
    path.write_text("x\n")
    with pytest.raises(ValueError, match="1 of 1 lines are bad"):
        read_examples(path)
