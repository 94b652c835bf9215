"""How busy a vLLM engine is, from what its engine core sends with every step.

The core counts with `log_stats` on. vLLM's front end would then keep statistics of every token of every request, which
costs more than sampling them on a small model: that part is switched off before it starts.
"""

from __future__ import annotations

import time
from typing import Any

from rlx.rollout.worker import EngineLoad


class LoadMeter:
    """Counts for one engine. `llm` is vLLM's AsyncLLM, made with log_stats and before its first request."""

    def __init__(self, llm: Any):
        self._states = llm.output_processor.request_states
        self._stats: Any = None
        self._tokens = self._preemptions = 0
        self._thrown: dict[str, int] = {}
        """Unfinished requests, and how often a swap has thrown their cache away since they last said anything"""
        self._busy_s = 0.0
        self._busy_since: float | None = None
        llm.logger_manager, llm.log_stats = None, False
        llm.output_processor.log_stats = False

    def admitted(self) -> None:
        """A request is on its way to the engine core."""
        if self._busy_since is None:
            self._busy_since = time.monotonic()

    def cleared(self) -> None:
        """A swap of weights cleared the caches. The engine core preempts what runs for that and reports it with the
        request's next token; it does not mean that the cache is too small."""
        self._thrown = {request_id: self._thrown.get(request_id, 0) + 1 for request_id in self._states}

    def received(self, outputs: Any) -> None:
        """One message of the engine core."""
        from vllm.v1.engine import EngineCoreEventType

        if outputs.scheduler_stats is not None:
            self._stats = outputs.scheduler_stats
        for output in outputs.outputs:
            self._tokens += len(output.new_token_ids)
            if output.events:
                preempted = sum(e.type == EngineCoreEventType.PREEMPTED for e in output.events)
                self._preemptions += max(0, preempted - self._thrown.pop(output.request_id, 0))

    def load(self) -> EngineLoad:
        self.settle()
        waiting, running = 0, len(self._states)
        if self._stats is not None and self._states:
            waiting = min(self._stats.num_waiting_reqs + self._stats.num_skipped_waiting_reqs, running)
            running -= waiting
        since = self._busy_since
        return EngineLoad(
            running=running,
            waiting=waiting,
            kv_cache_usage=self._stats.kv_cache_usage if self._stats is not None and self._states else 0.0,
            preemptions=self._preemptions,
            generated_tokens=self._tokens,
            busy_s=self._busy_s + (time.monotonic() - since if since is not None else 0.0),
        )

    def settle(self) -> None:
        """Stop the clock once nothing is unfinished any more."""
        if self._busy_since is not None and not self._states:
            self._busy_s += time.monotonic() - self._busy_since
            self._busy_since = None
