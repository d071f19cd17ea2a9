"""Table 1: which pages the three files hold, and its bits per byte."""

import json
import math

import numpy as np
import pytest
import torch

from nanomath.base.config import to_json
from nanomath.base.files import write_json
from nanomath.corpus import decontaminate, recall
from nanomath.corpus.settings import CorpusConfig
from nanomath.measure import table1
from nanomath.model import ModelConfig, Transformer
from nanomath.text.tokenizer import Tokenizer


def page(host: str, number: int, *, text: str = "") -> dict:
    text = text or f"page {number} of {host} " + "word " * (number % 7)
    return {"url": f"https://{host}/{number}", "text": text, "tokens": 5}


def write_rows(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    """A finished corpus: two math hosts known, one held out, one host of other things."""
    hosts = [f"m{i}.math" for i in range(12)] + ["other.web"]
    pages = [page(host, number) for host in hosts for number in range(20)]
    (tmp_path / "rules.tsv").write_text("*.math\t/\t+\n")
    cfg = CorpusConfig(url_rules=str(tmp_path / "rules.tsv"), num_heldout=3, seed=4)
    corpus = tmp_path / "run" / "corpus"
    write_rows(corpus / "pages.jsonl", pages)
    web = recall.Web.load(corpus / "pages.jsonl", table1.UrlRules.load(tmp_path / "rules.tsv"))
    _, never_N = recall.choose_seed(web, cfg)
    never = sorted({host for host, held in zip(web.hosts, never_N) if held})
    assert len(never) > 1  # one validates, pages of the other may be recalled
    write_rows(corpus / "valid.jsonl", [p for p in pages if never[0] in p["url"]][:5])
    write_rows(corpus / "corpus.jsonl", pages[5:250:2])
    write_json(corpus / "config.json", to_json(cfg))
    write_json(corpus / "funnel.json", {"corpus": {}})
    return tmp_path / "run", never[0], pages


def files(run) -> dict[str, list[dict]]:
    lines = {n: (run / "table1" / n / "pages.jsonl").read_text() for n in table1.NAMES}
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in lines.items()}


def test_pages_are_on_no_validation_host(run, capsys):
    """Recalled: the corpus' pages but those on validation hosts. Seed: the first round's.
    Random: pages of all kinds of hosts, by bytes at most as many. The same twice."""
    folder, held, pages = run
    table1.write_pages(folder)
    found = files(folder)
    for name, rows in found.items():
        assert all(held not in row["url"] for row in rows), name
        assert len({row["url"] for row in rows}) == len(rows) > 0
    corpus = table1.urls(folder / "corpus" / "corpus.jsonl")
    expected = {p["url"] for p in pages if p["url"] in corpus and held not in p["url"]}
    assert {row["url"] for row in found["recalled"]} == expected
    assert all(".math" in row["url"] for row in found["seed"])
    assert {".math" in row["url"] for row in found["random"]} == {True, False}
    sizes = {name: sum(len(row["text"]) for row in rows) for name, rows in found.items()}
    longest = max(len(p["text"]) for p in pages)
    assert sizes["recalled"] - longest < sizes["random"] <= sizes["recalled"]
    counts = json.loads((folder / "table1" / "pages.json").read_text())
    for name, rows in found.items():
        assert counts[name] == {
            "pages": len(rows),
            "bytes": sizes[name],
            "math_pages": sum(".math" in row["url"] for row in rows),
            "contaminated": 0,
        }
    assert "the pages are chosen" not in capsys.readouterr().out
    table1.write_pages(folder)
    assert "the pages are chosen" in capsys.readouterr().out
    (folder / "table1" / "pages.json").unlink()
    table1.write_pages(folder)
    assert files(folder) == found


def test_contaminated_pages_are_dropped_and_counted(run):
    """A page with a benchmark's text is in no file, and does not count as bytes."""
    folder, _, pages = run
    web = recall.Web.load(
        folder / "corpus" / "pages.jsonl",
        table1.UrlRules.load(folder.parent / "rules.tsv"),
    )
    text = decontaminate.BenchmarkText("b", pages[7]["text"])
    index = decontaminate.Decontaminator([text])
    pool_N = np.arange(len(web)) < 20
    kept, counts = table1.draw_pages(web, pool_N, 0, index, None)
    assert counts["contaminated"] == 1 and counts["pages"] == len(kept) == 19
    assert pages[7] not in kept
    assert counts["bytes"] == sum(len(p["text"]) for p in pages[:20]) - len(pages[7]["text"])


