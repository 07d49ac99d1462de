"""`vlmchat status`: what a controller, ours or LLaVA's, says of its workers."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from vlmchat.commands.exit import reporting
from vlmchat.commands.options import first_key
from vlmchat.errors import NetworkError

_TIMEOUT_S = 10.0


def status(
    controller_url: Annotated[
        str,
        typer.Option(
            "--controller-url",
            "--controller-address",
            metavar="URL",
            envvar="VLMCHAT_CONTROLLER_URL",
            help="The controller's address.",
        ),
    ] = "http://localhost:21001",
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="VLMCHAT_API_KEY",
            callback=first_key,
            help="Its key, if it has one.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Show a controller's workers, models and queues."""
    with reporting(as_json=as_json, debug=False):
        found = _ask(controller_url.rstrip("/"), api_key)
        if as_json:
            print(json.dumps({"type": "status", "controller_url": controller_url, **found}))
        else:
            print(*_lines(found), sep="\n")


def _ask(url: str, key: str | None) -> dict[str, Any]:
    """The status; of LLaVA's controller, what it tells. Raises NetworkError."""
    import httpx2

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx2.Client(headers=headers, timeout=_TIMEOUT_S, trust_env=False) as client:
            answer = client.get(f"{url}/status")
            if answer.status_code in (404, 405):
                answer = client.post(f"{url}/worker_get_status")
                told = _told(answer, url)
                return {
                    "models": told.get("model_names", []),
                    "queue_length": told.get("queue_length"),
                    "speed": told.get("speed"),
                    "workers": None,
                }
            return _told(answer, url)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NetworkError(f"{url}: {reason}; is the controller running?") from None


def _told(answer: Any, url: str) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError:
        body = None
    if answer.status_code != 200 or not isinstance(body, dict):
        error = body.get("error") if isinstance(body, dict) else None
        reason = error.get("message") if isinstance(error, dict) else "is this a controller?"
        raise NetworkError(f"{url} answered {answer.status_code}: {reason}")
    return body


def _lines(found: dict[str, Any]) -> list[str]:
    """For people: a line for the controller, one for each worker."""
    workers = found.get("workers")
    models = ", ".join(found.get("models") or []) or "none"
    if workers is None:
        return [
            "a controller of LLaVA's, which tells no more than this",
            f"models {models}, queue {found.get('queue_length')}, speed {found.get('speed')}",
        ]
    up = f"up {found['uptime_s']:.0f} s, {found['dispatch_method']}"
    counts = f"{found['requests']} requests, {found['failovers']} failovers"
    return [f"{up}, {counts}, {found['under_way']} under way", f"models: {models}"] + [
        _worker_line(worker) for worker in workers
    ]


def _worker_line(worker: dict[str, Any]) -> str:
    limit = f" of {worker['limit']}" if worker.get("limit") else ""
    hits = worker.get("hit_rate")
    cached = f", {hits:.0%} of prompts cached" if hits is not None else ""
    state = "" if worker["healthy"] else f", not well: {worker.get('trouble')}"
    return (
        f"{worker['name']}: {', '.join(worker['models'])}; queue {worker['queue_length']}{limit}"
        f"{cached}, last beat {worker['last_heart_beat_s']:.0f} s ago{state}"
    )
