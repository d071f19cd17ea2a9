"""The web a corpus is built from: pages read or parsed, math capped, duplicates dropped."""

import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from nanomath.base.files import open_atomically, write_json
from nanomath.base.log import progress
from nanomath.corpus import dedup, recall
from nanomath.corpus.domains import UrlRules
from nanomath.corpus.pages import (
    MAX_CRAWL_CHARACTERS,
    Page,
    PageCounts,
    find_package,
    parse_file,
    read_jsonl,
    source_files,
)
from nanomath.corpus.settings import CorpusConfig
from nanomath.corpus.text import canonical, num_tokens


def collect_pages(cfg: CorpusConfig, rules: UrlRules, run_dir: Path) -> dict:
    """Write pages.jsonl, the deduplicated web, and return what was counted on the way."""
    done = run_dir / "pages.json"
    raw = run_dir / "raw.jsonl"
    if done.exists():
        raw.unlink(missing_ok=True)  # a kill may have come before the line that removes it
        return json.loads(done.read_text(encoding="utf-8"))
    counts = PageCounts()
    if not raw.exists() or not (run_dir / "raw.json").exists():
        source = read_jsonl(cfg.pages, counts) if cfg.pages else embedded_web(cfg, counts)
        with open_atomically(raw) as file:
            for page in source:
                file.write(page.to_json() + "\n")
        write_json(run_dir / "raw.json", asdict(counts))
    steps = json.loads((run_dir / "raw.json").read_text(encoding="utf-8"))
    for example in steps["bad_line_examples"]:
        print(f"skipped: {example}")
    if steps["cut_pages"]:
        print(f"{steps['cut_pages']} pages cut to {MAX_CRAWL_CHARACTERS} characters")
    steps |= {"capped": 0, "same_url": 0, "near_duplicates": 0, "kept": 0, "tokens": 0}
    limit = None if cfg.pages else math_limit(raw, rules, cfg)
    with open_atomically(run_dir / "pages.jsonl") as file:
        for page in unique_pages(raw, rules, limit, cfg, steps):
            page["tokens"] = num_tokens(page["text"])
            steps["kept"] += 1
            steps["tokens"] += page["tokens"]
            file.write(json.dumps(page, ensure_ascii=False) + "\n")
    write_json(done, steps)
    raw.unlink()
    return steps


def embedded_web(cfg: CorpusConfig, counts: PageCounts) -> Iterator[Page]:
    """Yield the pages of the packages found, parsed by a pool."""
    tasks = []
    for name in cfg.packages:
        root = find_package(name)
        if root is None:
            counts.missing_packages.append(name)
            continue
        tasks += [(name, root, path) for path in source_files(root)]
    if counts.missing_packages:
        print(f"not installed, left out: {', '.join(counts.missing_packages)}")
    with multiprocessing.get_context("spawn").Pool(cfg.num_workers) as pool:
        found = pool.imap(parse_file, tasks, chunksize=16)
        for got, too_short, readable in progress(
            found, total=len(tasks), desc="parsing documentation", unit="file"
        ):
            counts.files += 1
            counts.unreadable_files += not readable
            counts.too_short += too_short
            counts.pages += len(got)
            yield from got


def _rows(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def math_limit(raw: Path, rules: UrlRules, cfg: CorpusConfig) -> float:
    """Return the hash below which a math page is kept, so that math is as rare as asked."""
    places, num_other = [], 0
    for page in _rows(raw):
        if rules.is_math(page["url"]):
            places.append(recall.unit_hash(page["url"], cfg.seed, "cap"))
        else:
            num_other += 1
    if cfg.math_share >= 1:
        return 1.0
    num_kept = int(num_other * cfg.math_share / (1 - cfg.math_share))
    return sorted(places)[num_kept] if num_kept < len(places) else 1.0


def unique_pages(
    raw: Path, rules: UrlRules, limit: float | None, cfg: CorpusConfig, steps: dict
) -> Iterator[dict]:
    """Yield the pages under the math cap that repeat no earlier one; count the others in steps."""
    urls: set[str] = set()
    near = dedup.NearDuplicates(cfg.min_similarity)
    for number, page in enumerate(
        progress(_rows(raw), total=steps["pages"], desc="deduplicating", unit="page")
    ):
        capped = limit is not None and rules.is_math(page["url"])
        if capped and recall.unit_hash(page["url"], cfg.seed, "cap") >= limit:
            steps["capped"] += 1
            continue
        key = dedup.url_key(page["url"])
        if key in urls:
            steps["same_url"] += 1
            continue
        urls.add(key)
        if near.add(number, dedup.minhash(canonical(page["text"]))) is not None:
            steps["near_duplicates"] += 1
            continue
        yield page
