"""Finding and downloading checkpoints, against a small hub on this machine."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_hub import FakeHub, serve
from tests.original import make_original
from tests.pictures import noise_image
from vlmchat.config import ModelConfig
from vlmchat.conversation import Conversation
from vlmchat.engine import download
from vlmchat.engine.engine import Engine
from vlmchat.engine.hub import find_checkpoint, find_tower, needed_files, pull
from vlmchat.errors import (
    DiskFull,
    ModelError,
    ModelNotFound,
    NetworkError,
    UnsupportedModel,
    VlmchatError,
)
from vlmchat.request import SamplingParams

CONFIG = json.dumps({"model_type": "llava"}).encode()
ORIGINAL = json.dumps({"model_type": "llava", "mm_vision_tower": "who/tower"}).encode()
WEIGHTS = bytes(range(256)) * 400  # large enough to be resumed, see `hub`
MODEL: dict[str, bytes] = {"config__json": CONFIG, "model__safetensors": WEIGHTS}
TOWER: dict[str, bytes] = {
    "config__json": b"{}",
    "preprocessor_config__json": b"{}",
    "vocab__json": b"{}",
    "pytorch_model__bin": WEIGHTS[::-1],
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setattr(download, "RESUMED_BYTES", 50_000)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)  # of 10 MB
    with serve(monkeypatch, str(tmp_path / "cache")) as running:
        yield running


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it, and no socket can be made from then on."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a socket was made")

    def cut() -> None:
        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "create_connection", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)

    return cut


def find(path: str, revision: str | None = None) -> Path:
    return find_checkpoint(path, revision, lambda stage: None)


def error_of(path: str, revision: str | None = None) -> VlmchatError:
    with pytest.raises(VlmchatError) as caught:
        find(path, revision)
    assert "\n" not in caught.value.message
    return caught.value


def names(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if not p.is_dir()}


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_download_takes_only_what_the_model_needs(hub: FakeHub) -> None:
    files = {"pytorch_model__bin": WEIGHTS, "README__md": b"#", "tokenizer__model": b"t"}
    hub.add("who/model", **MODEL, **files, training_args__bin=b"x", **{"onnx/model__json": b"{}"})
    assert names(find("who/model")) == {"config.json", "model.safetensors", "tokenizer.model"}


def test_download_takes_pickled_weights_where_there_are_no_others(hub: FakeHub) -> None:
    shards = {f"pytorch_model-0000{n}-of-00002__bin": WEIGHTS + bytes([n]) for n in (1, 2)}
    hub.add("who/model", config__json=CONFIG, mm_projector__bin=b"stray", **shards)
    found = find("who/model")
    assert names(found) == {"config.json"} | {name.replace("__", ".") for name in shards}
    assert (found / "pytorch_model-00002-of-00002.bin").read_bytes() == WEIGHTS + b"\2"


@pytest.mark.parametrize(
    ("present", "needed"),
    [
        pytest.param(
            ["adapter_model.bin", "adapter_config.json", "non_lora_trainables.bin"],
            ["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"],
            id="lora",
        ),
        pytest.param(["mm_projector.bin", "config.json"], None, id="projector-only"),
        pytest.param(
            ["model.safetensors", "consolidated.safetensors", "model.fp16.safetensors"],
            ["model.safetensors"],
            id="second-copies",
        ),
        pytest.param(["a.safetensors", "a.bin"], ["a.safetensors"], id="names-of-its-own"),
        pytest.param(["optimizer.bin", "scheduler.bin", "rng.pth"], [], id="trainer"),
    ],
)
def test_needed_files_are_those_of_the_layout(present: list[str], needed: list[str] | None) -> None:
    assert sorted(needed_files(present)) == sorted(present if needed is None else needed)


def test_find_needs_no_network_when_the_model_is_cached(hub: FakeHub, no_network: Any) -> None:
    hub.add("who/model", **MODEL)
    first = find("who/model")
    no_network()
    assert find("who/model") == first


def test_find_needs_no_network_for_a_tower_that_is_cached(
    hub: FakeHub, no_network: Any, tmp_path: Path
) -> None:
    hub.add("who/tower", **TOWER)
    first = find_tower("who/tower", tmp_path, lambda stage: None)
    assert names(first) == {"config.json", "preprocessor_config.json", "pytorch_model.bin"}
    no_network()
    assert find_tower("who/tower", tmp_path, lambda stage: None) == first


def test_find_tower_takes_no_weights_when_the_checkpoint_has_them(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.add("who/tower", **TOWER)
    found = find_tower("who/tower", tmp_path, lambda stage: None, weights=False)
    assert names(found) == {"config.json", "preprocessor_config.json"}
    found = find_tower("who/tower", tmp_path, lambda stage: None)
    assert (found / "pytorch_model.bin").exists()


@pytest.mark.parametrize("place", ["working directory", "checkpoint", "absolute"])
def test_find_tower_takes_a_path(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = tmp_path / "towers" / "clip"
    tower.mkdir(parents=True)
    (tower / "config.json").write_text("{}")
    if place == "working directory":
        monkeypatch.chdir(tmp_path)
    name = str(tower) if place == "absolute" else "towers/clip"
    relative_to = tmp_path if place == "checkpoint" else tmp_path / "elsewhere"
    assert find_tower(name, relative_to, lambda stage: None).samefile(tower)


def test_find_tower_names_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"vision tower /home/who/clip"):
        find_tower("/home/who/clip", tmp_path, lambda stage: None)


def test_download_brings_the_tower_before_the_large_files(hub: FakeHub) -> None:
    hub.add("who/model", config__json=ORIGINAL, pytorch_model__bin=WEIGHTS)
    hub.add("who/tower", **TOWER)
    stages: list[str] = []
    find_checkpoint("who/model", None, stages.append)
    assert [stage.split(":")[0] for stage in stages] == [
        "downloading who/tower",
        "downloading who/model",
    ]


def test_download_does_not_begin_when_the_tower_cannot_be_had(hub: FakeHub) -> None:
    hub.add("who/model", config__json=ORIGINAL, pytorch_model__bin=WEIGHTS)
    assert "who/tower" in error_of("who/model").message
    assert hub.gets("pytorch_model.bin") == []


def test_base_is_not_downloaded_when_the_tower_cannot_be_had(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("who/base", config__json=CONFIG, pytorch_model__bin=WEIGHTS)
    (tmp_path / "config.json").write_bytes(ORIGINAL)
    (tmp_path / "mm_projector.bin").write_bytes(WEIGHTS)
    with pytest.raises(ModelNotFound, match="who/tower"):
        Engine.load(ModelConfig(str(tmp_path), base="who/base", device="cpu"))
    assert hub.gets("pytorch_model.bin") == []


def test_find_names_the_model_when_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    error = error_of("who/model")
    assert isinstance(error, NetworkError)
    assert error.message.startswith("who/model is not on this machine and HF_HUB_OFFLINE is set")


def test_find_names_the_files_and_the_tower_that_are_missing_when_offline(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("who/model", config__json=ORIGINAL, pytorch_model__bin=WEIGHTS)
    assert isinstance(error_of("who/model"), ModelNotFound)  # the tower; the config is here now
    offline(monkeypatch)
    assert "lacks pytorch_model.bin and its vision tower who/tower" in error_of("who/model").message


def test_find_names_the_tower_when_offline(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch)
    with pytest.raises(NetworkError, match="the vision tower: who/tower is not on this machine"):
        find_tower("who/tower", tmp_path, lambda stage: None)


def test_find_completes_a_cache_that_lacks_a_small_file(hub: FakeHub) -> None:
    hub.add("who/model", **MODEL, tokenizer__model=b"t")
    (find("who/model") / "tokenizer.model").unlink()
    assert (find("who/model") / "tokenizer.model").read_bytes() == b"t"
    assert len(hub.gets("model.safetensors")) == 1


def test_find_completes_shards_that_the_index_names_without_a_listing(hub: FakeHub) -> None:
    shard = {f"model-0000{n}-of-00002__safetensors": WEIGHTS + bytes([n]) for n in (1, 2)}
    index = {"weight_map": {str(n): name.replace("__", ".") for n, name in enumerate(shard)}}
    text = json.dumps(index).encode()
    repo = hub.add("who/model", config__json=CONFIG, model__safetensors__index__json=text, **shard)
    directory = find("who/model")
    (directory.parent.parent / "trees" / f"{repo.commit}.json").unlink()
    (directory / "model-00002-of-00002.safetensors").unlink()
    assert (find("who/model") / "model-00002-of-00002.safetensors").exists()


def test_find_does_not_miss_shards_of_the_form_that_was_not_fetched(
    hub: FakeHub, no_network: Any
) -> None:
    """Both indexes are small files and so both are there; only one form's shards are."""
    texts = {
        f"{stem}__{form}__index__json": json.dumps(
            {"weight_map": {"x": f"{stem}-00001-of-00001.{form}"}}
        ).encode()
        for stem, form in (("model", "safetensors"), ("pytorch_model", "bin"))
    }
    shards = {"model-00001-of-00001__safetensors": WEIGHTS}
    repo = hub.add("who/model", config__json=CONFIG, **shards, **texts)
    directory = find("who/model")
    (directory.parent.parent / "trees" / f"{repo.commit}.json").unlink()
    no_network()
    assert find("who/model") == directory


