"""What is to run on a Ray cluster, as values.

Made by `commands/cluster`, carried out by `deploy`; pickled on its way to the replicas, so a
model's loader is a function of a module, or a partial of one. No ray, no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from vlmchat.request import Backend
from vlmchat.server.app import EdgePolicy
from vlmchat.server.dispatch import CACHE_MARGIN
from vlmchat.server.failover import Limits
from vlmchat.server.worker import WorkerPolicy

APPLICATION = "vlmchat"
FRONT = "front"  # the deployment that answers HTTP
PATIENCE_S = 120.0  # that a request waits while a model's only replica is started anew


@dataclass(frozen=True, slots=True)
class Scale:
    """How many replicas: so many, or as many as the load needs between two bounds.

    ongoing: requests for each replica that scaling aims at. The delays are how long the load must
    ask for more, or for fewer, replicas before there are.
    """

    least: int = 1
    most: int = 1
    ongoing: float = 3.0
    up_delay_s: float = 30.0
    down_delay_s: float = 600.0


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model and its replicas.

    load() gives the backend, in the replica's process. resumes: whether that can go on from token
    ids. version: other replicas are needed once it has changed. health_s: between looks at each.
    policy.max_waiting: those that wait at each front for a replica's turn.
    """

    name: str
    load: Callable[[], Backend]
    policy: WorkerPolicy
    version: str
    scale: Scale = field(default_factory=Scale)
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    resumes: bool = True
    health_s: float = 10.0

    @property
    def deployment(self) -> str:
        """Its deployment's name: Ray takes no slash and no #."""
        return "model-" + re.sub(r"[^\w.-]", "_", self.name)


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """All of it: one application on one address.

    every_node: an HTTP server on each node with replicas, and fronts anywhere, not on the head
    only. version: other fronts are needed once it has changed.
    """

    models: tuple[ModelPlan, ...]
    version: str = ""
    host: str = "127.0.0.1"
    port: int = 21001
    every_node: bool = False
    edge: EdgePolicy = field(default_factory=EdgePolicy)
    limits: Limits = field(default_factory=partial(Limits, patience_s=PATIENCE_S))
    cache_margin: int = CACHE_MARGIN
    num_fronts: int = 1
