"""Downloads from a server on this machine: whole, cut, changed, refused; nobody else connects."""

import ast
import hashlib
import json
import os
import resource
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nanomath.hub import download
from nanomath.hub.download import DATA

ROOT = Path(__file__).resolve().parents[2]
BODY = bytes(range(256)) * 900  # 230,400 bytes
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server:
    """Serve files from memory. cuts lists after how many bytes each next request is cut; redirects
    maps a path to a URL; requests are (path, Range header, Authorization header)."""

    def __init__(self):
        self.files, self.cuts, self.redirects, self.statuses = {}, [], {}, []
        self.ranges, self.shift, self.requests = True, 0, []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                wanted, auth = self.headers.get("Range"), self.headers.get("Authorization")
                server.requests.append((self.path, wanted, auth))
                if self.path in server.redirects:
                    return self.answer(302, b"", Location=server.redirects[self.path])
                if server.statuses:
                    return self.answer(server.statuses.pop(0), b"")
                body = server.files.get(self.path)
                if body is None:
                    return self.answer(404, b"no such file")
                if wanted and server.ranges:
                    start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                    start += server.shift
                    span = f"bytes {start}-{len(body) - 1}/{len(body)}"
                    return self.answer(206, body[start:], **{"Content-Range": span})
                return self.answer(200, body)

            def answer(self, status, body, **headers):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if server.cuts and status in (200, 206):
                    body = body[: server.cuts.pop(0)]
                    self.close_connection = True
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "WAIT_S", 0.0)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def data(server, monkeypatch):
    """A data set "tiny" of one file, tiny.jsonl, that NANOMATH_MIRROR has."""
    file = ("tiny.jsonl", "a/tiny.jsonl", len(BODY), hashlib.sha256(BODY).hexdigest())
    monkeypatch.setitem(download.DATA, "tiny", (file,))
    monkeypatch.setenv("NANOMATH_MIRROR", server.url + "/")
    server.files["/a/tiny.jsonl"] = BODY
    return download.data_files("tiny")[0]


def ranges(server):
    return [wanted for _, wanted, _ in server.requests]


def failure(argv) -> str:
    """Return the one line that a failing download ends with."""
    with pytest.raises(SystemExit) as error:
        download.main(argv)
    text = str(error.value)
    assert text.startswith("error: ") and "\n" not in text
    return text


# -------------------------------------------------------------------------------------------- data


def test_data_arrives_whole_and_once(server, data, tmp_path, capsys):
    """A fresh file has every byte, a second call asks for nothing, no other file is left."""
    download.main(["tiny", "--to", str(tmp_path / "new" / "data")])
    assert (tmp_path / "new" / "data" / "tiny.jsonl").read_bytes() == BODY
    download.main(["tiny", "--to", str(tmp_path / "new" / "data")])
    assert ranges(server) == [None]
    assert os.listdir(tmp_path / "new" / "data") == ["tiny.jsonl"]
    assert capsys.readouterr().out.count("tiny.jsonl") == 2


def test_cut_connections_are_continued(server, data, tmp_path):
    """Within a call and across calls, only the bytes that are missing are asked for."""
    server.cuts = [1000, 50_000, 0]
    download.main(["tiny", "--to", str(tmp_path)])
    assert ranges(server) == [None, "bytes=1000-", "bytes=51000-", "bytes=51000-"]
    assert (tmp_path / "tiny.jsonl").read_bytes() == BODY

    (tmp_path / "tiny.jsonl").unlink()
    server.requests.clear()
    server.cuts = [1000, 0, 0, 0]
    text = failure(["tiny", "--to", str(tmp_path)])
    assert "1000 of 230400 bytes are kept" in text and "same command continues" in text
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [1000]
    download.main(["tiny", "--to", str(tmp_path)])
    assert ranges(server) == [None, *["bytes=1000-"] * 4]
    assert os.listdir(tmp_path) == ["tiny.jsonl"]
    assert (tmp_path / "tiny.jsonl").read_bytes() == BODY