def test_pull_says_that_what_is_here_is_whole_when_offline(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("who/model", **MODEL)
    find("who/model")
    offline(monkeypatch)
    with pytest.raises(NetworkError, match="who/model stays as it is here, which is whole"):
        pull("who/model", None, lambda stage: None)


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"weight_map": [1]}'])
def test_find_reads_past_an_index_that_is_broken(hub: FakeHub, text: bytes) -> None:
    repo = hub.add("who/model", **MODEL, model__safetensors__index__json=text)
    directory = find("who/model")
    (directory.parent.parent / "trees" / f"{repo.commit}.json").unlink()
    assert find("who/model") == directory


def test_download_goes_on_where_it_was_cut_off(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add("who/model", **MODEL)
    hub.cut_after = 60_000

    def stop(seconds: float) -> None:
        raise KeyboardInterrupt  # a person who stops it while the client waits to try again

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.time.sleep", stop)
        with pytest.raises(KeyboardInterrupt):
            find("who/model")
    stages: list[str] = []
    found = find_checkpoint("who/model", None, stages.append)
    assert hub.gets("model.safetensors") == [None, "bytes=60000-"]
    assert (found / "model.safetensors").read_bytes() == WEIGHTS
    assert "42 kB in 1 file, 60 kB are there already" in stages[0]
    assert list((tmp_path / "cache").rglob("*.incomplete")) == []


def test_download_is_taken_up_by_itself_after_a_broken_connection(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("who/model", **MODEL)
    hub.cut_after = 60_000
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    assert (find("who/model") / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.gets("model.safetensors") == [None, "bytes=60000-"]


def test_download_starts_anew_when_what_was_kept_is_not_sound(hub: FakeHub, tmp_path: Path) -> None:
    repo = hub.add("who/model", **MODEL)
    blobs = tmp_path / "cache" / "models--who--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{repo.etag('model.safetensors')}.incomplete").write_bytes(b"x" * 1000)
    error = error_of("who/model")
    assert "model.safetensors came out broken" in error.message
    assert (find("who/model") / "model.safetensors").read_bytes() == WEIGHTS


def test_pull_fetches_what_is_new_on_the_hub(hub: FakeHub) -> None:
    repo = hub.add("who/model", **MODEL, tokenizer__model=b"old")
    find("who/model")
    repo.files["tokenizer.model"] = b"new"
    assert (find("who/model") / "tokenizer.model").read_bytes() == b"old"
    pulled = pull("who/model", None, lambda stage: None)
    assert (pulled / "tokenizer.model").read_bytes() == b"new"
    assert len(hub.gets("model.safetensors")) == 1
    assert find("who/model") == pulled


def test_find_takes_a_revision(hub: FakeHub) -> None:
    repo = hub.add("who/model", **MODEL)
    assert find("who/model", repo.commit).name == repo.commit
    assert "has no revision v9" in error_of("who/model", "v9").message


@pytest.mark.parametrize("path", ["demo", "."])
def test_find_refuses_a_revision_of_what_is_here(path: str) -> None:
    assert "has no revisions" in error_of(path, "v9").message


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        pytest.param(401, "RepoNotFound", "or it is private", id="private"),
        pytest.param(403, "GatedRepo", "is gated", id="gated"),
        pytest.param(404, "RepoNotFound", "no model who/model on the hub", id="absent"),
        pytest.param(503, "", "the hub answers 503 Service Unavailable", id="down"),
        pytest.param(200, "", "what answers for who/model is not the hub", id="another-server"),
        pytest.param(429, "", "the hub answers 429", id="too-many-requests"),
    ],
)
def test_find_says_why_the_hub_refuses(hub: FakeHub, status: int, code: str, words: str) -> None:
    hub.add("who/model", **MODEL).refusal = (status, code)
    assert words in error_of("who/model").message


