"""One Ray cluster of two nodes on this machine for the tests of this folder."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import fakes
import pytest
import ray.cloudpickle
from fakes import PATIENCE_S, patiently, write_config
from ray.cluster_utils import Cluster

from rlx.cluster.ray_runtime import RayRuntime

ray.cloudpickle.register_pickle_by_value(fakes)  # the actors do not have this folder on their path


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A head with one CPU, and another node with one CPU; workers as nice as the tests, not 15 more as Ray has it."""
    head = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        patiently(lambda: cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20))
    cluster.wait_for_nodes(PATIENCE_S)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="session")
def runtime(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayRuntime]:
    """Joined to the cluster, with one bundle on each node."""
    folder: Path = tmp_path_factory.mktemp("runtime")
    runtime = RayRuntime(write_config(folder, data_parallel_size=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster.address)
        patiently(runtime.start)
        asyncio.run(runtime.reserve(PATIENCE_S))
    yield runtime
    runtime.stop()