def test_server_without_ranges_starts_anew(server, data, tmp_path):
    """A server that answers a range with the whole file gives the file once, not appended."""
    server.cuts, server.ranges = [100_000], False
    download.main(["tiny", "--to", str(tmp_path)])
    assert ranges(server) == [None, "bytes=100000-"]
    assert (tmp_path / "tiny.jsonl").read_bytes() == BODY


def test_only_failures_in_a_row_end_a_download(server, data, tmp_path, monkeypatch):
    """A connection that is cut again and again, but brings something each time, is kept up."""
    monkeypatch.setattr(download, "CHUNK", 1000)
    server.cuts = [2000] * (2 * download.MAX_FAILURES)
    download.main(["tiny", "--to", str(tmp_path)])
    assert (tmp_path / "tiny.jsonl").read_bytes() == BODY
    assert len(server.requests) == 2 * download.MAX_FAILURES + 1


def test_another_range_than_asked_for_is_refused(server, data, tmp_path):
    """Bytes that belong elsewhere are not appended: the range that is answered is compared."""
    server.cuts, server.shift = [100_000], -1
    assert "another range than bytes 100000-" in failure(["tiny", "--to", str(tmp_path)])


@pytest.mark.parametrize(
    ("body", "words"),
    [(BODY[:-1] + b"x", "the checksum is"), (BODY + b"x", "more than its 230400 bytes came")],
    ids=["changed", "longer"],
)
def test_another_file_is_refused_and_nothing_kept(server, data, tmp_path, body, words):
    """A changed or longer file leaves nothing behind; a user's own file is never overwritten."""
    server.files["/a/tiny.jsonl"] = body
    text = failure(["tiny", "--to", str(tmp_path)])
    assert "tiny.jsonl" in text and words in text
    assert os.listdir(tmp_path) == []
    (tmp_path / "tiny.jsonl").write_bytes(b"mine")
    server.requests.clear()
    assert "is another file; remove it" in failure(["tiny", "--to", str(tmp_path)])
    assert (tmp_path / "tiny.jsonl").read_bytes() == b"mine" and server.requests == []


def test_damage_on_the_way_is_found_after_resuming(server, data, tmp_path):
    """A part that was changed on disk ends in a checksum error, and the next call starts anew."""
    part = download.part_of(tmp_path, data)
    part.write_bytes(b"?" * 1000)
    assert "checksum" in failure(["tiny", "--to", str(tmp_path)])
    assert os.listdir(tmp_path) == []
    download.main(["tiny", "--to", str(tmp_path)])
    assert ranges(server) == ["bytes=1000-", None]


def test_refusals_are_named(server, data, tmp_path, monkeypatch):
    """404, 403 and an address where nobody listens are one line; only the last is tried again."""
    del server.files["/a/tiny.jsonl"]
    assert "HTTP status 404; it is not there" in failure(["tiny", "--to", str(tmp_path)])
    server.statuses = [403]
    assert "HTTP status 403; access is refused" in failure(["tiny", "--to", str(tmp_path)])
    assert len(server.requests) == 2
    server.files["/a/tiny.jsonl"] = BODY
    server.statuses = [503, 429]
    download.main(["tiny", "--to", str(tmp_path)])
    assert len(server.requests) == 5
    monkeypatch.setenv("NANOMATH_MIRROR", "http://127.0.0.1:9")
    assert "refused" in failure(["tiny", "--to", str(tmp_path / "b")])
    assert os.listdir(tmp_path / "b") == []
    monkeypatch.setenv("NANOMATH_MIRROR", "file:///etc")
    assert "NANOMATH_MIRROR=file:///etc: wanted a URL" in failure(["tiny"])


