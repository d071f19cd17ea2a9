"""Pages from installed documentation, crawls in JSONL and generated hosts."""

import json
import sys

import pytest

from nanomath.base.files import open_atomically
from nanomath.corpus import dedup, pages
from nanomath.corpus.pages import (
    PageCounts,
    find_package,
    parse_file,
    read_crawl,
    source_files,
)

LONG = "Solve the equation. " * 20  # more than the 300 characters of a page


@pytest.fixture
def package(tmp_path):
    root = tmp_path / "site" / "sidefx"
    (root / "linalg").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "__init__.py").write_text(f'"""{LONG}"""\nopen({str(tmp_path / "ran")!r}, "w")\n')
    (root / "linalg" / "norms.py").write_text(
        f'''"""Short."""
def norm(x, ord=None):
    """{LONG}"""
class Solver(Base):
    """Head."""
    def solve(self, b):
        """{LONG}"""
if True:
    def inside(): "{LONG}"
add_docstr(torch.abs, r"""{LONG}""".format())
add_newdoc("numpy._core.multiarray", "dot", """{LONG}""")
'''
    )
    (root / "tests" / "test_norms.py").write_text(f'"""{LONG}"""\n')
    (root / "broken.py").write_text("def (:\n")
    return root


def test_documentation_is_read_and_never_imported(package, tmp_path):
    """A module that writes a file when it runs leaves none, and is not among the loaded ones."""
    assert find_package("sidefx", [str(tmp_path / "site")]) == package
    files = source_files(package)
    assert [str(f.relative_to(package)) for f in files] == [
        "__init__.py",
        "broken.py",
        "linalg/norms.py",
    ]
    for path in files:
        parse_file(("sidefx", package, path))
    assert not (tmp_path / "ran").exists() and "sidefx" not in sys.modules


def test_one_page_per_object_with_a_host_per_subpackage(package):
    """Module, function, class with its methods, and add_docstr calls: URLs, titles, counts."""
    pages, too_short, readable = parse_file(("sidefx", package, package / "linalg" / "norms.py"))
    assert readable and too_short == 1  # the module's own docstring
    assert [page.url.removeprefix("https://linalg.sidefx/linalg/norms/") for page in pages] == [
        "norm",
        "Solver",
        "inside",
        "abs",
        "dot",
    ]
    assert pages[0].text.startswith("sidefx.linalg.norms.norm(x, ord=None)\n\nSolve")
    assert "solve(self, b)\nSolve" in pages[1].text
    top, _, _ = parse_file(("sidefx", package, package / "__init__.py"))
    assert [page.url for page in top] == ["https://www.sidefx/"]
    assert parse_file(("sidefx", package, package / "broken.py")) == ([], 0, False)


def test_a_crawl_names_its_bad_lines(tmp_path, capsys):
    """Good lines are read around bad ones, counted and named; no good line is an error."""
    path = tmp_path / "crawl.jsonl"
    good = json.dumps({"url": "https://a.org/1", "text": "text \ud800"})
    path.write_bytes(
        b"\n".join(
            [b"{broken", good.encode(), b"[1]", b'{"url": "https://a.org/2"}', b"\xff\xfe", b""]
        )
    )
    counts = PageCounts()
    pages = list(read_crawl(path, counts))
    assert [page.url for page in pages] == ["https://a.org/1"]
    assert pages[0].to_json().encode()  # a lone surrogate does not stop writing
    assert counts.pages == 1
    printed = capsys.readouterr().err
    assert "skipped 4 of 5 lines" in printed and f"{path}:1: not JSON" in printed
    assert f'{path}:4: no "text" in it' in printed
    path.write_text("[]\n")
    with pytest.raises(ValueError, match="crawl.jsonl: no page in it"):
        list(read_crawl(path, PageCounts()))


@pytest.mark.parametrize("url", ["http://[::1/x", "https://a\u2100b.org/x"])
def test_a_url_that_cannot_be_split_is_a_bad_line(tmp_path, capsys, url):
    """Deduplication raises on such a URL, so the crawl's reader names its line and goes on."""
    with pytest.raises(ValueError):
        dedup.url_key(url)
    path = tmp_path / "crawl.jsonl"
    rows = [{"url": url, "text": "x"}, {"url": "https://a.org/1", "text": "y"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [page.url for page in read_crawl(path, PageCounts())] == ["https://a.org/1"]
    named = capsys.readouterr().err.splitlines()[1]
    assert named.startswith(f"  {path}:1: ") and named.endswith(" in its url")


def test_long_pages_are_cut_and_counted(tmp_path, monkeypatch):
    """At the limit a page stays whole, one more character is cut."""
    monkeypatch.setattr(pages, "MAX_CRAWL_CHARACTERS", 100)
    path, counts = tmp_path / "crawl.jsonl", PageCounts()
    rows = [{"url": "https://a.org/1", "text": "y" * n} for n in (100, 101, 5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [len(p.text) for p in read_crawl(path, counts)] == [100, 100, 5]
    assert (counts.pages, counts.cut_pages) == (3, 1)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    """A reader sees the file before or the file after, never a part."""
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), open_atomically(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
