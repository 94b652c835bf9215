"""Time of a weight update (learner's parameters → bytes → HTTP → shared memory → vLLM), beside copying the same bytes.

Limit: applying. vLLM unpacks and repacks every layer, about 1 GB/s on a CPU; the copies before it are faster.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
from service import print_versions, running_service

from rlx.learner.model import load_model, rollout_dtype
from rlx.learner.publish import Publisher, pack

REPEATS = 12


def main() -> None:
    print_versions()
    with running_service() as (config, client):
        model, dtype = load_model(config), rollout_dtype(config)
        _, payload = pack(model, dtype, 1)
        publisher = Publisher(client, dtype)
        publisher.publish(model)
        totals, pauses, packs, copies = [], [], [], []
        source = np.frombuffer(payload, np.uint8)
        for _ in range(REPEATS):
            began = time.perf_counter()
            source.copy()
            copies.append(time.perf_counter() - began)
            began = time.perf_counter()
            pack(model, dtype, 1)
            packs.append(time.perf_counter() - began)
            times = publisher.publish(model)
            totals.append(times.total_s)
            pauses.append(times.pause_s)
    rows = (
        ("copy of the bytes", copies),
        ("packing on the learner", packs),
        ("commit on the workers", pauses),
        ("whole update", totals),
    )
    print(f"{len(payload) / 1e6:.2f} MB, {REPEATS} updates, median (min to max), milliseconds")
    for name, values in rows:
        ms = [1000 * value for value in values]
        print(f"  {name:24} {statistics.median(ms):8.2f}  ({min(ms):.2f} to {max(ms):.2f})")
    print(f"  whole update ÷ copy      {statistics.median(totals) / statistics.median(copies):8.0f}")


if __name__ == "__main__":
    main()