def test_full_disk_is_named(server, data, tmp_path, monkeypatch):
    """Too little room is said before; where writing stops meanwhile, what was written is kept."""
    usage = download.shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda folder: usage)
        assert "GB are free" in failure(["tiny", "--to", str(tmp_path)])
    assert server.requests == []

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        text = failure(["tiny", "--to", str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large; 100000 of 230400 bytes are kept, and the same command" in text
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [BODY[:100_000]]
    server.requests.clear()
    download.main(["tiny", "--to", str(tmp_path)])
    assert ranges(server) == ["bytes=100000-"]
    assert (tmp_path / "tiny.jsonl").read_bytes() == BODY


def test_redirects_never_leave_https():
    """https may lead to https alone, and a token only to the host it was meant for."""
    follow = lambda start, end: download._Redirects().redirect_request(
        request(start), None, 302, "Found", {}, end
    )

    def request(url):
        request = download.urllib.request.Request(url, headers={"Range": "bytes=5-"})
        request.add_unredirected_header("Authorization", "Bearer secret")
        return request

    for end in ("http://a.org/x", "ftp://a.org/x", "file:///etc/passwd"):
        with pytest.raises(ValueError, match="not https"):
            follow("https://a.org/x", end)
    same, other = (
        follow("https://a.org/x", "https://a.org/y"),
        follow("https://a.org/x", "https://b.org/y"),
    )
    assert same.get_header("Authorization") == "Bearer secret"
    assert not other.has_header("Authorization")
    assert same.get_header("Range") == other.get_header("Range") == "bytes=5-"


def test_two_processes_do_not_write_one_file(server, data, tmp_path):
    """A file that another process is loading is left alone."""
    with open(download.part_of(tmp_path, data), "ab") as target:
        download.fcntl.flock(target, download.fcntl.LOCK_EX)
        assert "loaded by another process" in failure(["tiny", "--to", str(tmp_path)])
    assert server.requests == []


@pytest.mark.parametrize("name", DATA)
def test_checksums_are_those_of_the_files_used_here(name):
    """Names, sizes and checksums are those of the public files under NANOMATH_DATA."""
    folder = os.environ.get("NANOMATH_DATA")
    if not folder:
        pytest.skip("NANOMATH_DATA is not set")
    for file in download.data_files(name):
        body = (Path(folder) / file.name).read_bytes()
        assert (len(body), hashlib.sha256(body).hexdigest()) == (file.size, file.digest)
        assert file.url.startswith("https://")


# ------------------------------------------------------------------------------------------ models


WEIGHTS = os.urandom(300_000)
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "modeling_evil.py": b"import os",
    "training_args.pkl": b"pickle",
    ".hidden.json": b"{}",
    "original/params.json": b"{}",
    "../config.json": b"{}",
    "README.md": b"hello",
}


def serve_model(server, files, name="owner/name", revision="main"):
    """Answer what huggingface_hub asks for a model, and its files where the hub has them."""
    siblings = []
    for file, body in files.items():
        blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        sibling = {"rfilename": file, "size": len(body), "blobId": blob}
        if file.endswith(".safetensors"):
            sha256 = hashlib.sha256(body).hexdigest()
            sibling["lfs"] = {"sha256": sha256, "size": len(body), "pointerSize": 134}
            here, cdn = server.url, server.url.replace("127.0.0.1", "localhost")
            server.redirects[f"/{name}/resolve/{COMMIT}/{file}"] = f"{cdn}/cdn/{file}"
            server.files[f"/cdn/{file}"] = body
            assert here != cdn
        else:
            server.files[f"/{name}/resolve/{COMMIT}/{file}"] = body
        siblings.append(sibling)
    info = {"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
    answer = json.dumps(info | {"private": False, "tags": [], "downloads": 0, "likes": 0}).encode()
    server.files[f"/api/models/{name}/revision/{revision}?blobs=true"] = answer


def download_model(server, tmp_path, *argv):
    """Run the command as a user does, with a hub of our own."""
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": "hf_secret",
    }
    return subprocess.run(
        [sys.executable, "-m", "nanomath.hub.download", *argv],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        timeout=60,
    )


def test_model_through_the_hub(server, tmp_path):
    """A model's safetensors and JSON of one commit arrive, also over a cut; nothing else does, and
    the token is not sent where the hub redirects to."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    serve_model(server, MODEL)
    server.cuts = [10**6] * 3 + [200_000]  # the list and two small files whole, then the weights
    run = download_model(server, tmp_path, "owner/name", "--to", "model")
    assert run.returncode == 0, run.stderr
    assert COMMIT in run.stdout and "download:" in run.stderr
    kept = ("config.json", "tokenizer.json", "model.safetensors")
    found = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert found == {name: MODEL[name] for name in kept}
    resolve, auth = f"/owner/name/resolve/{COMMIT}/", "Bearer hf_secret"
    assert server.requests == [
        ("/api/models/owner/name/revision/main?blobs=true", None, auth),
        (resolve + "tokenizer.json", None, auth),
        (resolve + "config.json", None, auth),
        (resolve + "model.safetensors", None, auth),
        ("/cdn/model.safetensors", None, None),
        (resolve + "model.safetensors", "bytes=200000-", auth),
        ("/cdn/model.safetensors", "bytes=200000-", None),
    ]
    server.requests.clear()
    assert download_model(server, tmp_path, "owner/name", "--to", "model").returncode == 0
    assert len(server.requests) == 1  # the list


def test_model_that_cannot_be_had(server, tmp_path):
    """No such model, no safetensors, damaged weights: one line each, and only whole files."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    serve_model(server, {"config.json": b"{}", "pytorch_model.bin": b"x"}, "owner/pickled")
    serve_model(server, MODEL, revision="v1")
    server.files["/cdn/model.safetensors"] = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])
    for argv, words in (
        (["owner/none"], "owner/none at main: the hub does not list it"),
        (["owner/pickled"], "holds no .safetensors file"),
        (["owner/name", "--revision", "v1"], "checksum"),
    ):
        run = download_model(server, tmp_path, *argv)
        assert run.returncode == 1 and words in run.stderr, run.stderr
        assert run.stderr.strip().split("\n")[-1].startswith("error: ")
    assert sorted(os.listdir(tmp_path / "models" / "name")) == ["config.json", "tokenizer.json"]


