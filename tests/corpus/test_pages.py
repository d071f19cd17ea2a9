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
    read_jsonl,
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


def test_a_crawl_names_its_bad_lines(tmp_path):
    """Good lines are read around bad ones, counted and named; no good line is an error."""
    path = tmp_path / "crawl.jsonl"
    good = json.dumps({"url": "https://a.org/1", "text": "text \ud800"})
    path.write_bytes(
        b"\n".join(
            [b"{broken", good.encode(), b"[1]", b'{"url": "https://a.org/2"}', b"\xff\xfe", b""]
        )
    )
    counts = PageCounts()
    pages = list(read_jsonl(path, counts))
    assert [page.url for page in pages] == ["https://a.org/1"]
    assert pages[0].to_json().encode()  # a lone surrogate does not stop writing
    assert (counts.pages, counts.bad_lines) == (1, 4)
    assert counts.bad_line_examples[0] == f"{path}:1: not JSON in UTF-8"
    assert counts.bad_line_examples[2] == f'{path}:4: no "text" in it'
    path.write_text("[]\n")
    with pytest.raises(ValueError, match="crawl.jsonl: no page in it"):
        list(read_jsonl(path, PageCounts()))


@pytest.mark.parametrize("url", ["http://[::1/x", "https://a\u2100b.org/x"])
def test_a_url_that_cannot_be_split_is_a_bad_line(tmp_path, url):
    """Deduplication raises on such a URL, so the crawl's reader counts its line and goes on."""
    with pytest.raises(ValueError):
        dedup.url_key(url)
    path = tmp_path / "crawl.jsonl"
    rows = [{"url": url, "text": "x"}, {"url": "https://a.org/1", "text": "y"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    counts = PageCounts()
    assert [page.url for page in read_jsonl(path, counts)] == ["https://a.org/1"]
    assert (counts.pages, counts.bad_lines) == (1, 1)
    assert counts.bad_line_examples[0].startswith(f"{path}:1: ")
    assert counts.bad_line_examples[0].endswith(" in its url")


def test_long_pages_are_cut_and_long_lines_skipped(tmp_path, monkeypatch):
    """At the limit a page and a line stay whole, one more is cut or skipped, and both are counted;
    the lines after a skipped one are read, with their numbers."""
    monkeypatch.setattr(pages, "MAX_CRAWL_CHARACTERS", 100)
    monkeypatch.setattr(pages, "MAX_LINE_BYTES", 300)
    line = lambda n: json.dumps({"url": "https://a.org/1", "text": "y" * n}).encode()
    extra = len(line(0))
    lines = [line(100), line(101), line(299 - extra), line(300 - extra), line(2000), b"{", line(5)]
    path = tmp_path / "crawl.jsonl"
    for end in (b"\n", b""):
        path.write_bytes(b"\n".join(lines) + end)
        counts = PageCounts()
        assert [len(p.text) for p in read_jsonl(path, counts)] == [100, 100, 100, 5]
        assert (counts.pages, counts.cut_pages, counts.bad_lines) == (4, 2, 3)
        assert counts.bad_line_examples == [
            f"{path}:4: longer than 300 bytes",
            f"{path}:5: longer than 300 bytes",
            f"{path}:6: not JSON in UTF-8",
        ]
    path.write_bytes(line(5) + b"\n" + line(2000))  # the long line ends the file
    counts = PageCounts()
    assert len(list(read_jsonl(path, counts))) == 1 and counts.bad_lines == 1


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    """A reader sees the file before or the file after, never a part."""
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), open_atomically(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
