"""Downloads from a server on this machine: whole, cut, changed, refused; nobody else connects."""

import ast
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from nanomath.hub import download
from nanomath.hub.download import DATA

ROOT = Path(__file__).resolve().parents[2]
BODY = "".join(f'{{"question": "{number}", "answer": "\u00e9"}}\r\n' for number in range(9000))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server:
    """Serve files from memory. cuts: after how many bytes the next answers to GET are cut; statuses
    maps a path to the status it is refused with; requests are (method, path, Range header)."""

    def __init__(self):
        self.files, self.statuses, self.headers = {}, {}, {}
        self.cuts, self.requests = [], []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                path, wanted = urlsplit(self.path).path, self.headers.get("Range")
                server.requests.append((self.command, path, wanted))
                body = server.files.get(path)
                if path in server.statuses or body is None:
                    return self.answer(server.statuses.get(path, 404), b"no")
                headers = server.headers.get(path, {})
                if wanted:
                    start = int(wanted.removeprefix("bytes=").split("-")[0])
                    span = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
                    return self.answer(206, body[start:], **headers, **span)
                return self.answer(200, body, **headers)

            do_HEAD = do_GET

            def answer(self, status, body, **headers):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
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
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def data(server, monkeypatch):
    """A data set "tiny" of one file, tiny.jsonl, that NANOMATH_MIRROR has."""
    file = ("tiny.jsonl", "a/tiny.jsonl", hashlib.sha256(BODY.encode()).hexdigest())
    monkeypatch.setitem(download.DATA, "tiny", (file,))
    monkeypatch.setenv("NANOMATH_MIRROR", server.url + "/")
    server.files["/a/tiny.jsonl"] = BODY.encode()


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
    folder = tmp_path / "new" / "data"
    download.main(["tiny", "--to", str(folder)])
    assert (folder / "tiny.jsonl").read_bytes() == BODY.encode()
    download.main(["tiny", "--to", str(folder)])
    assert len(server.requests) == 1
    assert os.listdir(folder) == ["tiny.jsonl"]
    assert capsys.readouterr().out.count("tiny.jsonl") == 2


@pytest.mark.parametrize(
    ("body", "cuts", "words"),
    [
        (BODY.encode()[:-1] + b"x", [], "the checksum is"),
        (BODY.encode() + b"x", [], "the checksum is"),
        (b"\xff" * 9, [], "the checksum is"),
        (BODY.encode(), [1000], "IncompleteRead"),
    ],
    ids=["changed", "longer", "other", "cut"],
)
def test_another_file_is_refused_and_nothing_kept(server, data, tmp_path, body, cuts, words):
    """A changed, longer or cut file leaves nothing behind; a user's own is never overwritten."""
    server.files["/a/tiny.jsonl"], server.cuts = body, cuts
    text = failure(["tiny", "--to", str(tmp_path)])
    assert "tiny.jsonl" in text and words in text
    assert os.listdir(tmp_path) == []
    (tmp_path / "tiny.jsonl").write_bytes(b"mine")
    server.requests.clear()
    assert "is another file; remove it" in failure(["tiny", "--to", str(tmp_path)])
    assert (tmp_path / "tiny.jsonl").read_bytes() == b"mine" and server.requests == []


def test_refusals_are_named(server, data, tmp_path, monkeypatch):
    """404, 403, an address where nobody listens and one that is no URL are one line each."""
    for status in (404, 403):
        server.statuses["/a/tiny.jsonl"] = status
        text = failure(["tiny", "--to", str(tmp_path)])
        assert f"{server.url}/a/tiny.jsonl: HTTP Error {status}" in text
    monkeypatch.setenv("NANOMATH_MIRROR", "http://127.0.0.1:9")
    assert "refused" in failure(["tiny", "--to", str(tmp_path)])
    assert os.listdir(tmp_path) == []
    monkeypatch.setenv("NANOMATH_MIRROR", "file:///etc")
    assert "NANOMATH_MIRROR=file:///etc: wanted a URL" in failure(["tiny"])


@pytest.mark.parametrize("name", DATA)
def test_checksums_are_those_of_the_files_used_here(name):
    """Names and checksums are those of the public files under NANOMATH_DATA."""
    folder = os.environ.get("NANOMATH_DATA")
    if not folder:
        pytest.skip("NANOMATH_DATA is not set")
    for file, _, wanted in DATA[name]:
        assert hashlib.sha256((Path(folder) / file).read_bytes()).hexdigest() == wanted


# ------------------------------------------------------------------------------------------ models


