"""`vlmchat models` and aliases: over real directories, a real cache and a hub on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands.conftest import Cli, Run, Terminal
from tests.fake_hub import FakeHub, serve
from tests.tiny import make_tiny_llava
from vlmchat.engine.hub import find_tower

Write = Callable[[str], Path]
ROOT = Path(__file__).parents[2]
ORIGINAL = {
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_vision_tower": "who/tower",
    "max_position_embeddings": 4096,
    "tokenizer_model_max_length": 2048,
    "num_hidden_layers": 2,
}


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a random LLaVA in the Hugging Face layout."""
    directory = make_tiny_llava(tmp_path_factory.mktemp("tiny"))
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture
def tiny(tiny_files: dict[str, bytes], tmp_path: Path) -> Path:
    return write(tmp_path / "tiny", tiny_files)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with serve(monkeypatch, str(tmp_path / "cache")) as running:
        yield running


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int, str], None]:
    """Sets the free main memory in bytes, and what `nvidia-smi` prints."""

    def set_memory(num_bytes: int, gpus: str) -> None:
        free = type("Memory", (), {"available": num_bytes})
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
        tool = write(tmp_path / "bin", {"nvidia-smi": f"#!/bin/sh\nprintf '{gpus}'".encode()})
        (tool / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tool), prepend=os.pathsep)

    return set_memory


