"""The front: the one address before all replicas. No torch, no model.

Made by Ray Serve behind its HTTP proxy. It is the controller's app over Ray's replicas in place of
registered workers: the same routes, and answers that go on elsewhere when a replica is lost. Which
replica is asked, how many there are, where, and which are well, is Ray's to decide.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from vlmchat.cluster.attempts import ALIVE_S, Attempts
from vlmchat.cluster.plan import APPLICATION
from vlmchat.errors import InvalidRequest, ModelNotFound
from vlmchat.server.app import Edge, EdgePolicy, read_json
from vlmchat.server.controller import Controller
from vlmchat.server.controller_metrics import exposition
from vlmchat.server.dispatch import chooser, prefix_hashes
from vlmchat.server.failover import Item, Limits, Relay, Wire
from vlmchat.server.outgoing import AllowList, Outgoing, read
from vlmchat.server.registry import Registry, WorkerStatus

COUNT_PATH = "/v1/vlmchat/count"
CLIENT_HEADER = "x-vlmchat-client"
_METRICS_TIMEOUT_S = 3.0
_TICK_S = 1.0


class Front(Controller):
    """The controller's routes, with Ray behind them."""

    def __init__(self, limits: Limits) -> None:
        registry = Registry(chooser("shortest_queue", Random()), time.monotonic, 2 * ALIVE_S)
        super().__init__(registry, Outgoing(AllowList()), limits, dispatch_method="ray")
        self._relay_limits = limits
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._resumes: dict[str, bool] = {}

    def deploy(self, models: dict[str, Item]) -> None:
        """models: name -> its `deployment`, and whether it `resumes`, of all that there are now."""
        self._resumes = {name: bool(model["resumes"]) for name, model in models.items()}
        self._handles = {
            name: self._handles.get(name)
            or serve.get_deployment_handle(model["deployment"], APPLICATION)
            for name, model in models.items()
        }

    def beat(self, name: str, told: Item) -> None:
        """A replica's word. Raises InvalidRequest for what is none."""
        status = WorkerStatus.parse(told)
        known = {worker.name for worker in self.registry.workers}
        if name not in known:
            self.registry.register(name, True, status)
        else:
            self.registry.beat(name, status.queue_length, status.ours)

    async def run(self) -> None:
        """Until cancelled: forget replicas that are silent."""
        while True:
            self.registry.expire()
            await asyncio.sleep(_TICK_S)

    def edge(self, policy: EdgePolicy, log: Callable[[dict[str, Any]], None]) -> ASGIApp:
        """The application."""
        return Edge(self._routes(), policy, log)

    def _routes(self) -> list[BaseRoute]:
        first = [
            Route("/get_worker_address", self._own_address, methods=["POST"]),
            Route("/refresh_all_workers", self._nothing, methods=["POST"]),
            Route(COUNT_PATH, self._count, methods=["POST"]),
            Route("/metrics", self._all_metrics, methods=["GET"]),
        ]
        return [*first, *super()._routes()]

    def _relay(self, request: Request, wire: Wire, model: str, prefixes: Sequence[str]) -> Relay:
        record = request.state.record
        record["model"] = model[:200]
        attempts = self._attempts(model)
        record["replicas"] = attempts.tried
        return Relay(
            attempts,
            attempts,
            self._relay_limits,
            wire,
            model,
            prefixes,
            {"x-request-id": record["request_id"], CLIENT_HEADER: record["client"]},
        )

    def _attempts(self, model: str) -> Attempts:
        handle = self._handles.get(model)
        if handle is None:
            known = ", ".join(self._handles) or "none"
            raise ModelNotFound(f"no replica serves {model[:200]}; served are: {known}")
        return Attempts(self.registry, handle, model, resumes=self._resumes[model])

    async def _own_address(self, request: Request) -> Response:
        """Where clients may go by themselves is here."""
        body = await read_json(request)
        model = body.get("model") if isinstance(body, dict) else None
        host = request.headers.get("host", "")
        here = f"{request.url.scheme}://{host}"
        return JSONResponse({"address": here if model in self._handles else ""})

    async def _nothing(self, request: Request) -> Response:
        return JSONResponse(None)

    async def _count(self, request: Request) -> Response:
        """A replica counts."""
        body = await read_json(request)
        models = list(self._handles)
        model = body.get("model") if isinstance(body, dict) else None
        model = models[0] if model is None and len(models) == 1 else model
        if not isinstance(model, str):
            raise InvalidRequest("model is missing; it is the name of a model")
        messages = body.get("messages")
        attempts = self._attempts(model)
        attempts.lease(
            model,
            prefix_hashes(messages) if isinstance(messages, list) else (),
            (),
            lambda worker: True,
        )
        async with attempts.stream(COUNT_PATH, body, {}) as response:
            answer = await read(response)
        return Response(answer.body, answer.status, media_type="application/json")

    async def _all_metrics(self, request: Request) -> Response:
        """The front's own, and those of every replica with its name as a label."""
        pages = await asyncio.gather(*map(self._pages, self._handles.values()))
        own = exposition(self.counts, self.registry.workers, len(self._under_way))
        told = merged([page for one in pages for page in one])
        return Response(own + told, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _pages(self, handle: DeploymentHandle[Any]) -> list[tuple[str, bytes]]:
        try:
            found = await handle.broadcast("metrics").results_async(
                timeout_s=_METRICS_TIMEOUT_S, return_exceptions=True
            )
        except TimeoutError:
            return []
        return [page for page in found if not isinstance(page, BaseException)]


class _Pages(Collector):
    """The families of several pages, each sample with its replica."""

    def __init__(self, pages: Sequence[tuple[str, bytes]]) -> None:
        self._pages = pages

    def collect(self) -> list[Metric]:
        families: dict[str, Metric] = {}
        for replica, page in self._pages:
            for family in text_string_to_metric_families(page.decode()):
                whole = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "replica": replica}
                    whole.add_sample(sample.name, labels, sample.value)
        return list(families.values())


def merged(pages: Sequence[tuple[str, bytes]]) -> bytes:
    """One page for Prometheus of (replica, page)."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Pages(pages))
    return generate_latest(registry)


@serve.ingress()
class Ingress:
    """What Ray Serve makes of the front."""

    def __init__(self, policy: EdgePolicy, limits: Limits, *behind: DeploymentHandle[Any]) -> None:
        """behind: every model's deployment, so that Ray makes them; `reconfigure` names them."""
        self._policy = policy
        self._front = Front(limits)
        self._running = asyncio.get_running_loop().create_task(self._front.run())

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._front.edge(self._policy, _log_line)

    def reconfigure(self, config: dict[str, Any]) -> None:
        """Ray hands the plan's names here, at the start and when they change."""
        self._front.deploy(config["models"])

    async def beat(self, name: str, told: Item) -> None:
        """See `Front.beat`."""
        self._front.beat(name, told)


def _log_line(record: dict[str, Any]) -> None:
    print(json.dumps(record), file=sys.stderr, flush=True)
