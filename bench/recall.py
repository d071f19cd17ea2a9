"""Measure the recall loop of Sec. 2.1 on real documentation: each folder is a host of HTML pages.

    python bench/recall.py --docs FOLDER --math sympy gap maxima --seed_hosts statsmodels

FOLDER/HOST/**/*.html are the pages of HOST; Linux distributions and PyPI's source archives have
such folders by the hundred. --math names the hosts of mathematics, which is the truth that
precision and recall are counted against; --seed_hosts gives the first seed and is not in the web.
The budget grows from 0.4 to 1.0 of the tokens of mathematics that there are. "New hosts" are hosts
of mathematics, a third of them, whose pages never join the seed.
"""

import argparse
import html.parser
import json
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanomath.corpus import dedup, recall  # noqa: E402
from nanomath.corpus.domains import UrlRules  # noqa: E402
from nanomath.corpus.settings import CorpusConfig  # noqa: E402
from nanomath.corpus.text import canonical, num_tokens  # noqa: E402


class Text(html.parser.HTMLParser):
    """The text of a page, without scripts, styles and navigation."""

    SKIPPED = ("script", "style", "nav", "header", "footer")

    def __init__(self):
        super().__init__()
        self.parts, self.depth = [], 0

    def handle_starttag(self, tag, attrs):
        self.depth += tag in self.SKIPPED

    def handle_endtag(self, tag):
        self.depth -= tag in self.SKIPPED and self.depth > 0

    def handle_data(self, data):
        if not self.depth:
            self.parts.append(data)


def page_text(path: Path) -> str:
    parser = Text()
    parser.feed(path.read_bytes()[:400_000].decode("utf-8", "replace"))
    return re.sub(r"\s+", " ", " ".join(parser.parts)).strip()


def host_pages(folder: Path, most: int) -> list[dict]:
    """Return at most `most` pages of a host, chosen by their paths' hashes, none twice."""
    pages, near = [], dedup.NearDuplicates(0.8)
    paths = sorted(folder.rglob("*.html"), key=lambda p: recall.unit_hash(p.name, 0, str(folder)))
    for path in paths:
        text = page_text(path) if len(pages) < most and path.is_file() else ""
        if len(text) < 300 or near.add(len(pages), dedup.minhash(canonical(text))) is not None:
            continue
        url = f"https://{folder.name}/{path.relative_to(folder)}"
        pages.append({"url": url, "text": text, "tokens": num_tokens(text)})
    return pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs", type=Path, required=True)
    parser.add_argument("--math", nargs="+", required=True)
    parser.add_argument("--seed_hosts", nargs="+", required=True)
    parser.add_argument("--most", type=int, default=400, help="pages of a host")
    parser.add_argument("--num_seed", type=int, default=80, help="pages of the first seed")
    parser.add_argument("--seeds", type=int, default=3, help="runs with different draws")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        web_file = Path(folder) / "pages.jsonl"
        with open(web_file, "w", encoding="utf-8") as file:
            for host in sorted(path for path in args.docs.iterdir() if path.is_dir()):
                if host.name not in args.seed_hosts:
                    file.writelines(json.dumps(page) + "\n" for page in host_pages(host, args.most))
        rules_file = Path(folder) / "rules.tsv"
        rules_file.write_text("".join(f"{host}\t/\t+\n" for host in args.math))
        rules = UrlRules.load(rules_file)
        web = recall.Web.load(web_file, rules)
        seed_pages = [host_pages(args.docs / h, args.num_seed) for h in args.seed_hosts]
        share = args.num_seed // len(seed_pages)
        extra = [page["text"] for pages in seed_pages for page in pages[:share]]
        new_hosts = sorted(args.math, key=lambda h: recall.unit_hash(h, 0, "new"))
        new_hosts = new_hosts[: len(args.math) // 3]
        print(
            f"{len(web)} pages on {len({*web.hosts})} hosts, {int(web.math_N.sum())} of "
            f"mathematics on {len(args.math)}; {len(extra)} seed pages; new hosts: {new_hosts}"
        )
        never_N = web.math_N & np.isin(web.hosts, new_hosts)
        whole = int(web.tokens_N[web.math_N].sum())
        budgets = tuple(int(part * whole) for part in (0.4, 0.6, 0.8, 1.0))
        cfg = CorpusConfig(
            num_positives=2000, num_negatives=1500, budgets=budgets, stop_overlap=2.0,
            dim=64, lr=1.0, buckets=200_000,
        )  # fmt: skip
        rows = []
        for seed in range(args.seeds):
            seed_N = before_N = np.zeros(len(web), bool)
            for number in range(1, len(budgets) + 1):
                collected_N, seed_N, row = recall.run_round(
                    Path(folder) / f"{seed}-{number}", web, replace(cfg, seed=seed), number,
                    seed_N, never_N, before_N, extra,
                )  # fmt: skip
                before_N = before_N | collected_N
                rows.append((number, row))
        for number in range(1, len(budgets) + 1):
            mean = lambda name, n=number: np.mean([r[name] for k, r in rows if k == n])
            print(
                f"round {number}: precision {mean('precision'):.2f}, recall {mean('recall'):.2f}, "
                f"on new hosts {mean('recall_never_seeded'):.2f}, joining {mean('joining'):.0f}"
            )


if __name__ == "__main__":
    main()