def write(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def out(run: Run) -> dict[str, Any]:
    """What --json printed."""
    value: dict[str, Any] = json.loads(run.out)
    assert value["schema"] == 1
    return value


def cached(cli: Cli, hub: FakeHub, files: dict[str, bytes], name: str = "who/model") -> Path:
    hub.add(name).files.update(files)
    return Path(out(cli("models", "pull", name, "--json"))["directory"])


def original(tmp_path: Path, **tensors: torch.Tensor) -> Path:
    """A checkpoint in LLaVA's own layout, as far as its table of tensors goes."""
    directory = write(tmp_path / "original", {"config.json": json.dumps(ORIGINAL).encode()})
    own = {"model.embed_tokens.weight": torch.zeros(8, 4, dtype=torch.float16)}
    for layer in range(2):
        own[f"model.layers.{layer}.self_attn.q_proj.weight"] = torch.zeros(4, 4)
    torch.save(own | tensors, directory / "pytorch_model.bin")
    return directory


def rows(cli: Cli) -> dict[str, Any]:
    """What the list shows, by model, but for the demo."""
    listed = out(cli("models", "list", "--json"))["models"]
    return {row["model"]: row for row in listed if row["model"] != "demo"}


@pytest.mark.usefixtures("hub")
def test_models_list_is_empty_on_a_new_machine(cli: Cli) -> None:
    assert rows(cli) == {}


def test_models_list_shows_cache_aliases_and_sessions(
    cli: Cli, hub: FakeHub, tiny: Path, tiny_files: dict[str, bytes], config_file: Write
) -> None:
    cached(cli, hub, tiny_files)
    config_file('[models]\nmine = "who/model"\nfar = "who/far"')
    sessions = Path(os.environ["XDG_STATE_HOME"]) / "vlmchat" / "sessions"
    write(sessions, {"a.json": json.dumps({"model": str(tiny)}).encode(), "b.json": b"{"})
    listed = rows(cli)
    assert list(listed) == ["who/model", str(tiny), "who/far"]
    assert listed["who/model"] == {
        "model": "who/model",
        "kind": "LLaVA",
        "bytes": sum(map(len, tiny_files.values())),
        "aliases": ["mine"],
        "problem": None,
    }
    assert listed["who/far"]["problem"] == "not on this machine"
    assert f"{'who/model':{len(str(tiny))}}  LLaVA" in cli("models", "list").out


def test_models_list_leaves_out_what_is_no_model_of_ours(cli: Cli, hub: FakeHub) -> None:
    hub.add("who/tower", config__json=b'{"model_type": "clip"}', model__safetensors=b"x")
    find_tower("who/tower", Path("."), lambda stage: None)
    assert rows(cli) == {}


def test_models_list_says_what_a_model_lacks(
    cli: Cli, hub: FakeHub, tiny_files: dict[str, bytes]
) -> None:
    (cached(cli, hub, tiny_files) / "model.safetensors").unlink()
    assert rows(cli)["who/model"]["problem"] == "incomplete: lacks model.safetensors"
    assert "incomplete: lacks model.safetensors" in cli("models", "list").out


def test_models_show_tells_what_the_model_takes(cli: Cli, tiny: Path) -> None:
    shown = out(cli("models", "show", str(tiny), "--json"))
    assert (shown["family"], shown["layout"]) == ("LLaVA", "hugging-face")
    numbers = sum(tensor.numel() for tensor in load_file(tiny / "model.safetensors").values())
    assert shown["parameters"] == numbers
    assert shown["memory"]["float32"]["bytes"] == round(numbers * 4 * 1.1)
    assert shown["memory"]["4bit"]["bytes"] < shown["memory"]["8bit"]["bytes"]
    assert (shown["context_length"], shown["image_tokens"]) == (256, {"min": 4, "max": 4})
    assert shown["template"] == "the checkpoint's own"
    assert shown["problem"] is None


def test_models_show_says_where_the_model_fits(
    cli: Cli, tiny: Path, memory: Callable[[int, str], None]
) -> None:
    memory(400_000, "1\\n0\\n")
    shown = out(cli("models", "show", str(tiny), "--json"))
    assert shown["free_memory"] == {"cuda:0": 2**20, "cuda:1": 0, "cpu": 400_000}
    fits = {"cuda:0": True, "cuda:1": False, "cpu": False}
    assert shown["memory"]["float32"] == {"bytes": 688512, "fits": fits}
    text = cli("models", "show", str(tiny)).out
    assert "float32       689 kB of memory, fits on cuda:0\n" in text
    assert "4bit          233 kB of memory, fits on cuda:0, cpu\n" in text


def test_models_show_says_that_the_model_fits_nowhere(
    cli: Cli, tiny: Path, memory: Callable[[int, str], None]
) -> None:
    memory(1000, "No devices were found\\n")
    assert "4bit          233 kB of memory, does not fit\n" in cli("models", "show", str(tiny)).out


def test_models_show_reads_the_original_layout_without_its_tower(cli: Cli, tmp_path: Path) -> None:
    shown = out(cli("models", "show", str(original(tmp_path)), "--json"))
    assert (shown["layout"], shown["vision_tower"]) == ("original", "who/tower")
    assert (shown["parameters"], shown["context_length"]) == (64, 2048)
    assert shown["image_tokens"] is None
    assert shown["memory"] == {}
    text = cli("models", "show", str(tmp_path / "original")).out
    assert "vision tower  who/tower (not on this machine)\n" in text


def test_models_show_counts_the_tower_of_the_original_layout(cli: Cli, tmp_path: Path) -> None:
    directory = original(tmp_path)
    vision = {"image_size": 28, "patch_size": 14}
    tower = write(directory / "who/tower", {"config.json": json.dumps(vision).encode()})
    table = {"vision_model.x": torch.zeros(10), "text_model.x": torch.zeros(99)}
    save_file(table, tower / "model.safetensors")
    shown = out(cli("models", "show", str(directory), "--json"))
    assert (shown["parameters"], shown["image_tokens"]) == (74, {"min": 4, "max": 4})
    assert shown["memory"]["bfloat16"]["bytes"] == round(74 * 2 * 1.1)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        pytest.param({"image_aspect_ratio": "pad"}, (576, 576), id="pad"),
        pytest.param({"mm_vision_select_feature": "cls_patch"}, (577, 577), id="class-token"),
        pytest.param({"image_aspect_ratio": "anyres"}, (1728, 2880), id="flat"),
        pytest.param(
            {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"},
            (576, 2928),
            id="unpadded",
        ),
    ],
)
def test_image_tokens_are_those_of_the_original(
    config: dict[str, Any], tokens: tuple[int, int]
) -> None:
    """The most tokens of LLaVA-1.6 are 2928, measured on LLaVA's own code."""
    from vlmchat.engine.checkpoint import image_tokens

    grids = "[[336,672],[672,336],[672,672],[1008,336],[336,1008]]"
    vision = {"image_size": 336, "patch_size": 14}
    assert image_tokens(ORIGINAL | {"image_grid_pinpoints": grids} | config, vision) == tokens


