"""Fetching from a Hub: a stand-in server on this machine, asked through HF_ENDPOINT."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import checkpoint_writers as writers
import pytest

from pellucid import checkpoints

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The few routes a snapshot download asks for, over folders OWNER/NAME below `root`."""

    def __init__(self, *arguments, root: Path, asked: list[str]) -> None:
        self.root, self.asked = root, asked
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *arguments) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        if path.startswith("/api/models/secret/"):
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if found := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)(?:/(revision|tree)/\w+)?", path):
            files = self._files(self.root / found[1])
            if files is None:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if found[2] == "tree":
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
                    for name, data in files.items()
                ]
                return self._send(200, json.dumps(tree).encode())
            siblings = [{"rfilename": name} for name in files]
            about = {"id": found[1], "sha": COMMIT, "siblings": siblings}
            return self._send(200, json.dumps(about).encode())
        if found := re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/\w+/(.+)", path):
            data = (self._files(self.root / found[1]) or {}).get(found[2])
            if data is not None:
                headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT}
                return self._send(200, data, headers, body)
        return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _files(self, folder: Path) -> dict[str, bytes] | None:
        if not folder.is_dir():
            return None
        paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    def _send(
        self, status: int, data: bytes, headers: dict[str, str] | None = None, body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(tmp_path):
    """(endpoint, folder of repositories, list of requests so far)."""
    root, asked = tmp_path / "hub", []
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, root=root, asked=asked))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", root, asked
    server.shutdown()
    server.server_close()
    thread.join()


def pellucid(*arguments: str, home: Path, endpoint: str, **environment: str):
    """Run the command line with a Hub cache of its own."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "pellucid", *arguments],
        cwd=ROOT,
        env=plain
        | {
            "HF_HOME": str(home),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        | environment,
        capture_output=True,
        text=True,
    )


def test_fetch_downloads_once_and_then_works_offline(tmp_path, hub):
    endpoint, root, asked = hub
    source = writers.write_hf(root / "ada" / "tiny", writers.LLAMA_JSON, writers.random_llama(), 2)
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"the same again")
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    run = partial(pellucid, "fetch", "ada/tiny", home=tmp_path / "home")

    done = run(endpoint=endpoint)
    assert (done.returncode, done.stderr) == (0, "")
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path / "home" / "hub" / "models--ada--tiny")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert not any("pytorch_model" in each or "original" in each for each in asked)
    weights = checkpoints.open_checkpoint(folder).weights
    assert weights.keys() == checkpoints.open_checkpoint(source).weights.keys()

    asked.clear()
    offline = run("--json", endpoint=endpoint, HF_HUB_OFFLINE="1")
    assert json.loads(offline.stdout) == {
        "model": "ada/tiny",
        "folder": str(folder),
        "layout": "hf",
        "family": "llama",
        "file_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    }
    assert asked == []


@pytest.fixture
def here(tmp_path, hub, monkeypatch):
    """huggingface_hub in this process, pointed at the stand-in and at a cache of its own."""
    from huggingface_hub import constants

    def point(endpoint: str, offline: bool = False) -> None:
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)

    point(hub[0])
    return point


def test_owner_name_is_a_model_like_any_other(hub, here):
    _, root, asked = hub
    writers.write_meta(root / "ada" / "meta", writers.PARAMS_JSON, writers.random_llama(), shards=2)
    opened = checkpoints.open_checkpoint("ada/meta")
    assert (opened.source, opened.layout) == ("ada/meta", "meta")
    asked.clear()
    assert checkpoints.fetch("ada/meta") == opened.folder
    assert not any("/resolve/" in each for each in asked), "everything is in the cache"


@pytest.mark.parametrize(
    ("repository", "endpoint", "offline", "expected"),
    [
        ("ada/typo", None, False, "neither a folder here nor a model on"),
        ("secret/llama", None, False, "accept the model's terms"),
        ("ada/words", None, False, "without config.json or params.json"),
        ("ada/typo", "http://127.0.0.1:9", False, "could not be reached"),
        ("ada/typo", None, True, "HF_HUB_OFFLINE forbids"),
        ("ada/typo/more", None, False, "expected owner/name"),
        ("--help/x", None, False, "expected owner/name"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub, here, repository, endpoint, offline, expected, capfd
):
    (hub[1] / "ada" / "words").mkdir(parents=True)
    (hub[1] / "ada" / "words" / "README.md").write_text("no model")
    here(endpoint or hub[0], offline)
    with pytest.raises((OSError, ValueError), match=expected) as caught:
        checkpoints.fetch(repository)
    assert str(caught.value).startswith(f"{repository}: ")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_where_a_name_leads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ada" / "tiny").mkdir(parents=True)
    assert checkpoints.resolve("ada/tiny") == Path("ada/tiny")  # a folder wins over the Hub
    assert checkpoints.resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checkpoints.resolve("~/ada") == tmp_path / "ada"
    with pytest.raises(
        FileNotFoundError,
        match=r"nothing: no such folder; .* demo-gpt2, stdlib, stdlib-gpt2 or smollm2",
    ):
        checkpoints.resolve("nothing")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        checkpoints.resolve(Path("owner/name"))  # a Path is never a repository
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(NotADirectoryError, match="give the folder it lies in"):
        checkpoints.resolve("model.safetensors")


@pytest.mark.parametrize(("name", "folder"), [("stdlib", "stdlib"), ("demo-gpt2", "demo-gpt2")])
def test_demos_lie_inside_the_package(tmp_path, monkeypatch, name, folder):
    import pellucid as package

    monkeypatch.setattr(package, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=f"{name}: this installation lacks"):
        checkpoints.resolve(name)
    (tmp_path / "demos" / folder).mkdir(parents=True)
    assert checkpoints.resolve(name) == tmp_path / "demos" / folder


def test_a_run_s_folder_is_its_best_checkpoint(tmp_path):
    run = tmp_path / "run"
    for name in ("best", "last"):
        (run / name).mkdir(parents=True)
    assert checkpoints.resolve(run) == run  # any folder may hold a folder "best"
    (run / "config.toml").write_text("")
    assert checkpoints.resolve(run) == run / "best"
    (run / "best").rmdir()
    assert checkpoints.resolve(str(run)) == run / "last"
    (run / "config.json").write_text("{}")
    assert checkpoints.resolve(run) == run