def test_names_that_are_none(monkeypatch, tmp_path):
    """A name that is none is refused before any request; so is a missing package."""
    assert "data sets are gsm8k, math" in failure(["gsm9k"])
    for argv in (["../../etc"], ["a/b/c"], ["https://a/b"]):
        assert "a model is OWNER/NAME" in failure(argv)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install -e .[hub]" in failure(["owner/name", "--to", str(tmp_path)])


# -------------------------------------------------------------------------------------- the others


CONNECTING = {
    *("aiohttp", "ftplib", "http", "httpx", "httpx2", "huggingface_hub", "imaplib", "poplib"),
    *("requests", "smtplib", "socketserver", "ssl", "telnetlib", "urllib3", "xmlrpc"),
    *("urllib.request", "urllib.error", "datasets", "transformers", "wandb"),
}
CALLS = {
    *("connect", "connect_ex", "create_connection", "open_connection", "urlopen", "urlretrieve"),
    *("load_state_dict_from_url", "download_url_to_file", "from_pretrained", "get_encoding"),
}


def connecting(source: str) -> set[str]:
    """Return what a source text imports or calls that opens connections."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name for name in names if CONNECTING & {name, *parents(name)}}
        name = getattr(node, "attr", None) or getattr(node, "id", None)
        found |= {name} & CALLS
    return found


def parents(name: str) -> list[str]:
    """Return "a" and "a.b" for "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def test_no_other_file_opens_a_connection():
    """No other file of the project imports what opens connections, or calls socket's means to
    (torch's process group apart, which joins the ranks of one run)."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("nanomath/**/*.py")]
    found = {path: connecting(path.read_text(encoding="utf-8")) for path in files}
    assert {"urllib.request", "huggingface_hub.HfApi"} <= found.pop(
        ROOT / "nanomath/hub/download.py"
    )
    assert {str(path): names for path, names in found.items() if names} == {} and len(found) > 30
    for line in (
        "import socket; socket.create_connection(x)",
        "from urllib import request",
        "import http.client",
        "from torch.hub import load_state_dict_from_url as load; torch.hub.download_url_to_file(y)",
    ):
        assert connecting(line), line
    assert not connecting("import socket; from urllib.parse import urlsplit; socket.gethostname()")