@pytest.mark.parametrize("value", [None, 5, "5", "(", [1, 2], [["a", "b"]], True])
@pytest.mark.parametrize(
    "key", ["image_grid_pinpoints", "text_config", "vision_config", "architectures", "model_type"]
)
def test_odd_values_in_a_config_are_no_reason_to_fail(
    tmp_path: Path, key: str, value: object
) -> None:
    from vlmchat.engine.checkpoint import inspect

    config = ORIGINAL | {"image_aspect_ratio": "anyres", key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert inspect(tmp_path, "x").image_tokens is None


def test_models_show_names_a_model_that_is_not_here(cli: Cli, hub: FakeHub) -> None:
    run = cli("models", "show", "who/model")
    assert (run.code, run.out) == (72, "")
    assert "'vlmchat models pull who/model' downloads it" in run.err
    assert hub.requests == []


def test_models_pull_says_what_comes_and_where_it_is(
    cli: Cli, hub: FakeHub, tiny_files: dict[str, bytes]
) -> None:
    hub.add("who/model").files.update(tiny_files)
    run = cli("models", "pull", "who/model")
    assert run.err.startswith("downloading who/model: 644 kB in 6 files (Ctrl-C stops")
    assert (Path(run.out.strip()) / "model.safetensors").exists()
    assert "downloading" not in cli("models", "pull", "who/model").err


@pytest.mark.parametrize("model", ["demo", "{tiny}", "nonsense"])
def test_models_pull_refuses_what_is_no_hub_id(cli: Cli, tiny: Path, model: str) -> None:
    run = cli("models", "pull", model.format(tiny=tiny))
    assert run.code == 2
    assert "hub id" in run.err
    assert run.err.count("\n") == 1


def test_models_pull_keeps_what_has_arrived_when_ctrl_c_stops_it(
    hub: FakeHub, tmp_path: Path
) -> None:
    """A real process, a real signal: the next start asks for the rest only."""
    hub.add(
        "who/model", config__json=b'{"model_type": "llava"}', model__safetensors=b"w" * 40 * 2**20
    )
    hub.cut_after, hub.stall = 25 * 2**20, threading.Event()
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "vlmchat", "models", "pull", "who/model"]
    options: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdout": -1, "stderr": -1}
    with subprocess.Popen(command, **options) as process:
        blobs = tmp_path / "cache" / "models--who--model" / "blobs"
        deadline = time.monotonic() + 60
        while not any(f.stat().st_size >= 20 * 2**20 for f in blobs.glob("*.incomplete")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    hub.stall.set()
    assert (process.returncode, err.decode().splitlines()[-1]) == (130, "vlmchat: interrupted")
    second = subprocess.run(command, **options, timeout=60, check=True)
    assert b"21 MB in 1 file, 21 MB are there already" in second.stderr
    assert hub.gets("model.safetensors") == [None, f"bytes={20 * 2**20}-"]
    weights = Path(second.stdout.decode().strip()) / "model.safetensors"
    assert weights.read_bytes() == b"w" * 40 * 2**20


def test_models_rm_deletes_from_the_cache_only_what_it_names(
    cli: Cli, hub: FakeHub, tmp_path: Path, tiny_files: dict[str, bytes]
) -> None:
    kept = cached(cli, hub, {**tiny_files, "extra.json": b"{}"}, "who/other")
    gone = cached(cli, hub, tiny_files)
    removed = out(cli("models", "rm", "who/model", "--yes", "--json"))
    assert removed["bytes"] == sum(map(len, tiny_files.values()))
    assert not gone.exists()
    assert list((tmp_path / "cache").rglob("*who--model*")) == []
    assert cli("models", "verify", "who/other").code == 0
    assert kept.exists()


def test_models_rm_deletes_a_download_that_has_only_begun(
    cli: Cli, hub: FakeHub, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "models--who--model"
    write(folder / "blobs", {"abc.incomplete": b"x" * 10})
    assert cli("models", "rm", "who/model", "--yes").out == "deleted who/model, 10 B\n"
    assert not folder.exists()


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("\n", 2), ("no\n", 2)])
def test_models_rm_asks(
    cli: Cli,
    hub: FakeHub,
    tiny_files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    code: int,
) -> None:
    directory = cached(cli, hub, tiny_files)
    monkeypatch.setattr("tests.commands.conftest.Terminal", lambda: Terminal(answer))
    run = cli("models", "rm", "who/model")
    assert run.code == code
    assert "delete who/model, 646 kB, from" in run.err
    assert directory.exists() is (code == 2)


