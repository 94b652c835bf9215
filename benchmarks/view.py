"""The run's page: what opening it costs, what an update costs, and the memory of `rlx view`.

    .venv/bin/python benchmarks/view.py                  100,000 samples, and again with a samples.jsonl of 1 GiB
    .venv/bin/python benchmarks/view.py --quick          the first only

A run is made in a temporary folder, `rlx view` serves it as a process of its own. Asked over HTTP, medians of 5: the
first page of samples, the best of all (which needs every sample looked at, once), the state, the state after one more
step. With Chromium installed, also the time until the page shows the run's numbers, and what the page holds then. The
files are in the page cache, as they were just written.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from local_parts import arguments, machine, write_json
from service import print_versions

STEPS, METRICS, REPEATS = 20_000, 50, 5
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def write_run(folder: Path, samples: int, least_bytes: int) -> int:
    """Samples until there are that many, and so many bytes; returns their number."""
    draw = random.Random(0)
    with (folder / "metrics.jsonl").open("w") as stream:
        for step in range(1, STEPS + 1):
            stream.write(metrics(step, draw))
    bodies = []
    for _ in range(64):
        tokens = draw.randint(20, 200) if not least_bytes else draw.randint(200, 2000)
        row = {
            "ids": draw.choices(range(150_000), k=tokens),
            "logprobs": [round(-draw.random(), 6) for _ in range(tokens)],
            "versions": [[1, tokens]],
        }
        record = {
            "prompt": [{"role": "user", "content": "a question " * 10}],
            "completion": "word " * tokens,
            "rows": [row],
        }
        bodies.append(json.dumps({**record, "status": "ok", "worker": "rlx-rollout-0"})[1:])
    count = 0
    with (folder / "samples.jsonl").open("w") as stream:
        while count < samples or stream.tell() < least_bytes:
            head = {
                "step": count // 8 + 1,
                "key": f"run/{count // 8}",
                "index": count % 8,
                "rewards": {"right": draw.random()},
            }
            stream.write(f"{json.dumps(head)[:-1]}, {bodies[count % 64]}\n")
            count += 1
    return count


def metrics(step: int, draw: random.Random) -> str:
    values = {f"part/metric_{i}": draw.random() for i in range(METRICS)}
    return json.dumps({"step": step, "time": 1.7e9 + step, "reward": draw.random(), **values}) + "\n"


def get(url: str) -> tuple[float, int, dict[str, Any]]:
    """Seconds, bytes and the answer."""
    request = urllib.request.Request(url, headers={"accept-encoding": "identity"})
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=120) as answer:
        body = answer.read()
    return time.perf_counter() - began, len(body), json.loads(body)


def repeated(ask: Callable[[], tuple[float, int, dict[str, Any]]]) -> tuple[float, int]:
    answers = [ask() for _ in range(REPEATS)]
    return statistics.median(seconds for seconds, _, _ in answers), answers[-1][1]


def measure(folder: Path, samples: int, least_bytes: int) -> dict[str, float]:
    found: dict[str, float] = {"samples": write_run(folder, samples, least_bytes)}
    found["samples_mb"] = (folder / "samples.jsonl").stat().st_size / 1e6
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "rlx.cli", "view", str(folder), "--no-browser"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().rsplit(": ", 1)[1].split()[0]
        _, _, page = get(f"{address}view/samples?limit=30")
        found["open_to_first_samples_s"] = time.perf_counter() - began
        times = psutil.Process(process.pid).cpu_times()
        found["open_to_first_samples_cpu_s"] = times.user + times.system
        assert page["samples"]
        found["first_samples_s"], _ = repeated(lambda: get(f"{address}view/samples?limit=30"))
        began, indexed = time.perf_counter(), 0.0
        while indexed < 1:
            _, _, page = get(f"{address}view/samples?limit=30&order=best")
            indexed = page["indexed"]
        found["best_of_all_once_s"] = time.perf_counter() - began
        found["best_of_all_again_s"], _ = repeated(lambda: get(f"{address}view/samples?limit=30&order=best"))
        found["first_state_s"], found["first_state_bytes"], state = get(f"{address}view/state")
        found["update_s"], found["update_bytes"] = repeated(lambda: one_more(folder, address, state))
        found["nothing_new_s"], found["nothing_new_bytes"] = repeated(lambda: get(address + seen(state)))
        found["server_rss_mb"] = psutil.Process(process.pid).memory_info().rss / 1e6
        found |= in_browser(address)
    finally:
        process.terminate()
        process.wait(30)
    return found


def seen(state: dict[str, Any]) -> str:
    return f"view/state?generation={state['generation']}&metrics={state['metrics']['count']}"


def one_more(folder: Path, address: str, state: dict[str, Any]) -> tuple[float, int, dict[str, Any]]:
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(metrics(state["metrics"]["count"] + 1, random.Random(1)))
    answer = get(address + seen(state))
    assert len(answer[2]["metrics"]["columns"]["step"]) == 1
    state |= answer[2]
    return answer


def in_browser(address: str) -> dict[str, float]:
    """Until the header and the first chart are drawn; the page's JavaScript memory."""
    path = shutil.which("chromium")
    if path is None:
        return {}
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        times = []
        for _ in range(REPEATS):
            page = browser.new_context().new_page()
            began = time.perf_counter()
            page.goto(address)
            page.wait_for_selector(".chart path.curve")
            times.append(time.perf_counter() - began)
        heap = page.evaluate("performance.memory.usedJSHeapSize") / 1e6
        browser.close()
    return {"page_shows_numbers_s": statistics.median(times), "page_heap_mb": heap}


def main() -> None:
    options = arguments(__doc__).parse_args()
    print_versions()
    print(machine())
    results = {}
    for name, samples, least in (("100,000 samples", 100_000, 0), ("1 GiB of samples", 1, 1 << 30))[
        : 1 if options.quick else 2
    ]:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(Path(folder), samples, least)
        print(f"\n{name}, {STEPS:,} steps of {METRICS} metrics")
        for key, value in results[name].items():
            print(f"    {key:30} {value:,.4g}")
    write_json(options.json, results)


if __name__ == "__main__":
    main()
