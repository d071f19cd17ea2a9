"""Table 1 at small scale: does the recalled corpus beat its seed, and both beat random pages?

    bash speedrun.sh --preset cpu --table1                    every step, the trainings included
    python -m nanomath.measure.table1 --run_dir RUN --write pages     three files to train on
    python -m nanomath.measure.table1 --run_dir RUN --write table     table1.md and table1.json

speedrun.sh pretrains the same model on each file (as many tokens, same tokenizer, same seed) and
tunes each on the same solutions. So that nothing differs but which pages were chosen,

- all are pages of the run's deduplicated web, decontaminated as its corpus was;
- none is on a host of the validation pages: all three are judged on hosts they never saw;
- random pages are drawn until they have as many bytes as the recalled ones. A smaller seed is
  repeated, as in the paper, which trains 150B tokens on OpenWebMath's 13.6B.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nanomath.base.config import one_line_errors, opt, parse
from nanomath.base.files import read_jsonl, write_json, write_text
from nanomath.corpus import decontaminate, recall
from nanomath.corpus.domains import RULES_FILE, UrlRules, host_of
from nanomath.corpus.settings import CorpusConfig
from nanomath.corpus.write import benchmark_texts
from nanomath.data import TokenShards
from nanomath.measure.evaluation import bootstrap_interval, compare, paired_difference
from nanomath.measure.figures import interval, markdown_table
from nanomath.measure.report import read_json
from nanomath.run.load import load_model
from nanomath.text.tokenizer import Tokenizer

NAMES = ("random", "seed", "recalled")  # of the files, and of folders under RUN/table1
NOTES = """\
Bits per byte: {valid_pages} math pages of {valid_hosts} hosts that were never in the seed.
Countdown: {num_problems} held-out problems after the same SFT. 95% intervals over pages and over
problems, differences paired: they say nothing about other training seeds. Each model was pretrained
on {train_tokens:,} tokens, with one seed and the tokenizer of the run's whole corpus. All pages are
decontaminated alike and none is on those hosts; math pages are those of math URLs."""


@dataclass(frozen=True)
class CompareConfig:
    run_dir: str = opt("runs/speedrun-cpu", "folder of a speedrun")
    write: str = opt(
        "table", "pages: the files to train on; table: what came of it", choices=("pages", "table")
    )


# ---------------------------------------------------------------------------------------- pages


def write_pages(run: Path) -> None:
    """Write table1/NAME/pages.jsonl for each of NAMES, then table1/pages.json, their counts."""
    counts_file = run / "table1" / "pages.json"
    if counts_file.exists():
        print(f"{counts_file.parent}: the pages are chosen; remove the folder to choose again")
        return
    read_json(run / "corpus" / "funnel.json")  # the corpus is finished
    settings = read_json(run / "corpus" / "config.json")
    cfg = CorpusConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
    web = recall.Web.load(
        run / "corpus" / "pages.jsonl", UrlRules.load(cfg.url_rules or RULES_FILE)
    )
    pools = page_pools(
        web, cfg, urls(run / "corpus/valid.jsonl"), urls(run / "corpus/corpus.jsonl")
    )
    benchmark = decontaminate.Decontaminator(benchmark_texts(cfg))
    counts: dict[str, dict[str, int]] = {}
    for name, pool_N in pools.items():
        num_bytes = counts["recalled"]["bytes"] if counts else None
        pages, counts[name] = draw_pages(web, pool_N, cfg.seed, benchmark, num_bytes)
        if not pages:
            raise ValueError(f"{run / 'corpus'}: no {name} pages but on the hosts of valid.jsonl")
        path = run / "table1" / name / "pages.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(page, ensure_ascii=False) + "\n" for page in pages))
        print(f"{path}: {counts[name]}")
    write_json(counts_file, counts)


def urls(path: Path) -> set[str]:
    return {row["url"] for _, row in read_jsonl(path, required=("url",))}


def page_pools(
    web: recall.Web, cfg: CorpusConfig, valid: set[str], corpus: set[str]
) -> dict[str, np.ndarray]:
    """Return which pages each file is drawn from, bool [N]; valid and corpus are the run's URLs."""
    held_hosts = {host_of(url) for url in valid}
    free_N = np.array([host not in held_hosts for host in web.hosts])
    seed_N, _ = recall.choose_seed(web, cfg)
    recalled_N = np.array([url in corpus for url in web.urls])
    return {"recalled": recalled_N & free_N, "seed": seed_N & free_N, "random": free_N}


def draw_pages(
    web: recall.Web,
    pool_N: np.ndarray,
    seed: int,
    benchmark: decontaminate.Decontaminator,
    num_bytes: int | None,
) -> tuple[list[dict], dict[str, int]]:
    """Return pages of the pool in random order, contaminated ones left out, and their counts.

    Ends before the first page with which they would hold over num_bytes; None: takes all.
    """
    place = lambda i: recall.unit_hash(web.urls[i], seed, "table 1")
    order = sorted(np.flatnonzero(pool_N), key=place)
    pages, counts = [], {"pages": 0, "bytes": 0, "math_pages": 0, "contaminated": 0}
    for i, page in zip(order, web.pages(order)):
        if benchmark.matches(page["text"]):
            counts["contaminated"] += 1
            continue
        size = len(page["text"].encode("utf-8", "replace"))
        if num_bytes is not None and counts["bytes"] + size > num_bytes:
            break
        pages.append(page)
        counts["pages"] += 1
        counts["bytes"] += size
        counts["math_pages"] += bool(web.math_N[i])
    return pages, counts


