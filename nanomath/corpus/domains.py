"""Domain discovery (Sec. 2.1, step 4): hosts that hold much mathematics, and rules for their URLs.

A domain is all pages of one host. Where more than 10% of a host's pages were collected it is taken
for math-related, and a person says which of its URLs hold mathematics. That person is a text file
of rules, `url_rules.tsv`, made to be read and changed; each round writes the hosts it would like
judged to domains.tsv.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import numpy as np

RULES_FILE = Path(__file__).with_name("url_rules.tsv")


def host_of(url: str) -> str:
    """Return the host name of a URL, the paper's "base URL"; "" where there is none.

    Raises ValueError where urlsplit cannot read the URL; pages.py lets no such page in.
    """
    return urlsplit(url).hostname or ""


@dataclass(frozen=True)
class UrlRules:
    """host -> [(path prefix, is math)], longest prefix first; `*.rest` stands for any host."""

    by_host: dict[str, tuple[tuple[str, bool], ...]]

    @classmethod
    def load(cls, path: str | Path) -> "UrlRules":
        """Read host<TAB>path prefix<TAB>+ or -; # begins a comment line.

        Raises ValueError naming file and line.
        """
        rules: dict[str, list[tuple[str, bool]]] = {}
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip() or line.startswith("#"):
                    continue
                columns = line.rstrip("\n").split("\t")
                if len(columns) != 3 or columns[2] not in ("+", "-"):
                    raise ValueError(
                        f"{path}:{number}: {line!r} is not host<TAB>path prefix<TAB>+ or -"
                    )
                host, prefix, sign = columns
                rules.setdefault(host.lower(), []).append((prefix, sign == "+"))
        return cls({host: tuple(sorted(r, key=lambda x: -len(x[0]))) for host, r in rules.items()})

    def is_math(self, url: str) -> bool:
        """Say whether the rules take this page for mathematics."""
        host = host_of(url)
        path = urlsplit(url).path or "/"
        suffixes = host.split(".")
        for key in [host, *("*." + ".".join(suffixes[i:]) for i in range(1, len(suffixes)))]:
            for prefix, is_math in self.by_host.get(key, ()):
                if path.startswith(prefix):
                    return is_math
        return False


@dataclass(frozen=True)
class Domain:
    """A host over the threshold."""

    host: str
    num_pages: int
    num_collected: int
    mean_score: float


def discover(
    hosts: Sequence[str],
    collected_N: np.ndarray,
    scores_N: np.ndarray,
    min_share: float = 0.1,  # Sec. 2.1
) -> list[Domain]:
    """Return the hosts with more than min_share of their pages collected, by name."""
    pages, hits, scores = Counter(hosts), Counter(), Counter()
    for host, hit, score in zip(hosts, collected_N, scores_N):
        hits[host] += int(hit)
        scores[host] += float(score)
    limit = Fraction(str(min_share))  # 0.1 * n in floating point is not n / 10
    return [
        Domain(host, pages[host], hits[host], scores[host] / pages[host])
        for host in sorted(pages)
        if host and hits[host] > limit * pages[host]
    ]


def write_candidates(
    file: IO[str],
    urls: Sequence[str],
    hosts: Sequence[str],
    collected_N: np.ndarray,
    joins_N: np.ndarray,
    domains: Iterable[Domain],
) -> None:
    """Write the table an annotator reads, tab-separated: one row per domain, after a heading."""
    prefixes: dict[str, Counter] = {domain.host: Counter() for domain in domains}
    examples: dict[str, str] = {}
    joining = Counter(host for host, joins in zip(hosts, joins_N) if joins)
    for url, host, hit in zip(urls, hosts, collected_N):
        if hit and host in prefixes:
            prefixes[host]["/" + urlsplit(url).path.strip("/").partition("/")[0]] += 1
            examples.setdefault(host, url)
    table = csv.writer(file, delimiter="\t", lineterminator="\n")
    heading = "host pages collected share score joining prefixes example"
    table.writerow(heading.split())
    for domain in domains:
        host = domain.host
        top = sorted(prefixes[host].items(), key=lambda x: (-x[1], x[0]))[:3]
        shown = " ".join(f"{prefix}:{count}" for prefix, count in top)
        share = domain.num_collected / domain.num_pages
        counts = (domain.num_pages, domain.num_collected, f"{share:.3f}")
        score = f"{domain.mean_score:.3f}"
        table.writerow([host, *counts, score, joining[host], shown, examples[host]])
