"""What deploy/ holds is what Docker, Compose, systemd, Kubernetes, Ray and nginx take."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.command_lines import (
    COMPOSE,
    DEPLOY,
    DOCKERFILES,
    MANIFESTS,
    ROOT,
    UNITS,
    documents,
)
from vlmchat.commands.options import ControllerOptions
from vlmchat.commands.worker import LimitOptions
from vlmchat.server.outgoing import AllowList
from vlmchat.server.serve import CLOSING_S

KUBERNETES = ("1.30", "1.37")  # the oldest with a sleep before the stop, and the newest known
RAY = DEPLOY / "kubernetes" / "kuberay"
OTHERS = {RAY / "cluster.yaml", RAY / "job.yaml"}  # of kinds that are not Kubernetes' own
PLAIN = [p for p in MANIFESTS if p not in OTHERS and p.name != "kustomization.yaml"]
NGINX_FOLDERS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
STOPPING_S = max(LimitOptions().drain_timeout, ControllerOptions().drain_timeout) + CLOSING_S


def _place(path: Path) -> str:
    return f"{path.parent.name}-{path.name}"


def run(*words: str | Path) -> str:
    """What a program says that finds nothing wrong."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="hadolint has no wheel for Windows")
def test_dockerfiles_are_as_hadolint_wants_them() -> None:
    run(Path(sys.executable).parent / "hadolint", *DOCKERFILES)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.suffix)
def test_dockerfile_copies_only_what_the_context_has(path: Path) -> None:
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text("utf-8"), re.M)
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )?(.+) \S+$", path.read_text("utf-8"), re.M)
    for sources in copied:
        for source in sources.split():
            assert (ROOT / source).exists()
            assert source in allowed


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.suffix)
def test_image_runs_as_nobody_special_and_holds_no_key(path: Path) -> None:
    last = path.read_text("utf-8").rsplit("\nFROM ", 1)[1]
    assert re.findall(r"^USER (.+)$", last, re.M) == ["10001"]
    assert re.search(r"^HEALTHCHECK .*CMD \[", last, re.M)
    assert not re.search(r"_KEY|TOKEN|PASSWORD", path.read_text("utf-8"))


def test_compose_files_follow_the_specification() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    run(*check, *COMPOSE)


def test_compose_cuda_changes_only_services_that_there_are() -> None:
    plain, cuda = (documents(DEPLOY / name)[0] for name in ("compose.yaml", "compose.cuda.yaml"))
    assert set(cuda["services"]) == set(plain["services"])
    assert {service["image"] for service in cuda["services"].values()} == {"vlmchat:cuda"}


def test_compose_services_wait_for_ones_that_tell_their_health() -> None:
    services = documents(DEPLOY / "compose.yaml")[0]["services"]
    for service in services.values():
        for name, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in services[name]


def test_compose_controller_lets_in_the_workers_that_there_are() -> None:
    services = documents(DEPLOY / "compose.yaml")[0]["services"]
    words = services["controller"]["command"]
    given = [words[i + 1] for i, word in enumerate(words) if word == "--allow-worker"]
    workers = [name for name, s in services.items() if s["command"][0] == "worker"]
    assert all(AllowList(given).allows(worker, "172.18.0.3") for worker in workers)
    assert not AllowList(given).allows("web", "172.18.0.4")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_units_are_as_systemd_wants_them(tmp_path: Path) -> None:
    for unit in UNITS:  # which looks for the program too
        text = unit.read_text("utf-8").replace("/opt/vlmchat/bin/vlmchat", "/bin/true")
        (tmp_path / unit.name.replace("@.", "@21002.")).write_text(text, "utf-8")
    said = run("systemd-analyze", "verify", "--man=no", *sorted(tmp_path.glob("*.service")))
    assert str(tmp_path) not in said  # of a key that it does not know it only warns


