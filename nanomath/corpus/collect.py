"""The web a corpus is built from: pages read or parsed, math capped, duplicates dropped."""

import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from nanomath.base.files import open_atomically, read_json, write_json
from nanomath.base.log import progress
from nanomath.corpus import dedup, pages, recall
from nanomath.corpus.domains import UrlRules
from nanomath.corpus.pages import Page, PageCounts
from nanomath.corpus.settings import CorpusConfig
from nanomath.corpus.text import canonical, num_tokens


def collect_pages(cfg: CorpusConfig, rules: UrlRules, run_dir: Path) -> dict:
    """Write pages.jsonl, the deduplicated web, and return what was counted on the way."""
    done = run_dir / "pages.json"
    if done.exists():
        return read_json(done)
    counts = PageCounts()
    raw = run_dir / "raw.jsonl"  # on disk, because the math cap needs all pages to be counted
    source = pages.read_crawl(cfg.pages, counts) if cfg.pages else embedded_web(cfg, counts)
    with open_atomically(raw) as file:
        for page in source:
            file.write(page.to_json() + "\n")
    if counts.cut_pages:
        print(f"{counts.cut_pages} pages cut to {pages.MAX_CRAWL_CHARACTERS} characters")
    limit = 1.0 if cfg.pages else math_limit(raw, rules, cfg)
    with open_atomically(run_dir / "pages.jsonl") as file:
        for page in unique_pages(raw, rules, limit, cfg, counts):
            page["tokens"] = num_tokens(page["text"])
            counts.kept += 1
            counts.tokens += page["tokens"]
            file.write(json.dumps(page, ensure_ascii=False) + "\n")
    raw.unlink()
    write_json(done, asdict(counts))
    return asdict(counts)


def embedded_web(cfg: CorpusConfig, counts: PageCounts) -> Iterator[Page]:
    """Yield the pages of the packages found, parsed by a pool."""
    tasks = []
    for name in cfg.packages:
        root = pages.find_package(name)
        if root is None:
            counts.missing_packages.append(name)
            continue
        tasks += [(name, root, path) for path in pages.source_files(root)]
    if counts.missing_packages:
        print(f"not installed, left out: {', '.join(counts.missing_packages)}")
    with multiprocessing.get_context("spawn").Pool(cfg.num_workers) as pool:
        found = pool.imap(pages.parse_file, tasks, chunksize=16)
        bar = progress(found, total=len(tasks), desc="parsing documentation", unit="file")
        for got, too_short, readable in bar:
            counts.files += 1
            counts.unreadable_files += not readable
            counts.too_short += too_short
            counts.pages += len(got)
            yield from got


def _rows(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _place(page: dict, cfg: CorpusConfig) -> float:
    return recall.unit_hash(page["url"], cfg.seed, "cap")


def math_limit(raw: Path, rules: UrlRules, cfg: CorpusConfig) -> float:
    """Return the hash below which a math page is kept, so that math is as rare as asked."""
    if cfg.math_share >= 1:
        return 1.0
    places, num_other = [], 0
    for page in _rows(raw):
        if rules.is_math(page["url"]):
            places.append(_place(page, cfg))
        else:
            num_other += 1
    num_kept = int(num_other * cfg.math_share / (1 - cfg.math_share))
    return sorted(places)[num_kept] if num_kept < len(places) else 1.0


def unique_pages(
    raw: Path, rules: UrlRules, limit: float, cfg: CorpusConfig, counts: PageCounts
) -> Iterator[dict]:
    """Yield the pages under the math cap that repeat no earlier one, and count the others."""
    urls: set[str] = set()
    near = dedup.NearDuplicates(cfg.min_similarity)
    bar = progress(_rows(raw), total=counts.pages, desc="deduplicating", unit="page")
    for number, page in enumerate(bar):
        key = dedup.url_key(page["url"])
        if rules.is_math(page["url"]) and _place(page, cfg) >= limit:
            counts.capped += 1
        elif key in urls:
            counts.same_url += 1
        else:
            urls.add(key)
            if near.add(number, dedup.minhash(canonical(page["text"]))) is None:
                yield page
            else:
                counts.near_duplicates += 1
