"""A Ray actor on this node whose process, and all that it started, can be ended for sure."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlx.cluster.calls import create
from rlx.processes import descendants, end_processes, start_of


class KillableActor:
    """Runs on the gateway's node, where the folder of the YAML is: nothing has to be shipped to a cluster, and user
    code finds the files next to it."""

    def __init__(self, label: str):
        self.label = label
        self.handle: Any = None
        self.pid = 0
        self.start = 0
        """Of the process, as `start_of` gives it."""

    async def create(self, actor_class: type, *arguments: Any, **options: Any) -> Any:
        """Make the actor; its handle. Call `runs_as` with the process id that it tells."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # No CPU is asked of Ray: the engines may have reserved all of them.
        self.handle = await create(actor_class, self.label, *arguments, num_cpus=0, scheduling_strategy=here, **options)
        return self.handle

    def runs_as(self, pid: int) -> None:
        self.pid, self.start = pid, start_of(pid) or 0

    def kill(self, grace_s: float = 0.0) -> None:
        """End the process and everything below it, whatever it is doing. Idempotent.

        Ray prints a warning about a process that it did not end itself: it gets `grace_s` seconds for that, while this
        blocks.
        """
        handle, self.handle = self.handle, None
        if handle is None:
            return
        below = descendants(self.pid) if self.pid else {}
        ray.kill(handle)
        end_processes({self.pid: self.start}, grace_s)
        end_processes(below, 0.0)