def _grace_periods() -> Iterator[tuple[str, float]]:
    """How long each is given to stop, in seconds."""
    for unit in UNITS:
        text = unit.read_text("utf-8")
        yield unit.name, float(re.findall(r"^TimeoutStopSec=(\d+)$", text, re.M)[0])
    for name, service in documents(DEPLOY / "compose.yaml")[0]["services"].items():
        yield name, float(service["stop_grace_period"].removesuffix("s"))
    for path in PLAIN:
        for document in documents(path):
            if document["kind"] == "Deployment" and path.parent.name == "cpu":
                pod = document["spec"]["template"]["spec"]
                yield path.name, pod["terminationGracePeriodSeconds"] - _slept(pod)


def _slept(pod: Any) -> float:
    stop = pod["containers"][0].get("lifecycle", {}).get("preStop", {})
    return float(stop.get("sleep", {}).get("seconds", 0))


@pytest.mark.parametrize(("name", "seconds"), list(_grace_periods()))
def test_stop_leaves_time_to_drain(name: str, seconds: float) -> None:
    assert seconds > STOPPING_S


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("path", PLAIN, ids=_place)
def test_manifest_is_one_that_kubernetes_knows(path: Path, version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for document in documents(path):
        if path.parent.name == "cuda":  # a patch: what it lacks stands in the other
            document["spec"].update(selector={})
            document["spec"]["template"].setdefault("metadata", {})
        validate(document, version, strict=True)


@pytest.mark.parametrize("overlay", ["cpu", "cuda"])
def test_kustomization_names_every_file_beside_it(overlay: str) -> None:
    folder = DEPLOY / "kubernetes" / overlay
    listed = documents(folder / "kustomization.yaml")[0]
    named = [*listed["resources"], *(patch["path"] for patch in listed.get("patches", []))]
    there = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert {name for name in named if name.endswith(".yaml")} == there


@pytest.mark.parametrize("path", PLAIN, ids=_place)
def test_pods_hear_of_no_service_by_variables(path: Path) -> None:
    """Kubernetes would set VLMCHAT_CONTROLLER_PORT and the like, which the program may read."""
    for document in documents(path):
        if document["kind"] == "Deployment" and path.parent.name == "cpu":
            assert document["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_ray_cluster_holds_pods_that_kubernetes_knows() -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    spec = documents(RAY / "cluster.yaml")[0]["spec"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}}
        validate(pod | {"spec": group["template"]["spec"]}, KUBERNETES[-1], strict=True)


def test_ray_cluster_runs_the_ray_that_is_installed() -> None:
    ray = pytest.importorskip("ray", reason="needs vlmchat[cluster]")
    assert documents(RAY / "cluster.yaml")[0]["spec"]["rayVersion"] == ray.__version__


def test_ray_job_and_service_choose_the_cluster() -> None:
    name = documents(RAY / "cluster.yaml")[0]["metadata"]["name"]
    job, service = (documents(RAY / f)[0]["spec"] for f in ("job.yaml", "service.yaml"))
    assert job["clusterSelector"] == {"ray.io/cluster": name}
    assert service["selector"] == {"ray.io/cluster": name, "ray.io/node-type": "head"}


@pytest.mark.skipif(not shutil.which("nginx") or not shutil.which("openssl"), reason="needs nginx")
def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    key, certificate, users = (tmp_path / name for name in ("key.pem", "cert.pem", "users"))
    request = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    run("openssl", *request, "-keyout", key, "-out", certificate)
    text = (DEPLOY / "proxy" / "nginx.conf").read_text("utf-8")
    text = text.replace("/etc/ssl/vlmchat/fullchain.pem", str(certificate))
    text = text.replace("/etc/ssl/vlmchat/privkey.pem", str(key))
    text = text.replace("/etc/nginx/vlmchat.htpasswd", str(users))
    whole = tmp_path / "nginx.conf"
    folders = ["access_log off;"]
    folders += [f"{kind}_temp_path {tmp_path}/{kind};" for kind in NGINX_FOLDERS]
    whole.write_text("\n".join(["events {}", "http {", *folders, text, "}"]), "utf-8")
    run("nginx", "-t", "-e", "stderr", "-g", f"pid {tmp_path}/pid;", "-c", whole)