WEIGHTS = os.urandom(300_000)
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "modeling_evil.py": b"import os",
    "training_args.pkl": b"pickle",
    ".hidden.json": b"{}",
    "original/params.json": b"{}",
    "README.md": b"hello",
}


def serve_model(server, files, name="owner/name", revision="main"):
    """Answer what huggingface_hub asks for a model, and its files, as the hub does."""
    tree = []
    for file, body in files.items():
        blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        entry = {"type": "file", "path": file, "size": len(body), "oid": blob}
        if file.endswith(".safetensors"):
            blob = hashlib.sha256(body).hexdigest()
            entry["lfs"] = {"oid": blob, "size": len(body), "pointerSize": 134}
        tree.append(entry)
        path = f"/{name}/resolve/{COMMIT}/{file}"
        server.files[path] = body
        server.headers[path] = {"ETag": f'"{blob}"', "X-Repo-Commit": COMMIT}
    info = {"_id": "1", "id": name, "modelId": name, "sha": COMMIT}
    info["siblings"] = [{"rfilename": file} for file in files]
    answer = json.dumps(info | {"private": False, "tags": [], "downloads": 0, "likes": 0}).encode()
    server.files[f"/api/models/{name}/revision/{revision}"] = answer
    server.files[f"/api/models/{name}/tree/{COMMIT}"] = json.dumps(tree).encode()


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


def arrived(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder; huggingface_hub's notes are in .cache beside them."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_model_through_the_hub(server, tmp_path):
    """A model's safetensors, JSON and chat template of one commit arrive; nothing else is asked
    for, and nothing twice."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    serve_model(server, MODEL)
    run = download_model(server, tmp_path, "owner/name", "--to", "model")
    assert run.returncode == 0, run.stderr
    assert COMMIT in run.stdout
    kept = ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
    assert arrived(tmp_path / "model") == {name: MODEL[name] for name in kept}
    loaded = [
        path for method, path, _ in server.requests if method == "GET" and "/api/" not in path
    ]
    assert sorted(loaded) == sorted(f"/owner/name/resolve/{COMMIT}/{name}" for name in kept)
    server.requests.clear()
    assert download_model(server, tmp_path, "owner/name", "--to", "model").returncode == 0
    assert not any("resolve" in path for method, path, _ in server.requests if method == "GET")


def test_a_cut_download_is_continued(server, tmp_path):
    """What was cut is whole after the same command, or the same call already."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    serve_model(server, {"model.safetensors": WEIGHTS})
    server.cuts = [10**6, 10**6, 200_000]  # the two lists whole, then the weights
    for _ in range(2):
        run = download_model(server, tmp_path, "owner/name", "--to", "model")
    assert run.returncode == 0, run.stderr
    assert arrived(tmp_path / "model") == {"model.safetensors": WEIGHTS}


def test_model_that_cannot_be_had(server, tmp_path):
    """No such model, no safetensors, a gated one, no network: one line each and no success, though
    some of its files are there."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    serve_model(server, {"config.json": b"{}", "pytorch_model.bin": b"x"}, "owner/pickled")
    serve_model(server, MODEL)
    weights = f"/owner/name/resolve/{COMMIT}/model.safetensors"
    server.statuses[weights] = 403
    server.headers[weights] |= {"X-Error-Code": "GatedRepo"}
    for argv, words in (
        (["owner/none"], "owner/none at main: the hub does not give it"),
        (["owner/pickled"], "holds no .safetensors file"),
        (["owner/name"], "a gated model needs `hf auth login` or HF_TOKEN"),
    ):
        run = download_model(server, tmp_path, *argv)
        assert run.returncode == 1 and words in run.stderr, run.stderr
        assert run.stderr.strip().split("\n")[-1].startswith("error: ")
    assert "model.safetensors" not in arrived(tmp_path / "models" / "name")
    (tmp_path / "models" / "name" / "config.json").write_text("{}")
    server.url = "http://127.0.0.1:9"
    run = download_model(server, tmp_path, "owner/name")
    assert run.returncode == 1 and "the name and the network" in run.stderr, run.stderr


def test_names_that_are_none(monkeypatch, tmp_path):
    """A name that is none is refused before any request; so is a missing package."""
    assert "data sets are gsm8k, math" in failure(["gsm9k"])
    for argv in (["../../etc"], ["a/b/c"], ["https://a/b"]):
        assert "a model is OWNER/NAME" in failure(argv)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install -e '.[hub]'" in failure(["owner/name", "--to", str(tmp_path)])


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
    assert {"urllib.request", "huggingface_hub.snapshot_download"} <= found.pop(
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
