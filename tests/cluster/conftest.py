"""One Ray of two nodes for all tests here, on this machine; without ray they are passed over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.cluster.backends import echo
from tests.cluster.ports import free_port
from vlmchat.cluster.plan import ClusterPlan, ModelPlan, Scale
from vlmchat.server.worker import WorkerPolicy

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

NODE = {"num_cpus": 3, "object_store_memory": 80 * 2**20, "include_dashboard": False}
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # on a busy machine replicas would get nothing
    "OMP_NUM_THREADS": "1",
    "RAY_SERVE_SLOW_STARTUP_WARNING_S": "2",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}


@dataclass(frozen=True)
class Running:
    """Ray with Serve, on one address, whatever is deployed there."""

    ray: Cluster
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def deploy(self, *models: ModelPlan, **options: Any) -> None:
        """In place of what was deployed before; returns when it is ready."""
        from vlmchat.cluster import deploy

        deploy.deploy(ClusterPlan(models, port=self.port, **options))
        deploy.await_ready(300, lambda line: None)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'vlmchat[cluster]'")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        import ray
        from ray.cluster_utils import Cluster

        from vlmchat.cluster import deploy

        cluster = Cluster(initialize_head=True, head_node_args=dict(NODE))
        try:
            deploy.connect(cluster.address)
            yield Running(cluster, free_port())
            deploy.leave(take_down=True)
        finally:
            ray.shutdown()
            cluster.shutdown()


def model(version: str = "1", **options: Any) -> ModelPlan:
    """One that says questions again, a word every 50 ms. Of one version, replicas are kept."""
    plan = {"policy": WorkerPolicy(), "scale": Scale(2, 2), "load": partial(echo, 0.05), **options}
    return ModelPlan("echo", version=version, **plan)