# ---------------------------------------------------------------------------------------- table


@torch.no_grad()
def page_bits(model: torch.nn.Module, tokenizer: Tokenizer, texts: list[str]) -> list[float]:
    """Return the code length of each text in bits, alone from its beginning on.

    A text longer than the context is cut into windows of it; a window's first token is the last one
    of the window before, so that every token is scored once.
    """
    device, context = next(model.parameters()).device, model.cfg.max_context
    bits = []
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text, bos=True), device=device)
        nats = 0.0
        for start in range(0, len(ids) - 1, context):
            window_T = ids[start : start + context + 1]
            logits_TV = model(window_T[None, :-1])[0].double()
            nats += float(F.cross_entropy(logits_TV, window_T[1:], reduction="sum"))
        bits.append(nats / math.log(2))
    return bits


def bits_per_byte(bits: list[float], num_bytes: list[int]) -> list[float]:
    """Return one value per page, whose mean is sum(bits) / sum(num_bytes).

    A page counts by how far it lies from that ratio, times its size over the mean size. The mean of
    a resample is then, to first order, the resample's own ratio: pages differ in size.
    """
    size = sum(num_bytes) / len(num_bytes)
    ratio = sum(bits) / sum(num_bytes)
    return [ratio + (b - ratio * n) / size for b, n in zip(bits, num_bytes, strict=True)]


def measure(base: Path, texts: list[str]) -> dict[str, Any]:
    """Return a base model's bits per byte of each text, and what it was trained on."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer, state = load_model(base, device=device)
    cfg = read_json(base / "config.json")
    if state["step"] < cfg["num_steps"]:
        raise ValueError(f"{base} is at step {state['step']} of {cfg['num_steps']}: train it first")
    shards = TokenShards(base / "tokens" / "train")
    rows = cfg["num_steps"] * cfg["batch_size"]
    num_bytes = [len(text.encode("utf-8", "replace")) for text in texts]
    return {
        "values": bits_per_byte(page_bits(model, tokenizer, texts), num_bytes),
        "train_bytes": shards.num_bytes,
        "train_tokens": rows * cfg["context"],
        "epochs": rows / shards.num_windows(cfg["context"]),
    }


def compare_models(run: Path) -> dict[str, Any]:
    """Return table 1 as JSON: by corpus what was trained on, and figures with intervals."""
    counts = read_json(run / "table1" / "pages.json")
    texts = [row["text"] for _, row in read_jsonl(run / "corpus/valid.jsonl", required=("text",))]
    folders = {name: run / "table1" / name / "base" for name in NAMES}
    evals = {name: read_json(run / "table1" / name / "eval.json") for name in NAMES}
    models = {name: measure(folder, texts) for name, folder in folders.items()}
    reference = models["recalled"]["values"]
    rows = {}
    for name, model in models.items():
        values = model.pop("values")
        low, high = bootstrap_interval(values)
        rows[name] = {
            **model,
            **counts[name],
            "bits_per_byte": {"value": sum(values) / len(values), "low": low, "high": high},
            "bits_difference": paired_difference(reference, values, shares=False),
            "greedy": evals[name]["metrics"]["greedy"],
            "greedy_difference": compare(evals["recalled"], evals[name])["greedy"],
        }
    return {
        "rows": rows,
        "valid_pages": len(texts),
        "valid_hosts": len({host_of(url) for url in urls(run / "corpus/valid.jsonl")}),
        "num_problems": evals["recalled"]["num_problems"],
    }


def as_markdown(result: dict[str, Any]) -> str:
    """Lay the table out, with what must be known to read it."""
    rows = []
    for name, row in result["rows"].items():
        cells = [
            name,
            f"{row['train_bytes'] / 1e6:.2f}",
            f"{row['math_pages'] / row['pages']:.0%}",
            f"{row['epochs']:.2f}",
            interval(row["bits_per_byte"], ".3f"),
            interval(row["bits_difference"], "+.3f"),
            interval(row["greedy"]),
            interval(row["greedy_difference"], "+.1%"),
        ]
        if name == "recalled":
            cells[5] = cells[7] = ""
        rows.append(cells)
    header = ["pretrained on", "MB", "math pages", "epochs", "bits per byte", "minus recalled"]
    header += ["Countdown, greedy", "minus recalled"]
    notes = NOTES.format(**result, **result["rows"]["recalled"])
    return f"{markdown_table(header, rows)}\n\n{notes}"


def write_table(run: Path) -> None:
    """Write table1.md and table1.json, and print the first."""
    result = compare_models(run)
    write_json(run / "table1.json", result)
    text = as_markdown(result)
    write_text(run / "table1.md", text + "\n")
    print(text)


def main() -> None:
    cfg = parse(CompareConfig, description=__doc__)
    with one_line_errors():
        {"pages": write_pages, "table": write_table}[cfg.write](Path(cfg.run_dir))


if __name__ == "__main__":
    main()