def test_models_rm_needs_yes_where_it_cannot_ask(
    cli: Cli, hub: FakeHub, tiny_files: dict[str, bytes]
) -> None:
    directory = cached(cli, hub, tiny_files)
    run = cli("models", "rm", "who/model", stdin=b"y\n")
    assert (run.code, directory.exists()) == (2, True)
    assert "--yes" in run.err


@pytest.mark.parametrize("model", ["demo", "{tiny}", "who/none", "../cache", "who--model"])
def test_models_rm_refuses_what_is_not_in_the_cache(
    cli: Cli, hub: FakeHub, tiny: Path, model: str
) -> None:
    run = cli("models", "rm", model.format(tiny=tiny), "--yes")
    assert run.code == 72
    assert "is not in the cache" in run.err
    assert (tiny / "config.json").exists()


def test_models_rm_does_not_follow_a_link_out_of_the_cache(
    cli: Cli, hub: FakeHub, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "models--who--model").symlink_to(tiny, target_is_directory=True)
    run = cli("models", "rm", "who/model", "--yes")
    assert run.code == 72
    assert (tiny / "config.json").exists()


def test_models_verify_checks_tensors_and_hashes(
    cli: Cli, hub: FakeHub, tiny: Path, tiny_files: dict[str, bytes]
) -> None:
    cached(cli, hub, tiny_files)
    checked = out(cli("models", "verify", "who/model", "--json"))
    tensors = len(load_file(tiny / "model.safetensors"))
    assert checked["checked"] == {"files": 7, "tensors": tensors, "hashes": 7}
    assert (checked["ok"], checked["problems"]) == (True, [])
    assert (
        cli("models", "verify", str(tiny)).out == f"checked 7 files, {tensors} tensors, 0 hashes\n"
    )


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        pytest.param("model.safetensors", flip_last_byte, "hash is not the hub's", id="a-bit"),
        pytest.param("tokenizer.json", flip_last_byte, "hash is not the hub's", id="small-file"),
        pytest.param("model.safetensors", cut, "not the", id="cut"),
        pytest.param("tokenizer.json", cut, "bytes, the hub has", id="small-cut"),
        pytest.param("model.safetensors", Path.unlink, "model.safetensors is missing", id="gone"),
    ],
)
def test_models_verify_names_a_damaged_file(
    cli: Cli,
    hub: FakeHub,
    tiny_files: dict[str, bytes],
    name: str,
    damage: Callable[[Path], None],
    words: str,
) -> None:
    damage(cached(cli, hub, tiny_files) / name)
    run = cli("models", "verify", "who/model", "--json")
    assert run.code == 65
    assert any(name in p and words in p for p in out(run)["problems"])
    assert json.loads(run.err)["error"]["code"] == "checkpoint"


