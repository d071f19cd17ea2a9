"""The pages of the web at hand: installed documentation, or a crawl in JSONL.

The embedded web needs no download: the docstrings of a fixed list of packages, read with `ast` and
never imported, so that no package's code runs. One page per module docstring, function and class
(with its methods); host = subpackage.package, as in https://linalg.numpy/linalg/norm. A crawl of
one's own comes as JSONL lines {"url", "text"}.
"""

import ast
import inspect
import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from nanomath.base.files import read_jsonl

# What every install of this project has: torch, sympy and numpy bring or are the mathematics,
# the others are the rest of the web. `python` is the standard library.
PACKAGES = (
    *("python", "torch", "torchgen", "functorch", "triton", "sympy", "mpmath"),
    *("networkx", "numpy", "jinja2", "markupsafe", "fsspec", "filelock", "setuptools"),
    *("typing_extensions", "tqdm", "safetensors", "tensorboard", "matplotlib", "PIL"),
    *("contourpy", "cycler", "fontTools", "kiwisolver", "packaging", "pyparsing"),
    *("dateutil", "absl", "grpc", "google/protobuf", "markdown", "werkzeug", "tiktoken"),
    *("regex", "fasttext", "requests", "urllib3", "idna", "certifi"),
    *("charset_normalizer", "pip"),
)
MIN_CHARACTERS = 300  # shorter docstrings say little more than a name
MAX_CHARACTERS = 50_000  # of a documentation page
# A crawl is anybody's text: its longest pages are cut. Pages of Common Crawl are a few thousand
# characters, a long chapter of a book is 100,000.
MAX_CRAWL_CHARACTERS = 200_000
_SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Page:
    """One web page."""

    url: str
    text: str

    def to_json(self) -> str:
        return json.dumps(self.__dict__, ensure_ascii=False)


@dataclass
class PageCounts:
    """What reading and deduplicating pages met: no page is dropped without a count."""

    files: int = 0
    unreadable_files: int = 0
    pages: int = 0
    too_short: int = 0
    missing_packages: list[str] = field(default_factory=list)
    cut_pages: int = 0  # longer than MAX_CRAWL_CHARACTERS, cut there
    capped: int = 0  # math pages beyond --math_share
    same_url: int = 0
    near_duplicates: int = 0
    kept: int = 0
    tokens: int = 0  # of the pages kept


def find_package(name: str, search_path: list[str] | None = None) -> Path | None:
    """Return the folder or file of an installed package, without importing it; None if absent."""
    if name == "python":
        return Path(sysconfig.get_path("stdlib"))
    for folder in sys.path if search_path is None else search_path:
        base = Path(folder or ".") / name
        if (base / "__init__.py").is_file():
            return base
        if base.with_suffix(".py").is_file():
            return base.with_suffix(".py")
    return None


def source_files(root: Path) -> list[Path]:
    """List a package's .py files without its tests, in an order that never varies."""
    if root.is_file():
        return [root]
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        found += [Path(folder) / name for name in sorted(files) if name.endswith(".py")]
    return found


def parse_file(task: tuple[str, Path, Path]) -> tuple[list[Page], int, bool]:
    """Return (pages, number of docstrings too short for a page, readable) of one source file.

    task is (package name, package root, file). Nothing of the file is executed.
    """
    package, root, path = task
    try:
        source = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return [], 0, False
    host, folder, dotted = _address(package, root, path)
    pages, too_short = [], 0
    for name, title, body in _documents(tree, dotted):
        if len(body) < MIN_CHARACTERS:
            too_short += bool(body)
            continue
        text = f"{title}\n\n{body}"[:MAX_CHARACTERS]
        pages.append(Page(f"https://{host}/{folder}{name}", _clean(text)))
    return pages, too_short, True


def read_crawl(path: str | Path, counts: PageCounts) -> Iterator[Page]:
    """Yield the pages of a crawl: JSONL with `url` and `text`; bad lines are named on stderr.

    Raises FileNotFoundError, or ValueError naming the file when it holds no page at all.
    """
    for _, page in read_jsonl(path, read=_crawl_page, max_bad_fraction=1.0):
        counts.pages += 1
        if len(page.text) > MAX_CRAWL_CHARACTERS:
            counts.cut_pages += 1
            page = replace(page, text=page.text[:MAX_CRAWL_CHARACTERS])
        yield page
    if not counts.pages:
        raise ValueError(f'{path}: no page in it; give JSONL with {{"url", "text"}} in each line')


def _crawl_page(row: dict) -> Page:
    for name in ("url", "text"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f'no "{name}" in it')
    url = _clean(row["url"]).strip()
    try:
        urlsplit(url)
    except ValueError as error:  # an open IPv6 bracket, a host that NFKC would change
        raise ValueError(f"{error} in its url") from None
    return Page(url, _clean(row["text"]))


def _clean(text: str) -> str:
    # Lone surrogates (a JSON "\ud800") cannot be written as UTF-8.
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _address(package: str, root: Path, path: Path) -> tuple[str, str, str]:
    """Return (host, path prefix, dotted module name) of a source file's pages."""
    package = package.rpartition("/")[2]
    relative = path.relative_to(root) if root.is_dir() else Path(path.name)
    parts = [part.removesuffix(".py") for part in relative.parts]
    if parts[-1] == "__init__" or not root.is_dir():
        parts = parts[:-1]
    dotted = ".".join(([] if package == "python" else [package]) + parts)
    host = f"{parts[0].strip('_') or parts[0]}.{package}" if parts else f"www.{package}"
    return host.lower(), "".join(f"{part}/" for part in parts), dotted


def _documents(tree: ast.Module, dotted: str) -> Iterator[tuple[str, str, str]]:
    """Yield (name, title, body) of a module and its top-level objects."""
    yield "", dotted, ast.get_docstring(tree) or ""
    for node in _top_level(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, f"{dotted}.{_signature(node)}", ast.get_docstring(node) or ""
        elif isinstance(node, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            yield node.name, f"class {dotted}.{node.name}({bases})", _class_body(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            # numpy and torch document compiled functions by add_newdoc(...) and add_docstr(...).
            call = node.value
            called = ast.unparse(call.func)
            if called.rpartition(".")[2] in ("add_docstr", "add_newdoc") and call.args:
                constants = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant)]
                texts = [value for value in constants if isinstance(value, str)]
                body = max(texts, key=len, default="")
                name = ast.unparse(call.args[-2] if called.endswith("newdoc") else call.args[0])
                name = name.strip("'\"").rpartition(".")[2]
                yield name, f"{dotted}.{name}", inspect.cleandoc(body)


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _top_level(node.body)
            yield from _top_level(node.orelse)
        else:
            yield node


def _class_body(node: ast.ClassDef) -> str:
    parts = [ast.get_docstring(node)]
    for method in node.body:
        if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(method)
            if doc:
                parts.append(f"{_signature(method)}\n{doc}")
    return "\n\n".join(filter(None, parts))


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return f"{node.name}({ast.unparse(node.args)})"
