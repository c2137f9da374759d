"""Models by hub id, from a server on this machine that speaks what the hub's client asks."""

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fakes
import huggingface_hub
import pytest
from huggingface_hub import constants

from llava_ray.deployments.settings import ServeSettings
from llava_ray.errors import ConfigError, ModelError
from llava_ray.model.formats.hub_ids import HubId, is_hub_url, parse_hub_id
from llava_ray.model.formats.sources import find_source
from llava_ray.shared_storage import Places
from pipelines.places import check_models

SHA = "a" * 40
OLD = "b" * 40


class FakeHub:
    """Repositories by name and commit, and what was fetched of them."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.fetched: list[str] = []

    def commit(self, name: str, revision: str) -> str | None:
        commits = self.repositories.get(name, {})
        found = {"main": SHA, "v1": OLD}.get(revision, revision)
        return found if found in commits else None


def make_handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0].strip("/")
            if path.startswith("api/models/"):
                named = path.removeprefix("api/models/")
                name, _, revision = named.partition("/tree/" if "/tree/" in named else "/revision/")
                commit = self.find(name, revision or "main")
                if commit and "/tree/" in named:
                    tree = hub.repositories[name][commit].items()
                    listed = [{"type": "file", "path": file, "size": len(some), "oid": file} for file, some in tree]
                    self.send(listed, {}, with_body=with_body)
                elif commit:
                    files = [{"rfilename": file} for file in hub.repositories[name][commit]]
                    self.send({"id": name, "sha": commit, "siblings": files, "private": False}, {}, with_body=with_body)
                return
            name, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
            commit = self.find(name, revision)
            if not commit:
                return
            content = hub.repositories[name][commit].get(file)
            if content is None:
                self.fail(404, "EntryNotFound")
                return
            if with_body:
                hub.fetched.append(file)
            etag = hashlib.sha256(content).hexdigest()
            self.send(content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, with_body=with_body)

        def find(self, name: str, revision: str) -> str | None:
            if name in hub.gated:
                self.fail(403, "GatedRepo")
                return None
            if name not in hub.repositories:
                self.fail(404, "RepoNotFound")
                return None
            commit = hub.commit(name, revision)
            if commit is None:
                self.fail(404, "RevisionNotFound")
            return commit

        def fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send(self, content: object, headers: dict[str, str], *, with_body: bool) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(200)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(fake))
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield fake
    server.shutdown()
    server.server_close()


@pytest.fixture
def published(hub: FakeHub, tmp_path: Path) -> dict[str, bytes]:
    folder = fakes.make_language_model(tmp_path / "made", "llama")
    files = {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}
    files |= {"modeling_evil.py": b"raise SystemExit", "pytorch_model.bin": b"pickled", "README.md": b"# hi"}
    hub.repositories["org/tiny"] = {SHA: files, OLD: files | {"tokenizer_config.json": b"{}"}}
    return files


def test_only_weights_settings_and_tokenizer_are_fetched(hub: FakeHub, published: dict[str, bytes]) -> None:
    small = find_source("org/tiny", "language model", weights=False)
    assert {file.suffix for file in small.folder.iterdir()} <= {".json", ".jinja", ".txt", ".model"}
    whole = find_source("hf://org/tiny", "language model")
    assert whole.name == small.name == "org/tiny"
    assert not {"modeling_evil.py", "pytorch_model.bin", "README.md"} & set(hub.fetched)
    assert (whole.folder / "model.safetensors").read_bytes() == published["model.safetensors"]
    assert len(hub.fetched) == len(set(hub.fetched))  # the second download takes the rest


def test_a_revision_is_that_commit(hub: FakeHub, published: dict[str, bytes]) -> None:
    old = find_source("hf://org/tiny@v1", "language model")
    assert old.name == "hf://org/tiny@v1"
    assert (old.folder / "tokenizer_config.json").read_bytes() == b"{}"
    assert find_source("hf://org/tiny@" + SHA, "language model").folder.name == SHA


def test_a_folder_of_that_name_wins_over_a_plain_id(hub: FakeHub, published: dict[str, bytes]) -> None:
    Path("org/tiny").mkdir(parents=True)
    assert find_source("org/tiny", "language model").folder == Path("org/tiny").resolve()
    from_hub = find_source("hf://org/tiny", "language model")
    assert from_hub.folder.name == SHA
    assert from_hub.name == "hf://org/tiny"  # so that it is found again


def test_without_network_the_cache_is_used(
    hub: FakeHub, published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_source("org/tiny", "language model").folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_source("org/tiny", "language model").folder == found
    with pytest.raises(
        ModelError, match=r"HF_HUB_OFFLINE is set, and it is not in the hub's cache.*Check the spelling"
    ):
        find_source("org/other", "language model")


@pytest.mark.parametrize("name", ["org/none", "hf://org/none"])
def test_a_repository_that_is_not_there(hub: FakeHub, name: str) -> None:
    with pytest.raises(ModelError, match=r"no such vision tower: .*has no such repository, or it is private: log in"):
        find_source(name, "vision tower")


def test_a_revision_that_is_not_there(hub: FakeHub, published: dict[str, bytes]) -> None:
    with pytest.raises(ModelError, match="'org/tiny' on the hub has no revision 'v9'; give a branch"):
        find_source("hf://org/tiny@v9", "language model")


def test_a_gated_repository(hub: FakeHub, published: dict[str, bytes]) -> None:
    hub.gated.add("org/tiny")
    with pytest.raises(ModelError, match=r"its publisher has to grant access first.*HF_TOKEN"):
        find_source("org/tiny", "language model")


def test_nobody_answers(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"http://127.0.0.1:9 cannot be reached, and it is not in the hub's cache"):
        find_source("org/tiny", "language model")


def test_only_pickles_are_fetched_where_there_is_nothing_else_and_are_not_unpickled(hub: FakeHub) -> None:
    evil = b"cos\nsystem\n(S'touch pwned'\ntR."
    hub.repositories["org/old"] = {SHA: {"config.json": b'{"model_type": "llama"}', "pytorch_model.bin": evil}}
    found = find_source("org/old", "language model").folder
    assert (found / "pytorch_model.bin").read_bytes() == evil
    assert not list(Path.cwd().iterdir())


def test_how_ids_are_written() -> None:
    assert parse_hub_id("hf://org/name@main") == parse_hub_id(Path("hf://org/name@main")) == HubId("org/name", "main")
    assert not is_hub_url("org/name")
    for wrong in ("hf://", "hf://a/b/c", "hf://../b", "hf:///etc"):
        with pytest.raises(ModelError, match="names no model on the hub"):
            find_source(wrong, "language model")


def test_settings_take_them() -> None:
    settings = ServeSettings.parsed({"model": "hf://org/name@v1,mine@hf://org/name@v2,org/other"})
    assert [(source.name, source.path) for source in settings.sources] == [
        ("name", "hf://org/name@v1"),
        ("mine", "hf://org/name@v2"),
        ("other", "org/other"),
    ]
    check_models({"model": "hf://org/name@refs/pr/1", "the model": str(Path("hf://org/name"))})
    for wrong in ("hf://a b/c", "hf://", "s3://bucket/model"):
        with pytest.raises(ConfigError, match="hf://org/name@revision"):
            check_models({"model": wrong})
    assert Places.of([], ["hf://org/name@v1", "org/name"]).read == ()