def test_bits_are_those_of_each_token_after_its_window(monkeypatch):
    """A text's bits are the sum over tokens of the model's own log2, in windows that share one
    token; a text of one token beyond the window included."""
    tokenizer = Tokenizer.train(["one two three four 1 2 3"] * 3, 270)
    model = Transformer(ModelConfig(tokenizer.vocab_size, 1, 16, 2, 2, 32, max_context=8))
    model.init_weights(0)
    model = model.double()
    texts = ["one", "one two three four one two", "1 2 3 four five six seven eight nine ten"]
    ids = [tokenizer.encode(text, bos=True) for text in texts]
    assert min(map(len, ids)) <= 8 < max(map(len, ids))
    for tokens, bits in zip(ids, table1.page_bits(model, tokenizer, texts)):
        nats = 0.0
        for target in range(1, len(tokens)):
            start = (target - 1) // 8 * 8
            logits_TV = model(torch.tensor([tokens[start:target]]))[0]
            nats -= torch.log_softmax(logits_TV.double(), -1)[-1, tokens[target]].item()
        assert bits == pytest.approx(nats / math.log(2), rel=1e-9)


def test_values_of_pages_have_the_ratio_as_mean_and_its_spread():
    """Their mean is all bits over all bytes; pages at that same ratio have no spread, whatever
    their sizes; one page's distance counts by its size."""
    values = table1.bits_per_byte([2.0, 20.0, 6.0], [1, 10, 3])
    assert values == [2.0, 2.0, 2.0]
    values = table1.bits_per_byte([6.0, 6.0], [1, 5])
    # The ratio is 2; the pages are 4 above and 4 below it, over a mean size of 3.
    assert values == pytest.approx([2 + 4 / 3, 2 - 4 / 3], abs=1e-12)


def write_evaluation(path, num_right: int) -> None:
    """Write an evaluation of four problems, so many of them right."""
    rows = [
        {"id": i, "greedy_correct": i < num_right, "correct": [], "classes": []} for i in range(4)
    ]
    greedy = dict.fromkeys(("value", "low", "high"), num_right / 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"num_problems": 4, "num_samples": 0, "metrics": {"greedy": greedy}, "problems": rows}
    write_json(path, result)


def test_differences_are_those_to_the_recalled_corpus(run, monkeypatch):
    """Bits and accuracy of each row less the recalled corpus': a worse corpus has more bits and a
    lower accuracy."""
    folder, held, _ = run
    bits = {"random": 3.0, "seed": 2.5, "recalled": 2.0}
    right = {"random": 0, "seed": 1, "recalled": 2}
    table = folder / "table1"
    for name in table1.NAMES:
        write_evaluation(table / name / "eval.json", right[name])
    counts = {"pages": 4, "bytes": 9, "math_pages": 1, "contaminated": 0}
    write_json(table / "pages.json", dict.fromkeys(table1.NAMES, counts))

    def measure(base, texts):
        trained = {"train_bytes": 2_000_000, "train_tokens": 4096, "epochs": 1.5}
        return {"values": [bits[base.parent.name]] * len(texts), **trained}

    monkeypatch.setattr(table1, "measure", measure)
    result = table1.compare_models(folder)
    assert list(result["rows"]) == [*table1.NAMES]
    for name, row in zip(bits, result["rows"].values(), strict=True):
        assert row["bits_per_byte"] == dict.fromkeys(("value", "low", "high"), bits[name])
        assert row["bits_difference"]["value"] == bits[name] - 2.0
        assert row["greedy_difference"]["value"] == (right[name] - 2) / 4
    sizes = [result[key] for key in ("valid_pages", "valid_hosts", "num_problems")]
    assert sizes == [5, 1, 4]
    text = table1.as_markdown(result)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    random, _, recalled = lines[2:5]
    assert random[:4] == ["random", "2.00", "25%", "1.50"]
    assert random[5] == "+1.000 [+1.000, +1.000]" and random[7].startswith("-50.0%")
    assert recalled[5] == recalled[7] == ""
    assert "5 math pages of 1 hosts" in text