def test_models_verify_names_a_tensor_that_a_layer_lacks(cli: Cli, tiny: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    del tensors[name]
    save_file(tensors, tiny / "model.safetensors")
    assert cli("models", "verify", str(tiny)).out.startswith(f"{name} is missing\n")


def test_models_verify_names_layers_that_only_the_config_knows(cli: Cli, tmp_path: Path) -> None:
    directory = original(tmp_path)
    config = ORIGINAL | {"num_hidden_layers": 3}
    (directory / "config.json").write_text(json.dumps(config))
    run = cli("models", "verify", str(directory))
    assert run.out.startswith("model.layers.2.self_attn.q_proj.weight is missing\n")


def test_models_verify_names_a_tensor_of_the_index(cli: Cli, tiny: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "model-00001-of-00001.safetensors")
    names = {"stranger": "model-00001-of-00001.safetensors"}
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "stranger is missing" in cli("models", "verify", str(tiny)).err


def test_models_verify_opens_no_pickle_that_holds_more_than_tensors(
    cli: Cli, tmp_path: Path
) -> None:
    directory = original(tmp_path)
    torch.save(torch.nn.Linear(1, 1), directory / "pytorch_model.bin")
    run = cli("models", "verify", str(directory))
    assert run.code == 65
    assert "torch.nn.modules.linear.Linear, which is not allowed" in run.err


def test_models_list_and_show_import_no_torch(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from vlmchat.commands import command\n"
        f"for words in (['list'], ['show', {str(tiny)!r}]):\n"
        "    command().main(['models', *words], standalone_mode=False)\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache")}
    assert subprocess.run([sys.executable, "-c", code], env=environment, stdout=-1).returncode == 0


def test_models_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from vlmchat.commands import command\n"
        "command().main(['models', 'pull', '--help'], standalone_mode=False)\n"
        "sys.exit(bool({'huggingface_hub', 'torch', 'psutil'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=-1).returncode == 0


def test_alias_stands_for_a_model(cli: Cli, config_file: Write) -> None:
    config_file('model-path = "mine"\n[models]\nmine = "who/model"\nbase = "who/base"')
    cli("chat", "-p", "x", "--model-base", "base")
    assert (cli.loaded[0].path, cli.loaded[0].base) == ("who/model", "who/base")
    cli("chat", "-p", "x", "--model-path", "demo")
    assert cli.loaded[1].path == "demo"


def test_alias_wins_over_a_directory_of_its_name(
    cli: Cli, config_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file('[models]\nmine = "who/model"')
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    cli("chat", "-p", "x", "--model-path", "mine")
    cli("chat", "-p", "x", "--model-path", "./mine")
    assert [config.path for config in cli.loaded] == ["who/model", "./mine"]


@pytest.mark.parametrize("command", [["chat", "-p", "x", "--model-path"], ["models", "show"]])
def test_alias_that_is_mistyped_is_told_with_the_nearest(
    cli: Cli, config_file: Write, command: list[str]
) -> None:
    config_file('[models]\nllava = "who/model"\nllava-13b = "who/larger"')
    run = cli(*command, "llva")
    assert (run.code, run.out) == (72, "")
    assert run.err == "vlmchat: no model llva; did you mean llava or llava-13b?\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("models = 1", "'models' must be a table", id="no-table"),
        pytest.param("[models]\nx = 1", "models.x is 1; it must be a text", id="number"),
        pytest.param('[models]\n"a/b" = "c/d"', "'a/b' cannot stand for a model", id="slash"),
        pytest.param('[models]\ndemo = "c/d"', "'demo' cannot stand for a model", id="demo"),
    ],
)
@pytest.mark.parametrize("command", [["chat", "-p", "x"], ["models", "list"]], ids=str)
def test_aliases_are_checked(
    cli: Cli, config_file: Write, command: list[str], text: str, words: str
) -> None:
    path = config_file(text)
    run = cli(*command)
    assert (run.code, run.err.count("\n")) == (2, 1)
    assert str(path) in run.err
    assert words in run.err


def test_config_shows_aliases_as_a_config_file_does(cli: Cli, config_file: Write) -> None:
    config_file('[models]\nmine = "who/model"')
    assert cli("config").out.endswith('\n\n[models]\n"mine" = "who/model"\n')
    assert json.loads(cli("config", "--json").out)["models"] == {"mine": "who/model"}


def test_models_report_errors_as_json(cli: Cli) -> None:
    run = cli("models", "show", "./nowhere", "--json")
    assert json.loads(run.err)["error"]["exit_code"] == run.code == 72