def test_find_says_that_the_hub_does_not_answer(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "the hub does not answer" in error_of("who/model").message


def test_find_refuses_a_repository_that_is_no_model(hub: FakeHub) -> None:
    hub.add("who/dataset", README__md=b"#")
    assert "has no config.json" in error_of("who/dataset").message


def test_find_takes_a_text_model_as_a_base_only(hub: FakeHub) -> None:
    config = b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    hub.add("who/vicuna", config__json=config, model__safetensors=WEIGHTS)
    assert isinstance(error_of("who/vicuna"), UnsupportedModel)
    assert hub.gets("model.safetensors") == []
    base = find_checkpoint("who/vicuna", None, lambda stage: None, as_base=True)
    assert (base / "model.safetensors").exists()


def test_find_refuses_a_repository_without_weights_of_a_known_form(hub: FakeHub) -> None:
    hub.add("who/model", config__json=CONFIG, model__gguf=WEIGHTS)
    assert isinstance(error_of("who/model"), UnsupportedModel)


def test_download_does_not_begin_when_the_disk_is_too_small(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("who/model", **MODEL)
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    error = error_of("who/model")
    assert isinstance(error, DiskFull)
    assert "needs 102 kB more" in error.message
    assert hub.gets("model.safetensors") == []


def test_download_says_that_the_disk_is_full(hub: FakeHub, tmp_path: Path) -> None:
    repo = hub.add("who/model", **MODEL)
    blobs = tmp_path / "cache" / "models--who--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{repo.etag('model.safetensors')}.incomplete").symlink_to("/dev/full")
    error = error_of("who/model")
    assert isinstance(error, DiskFull)
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == errno.ENOSPC


def test_engine_loads_an_original_checkpoint_from_the_hub_and_then_without_it(
    hub: FakeHub, no_network: Any, tmp_path: Path
) -> None:
    made = make_original(tmp_path / "made", weights="shards", mm_vision_tower="who/tower").directory
    for name, directory in (("who/model", made), ("who/tower", tmp_path / "made-tower")):
        hub.add(name).files.update({f.name: f.read_bytes() for f in directory.iterdir()})
    for attempt in ("over the network", "from the cache"):
        engine = Engine.load(ModelConfig("who/model", device="cpu"))
        asked = Conversation().ask("what is it", (noise_image(1),))
        answer = list(engine.stream(asked, SamplingParams(temperature=0, max_new_tokens=4)))
        engine.close()
        assert answer[-1].usage, attempt
        no_network()


@pytest.mark.parametrize("path", ["demo2", "./x/y", "a/b/c", "/no/such", "~nobody/x"])
def test_find_refuses_what_is_neither_directory_nor_hub_id(path: str) -> None:
    assert isinstance(error_of(path), ModelError)
