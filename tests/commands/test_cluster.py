"""`vlmchat cluster`: what is told before Ray is asked, and the plans that options become."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import Cli
from tests.fakes import ScriptedBackend
from tests.openai_server import OpenAIServer
from vlmchat.cluster.plan import ModelPlan
from vlmchat.commands.cluster_models import Entry, ReplicaOptions, read_models
from vlmchat.commands.options import EngineOptions, ImageOptions, ModelOptions
from vlmchat.commands.worker import LimitOptions

WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
from vlmchat.commands import main
main()
"""


@pytest.mark.parametrize("command", ["up", "status", "down"])
def test_cluster_names_the_extra_where_ray_is_not_installed(command: str) -> None:
    program = [sys.executable, "-c", WITHOUT_RAY, "cluster", command]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install 'vlmchat[cluster]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_up_starts_no_ray_where_one_was_said_to_be() -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'vlmchat[cluster]'")
    command = [sys.executable, "-m", "vlmchat", "cluster", "up", "--model-path", "demo"]
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:9"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 69
    assert done.stderr.startswith("vlmchat: no Ray cluster at 127.0.0.1:9: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        pytest.param(("--replicas", "2", "--max-replicas", "3"), "fixed number", id="both"),
        pytest.param(("--min-replicas", "3", "--max-replicas", "2"), "less than", id="bounds"),
    ],
)
def test_up_refuses_numbers_that_contradict_each_other(
    cli: Cli, arguments: tuple[str, ...], told: str
) -> None:
    done = cli("cluster", "up", *arguments)
    assert (done.code, told in done.err) == (2, True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param("models: [", "cannot read", id="no YAML"),
        pytest.param("model: {}", "it must hold a list 'models'", id="no list"),
        pytest.param("models: [demo]", "model 1 is not options", id="no options"),
        pytest.param("models: [{modelpath: a}]", "is it 'model-path'?", id="unknown"),
        pytest.param("models: [{replicas: two}]", "must be a whole number", id="type"),
        pytest.param("models: [{dtype: int3}]", "must be one of", id="choice"),
        pytest.param("models: [{replicas: 0}]", "at least 1", id="bound"),
        pytest.param("models: [{device: gpu}]", "none of auto, cpu, cuda", id="device"),
        pytest.param("models: [{max-body-bytes: 9}]", "for all models together", id="of all"),
        pytest.param("models: [{model-path: a}, {replicas: x}]", "model 2: replicas", id="second"),
    ],
)
def test_up_tells_what_is_wrong_in_its_file(cli: Cli, tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    done = cli("cluster", "up", "--file", str(file), "--json")
    error = json.loads(done.err)["error"]
    assert (done.code, error["code"]) == (2, "config")
    assert told in error["message"]
    assert str(file) in error["message"]


def plans(tmp_path: Path, text: str, **replicas: Any) -> list[ModelPlan]:
    """Of a file, on a cluster with GPUs; the options are those of the command line."""
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    own = ReplicaOptions(**replicas)
    base = Entry(ModelOptions(), EngineOptions(), LimitOptions(), ImageOptions(), own)
    return [entry.plan(has_gpus=True) for entry in read_models(base, file, {"small": "who/m"})]


def test_file_gives_each_model_its_own_options(tmp_path: Path) -> None:
    one, other = plans(
        tmp_path,
        "models: [{model-path: small, max-replicas: 4, load-4bit: true},"
        " {model-path: a/b, model-name: c, tensor_parallel: 2, max-queue-requests: 7}]",
        cpus=3.0,
    )
    assert (one.name, one.scale.least, one.scale.most, one.num_gpus) == ("m", 1, 4, 1.0)
    assert (other.name, other.scale.most, other.num_gpus) == ("c", 1, 2.0)
    assert (one.num_cpus, other.num_cpus) == (3.0, 3.0)
    assert (one.policy.max_waiting, other.policy.max_waiting) == (LimitOptions().max_queue, 7)


def test_version_is_another_once_the_model_is_but_not_for_other_numbers(tmp_path: Path) -> None:
    (one,) = plans(tmp_path, "models: [{model-path: a/b}]")
    (same,) = plans(tmp_path, "models: [{model-path: a/b, max-replicas: 4}]")
    (another,) = plans(tmp_path, "models: [{model-path: a/b, load-4bit: true}]")
    assert one.version == same.version != another.version


def test_upstream_is_called_as_it_calls_itself_and_takes_no_gpu(tmp_path: Path) -> None:
    server = OpenAIServer(ScriptedBackend())
    (plan,) = plans(tmp_path, f"models: [{{upstream: '{server.url}/v1'}}]")
    server.shutdown()
    server.server_close()
    assert (plan.name, plan.num_gpus, plan.resumes) == ("m", 0.0, False)
