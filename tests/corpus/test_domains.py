"""The 10% rule, URL rules and the table for the annotator."""

import io

import numpy as np
import pytest

from nanomath.corpus.domains import (
    RULES_FILE,
    UrlRules,
    discover,
    host_of,
    write_candidates,
)


@pytest.mark.parametrize("num_pages", [1, 7, 10, 30, 70, 1000])
def test_a_domain_needs_more_than_a_tenth(num_pages):
    """Exactly 10% collected is not enough, one page more is: the paper says more than 10%."""
    for num_collected in range(min(num_pages, 120) + 1):
        collected_N = np.arange(num_pages) < num_collected
        found = discover(["h"] * num_pages, collected_N, np.zeros(num_pages))
        assert bool(found) == (num_collected * 10 > num_pages)


def test_domains_count_pages_and_scores_of_their_host():
    """Counts, shares and mean scores are per host; pages without a host form no domain."""
    hosts = ["a", "b", "a", "b", ""]
    found = discover(hosts, np.array([1, 0, 0, 0, 1], bool), np.array([0.9, 0.1, 0.5, 0.2, 1.0]))
    assert [(d.host, d.num_pages, d.num_collected) for d in found] == [("a", 2, 1)]
    assert found[0].mean_score == pytest.approx(0.7)


def _rules(tmp_path, text):
    path = tmp_path / "rules.tsv"
    path.write_text(text)
    return UrlRules.load(path)


def test_the_longest_prefix_of_the_nearest_host_decides(tmp_path):
    """Exact host before wildcard, long prefix before short, and no rule means no math."""
    rules = _rules(
        tmp_path,
        "# comment\n*.org\t/\t+\nnews.org\t/\t-\nnews.org\t/math/\t+\nnews.org\t/math/ads\t-\n",
    )
    assert rules.is_math("https://any.org/x")
    assert rules.is_math("https://news.org/math/x")
    assert not rules.is_math("https://news.org/x")
    assert not rules.is_math("https://news.org/math/ads/1")
    assert not rules.is_math("https://any.com/x")


def test_a_bad_rule_is_named_by_line(tmp_path):
    """Two columns or another sign end with file and line."""
    for bad in ("a.org\t/\n", "a.org\t/\t?\n", "a.org / +\n"):
        with pytest.raises(ValueError, match=r"rules\.tsv:2"):
            _rules(tmp_path, "# first\n" + bad)


def test_the_annotator_sees_counts_prefixes_and_an_example():
    """One row per domain after a heading: its counts, its collected prefixes, a collected page."""
    urls = ["https://a.org/q/1", "https://a.org/q/2", "https://a.org/faq", "https://b.org/1"]
    hosts = [host_of(url) for url in urls]
    collected_N, joins_N = (np.array(x, bool) for x in ([1, 0, 0, 0], [0, 1, 0, 0]))
    file = io.StringIO()
    found = discover(hosts, collected_N, np.zeros(4))
    write_candidates(file, urls, hosts, collected_N, joins_N, found)
    assert file.getvalue().splitlines() == [
        "host\tpages\tcollected\tshare\tscore\tjoining\tprefixes\texample",
        "a.org\t3\t1\t0.333\t0.000\t1\t/q:1\thttps://a.org/q/1",
    ]


def test_the_rules_of_the_embedded_web_load():
    """The reviewed list reads, and knows both sides."""
    rules = UrlRules.load(RULES_FILE)
    assert rules.is_math("https://integrals.sympy/integrals/integrate")
    assert rules.is_math("https://linalg.numpy/linalg/_linalg/norm")
    assert not rules.is_math("https://printing.sympy/printing/latex")
    assert not rules.is_math("https://json.python/json/loads")
    assert not rules.is_math("https://timetable.notices/page/1")
