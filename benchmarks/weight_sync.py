"""C5: time of a weight update (learner's parameters → bytes → HTTP → shared memory → workers), total and pause apart.

Two tables. Real: one vLLM engine with models of 2 to 270 MB; limit: vLLM's own layer-wise reload of a file that lies in
shared memory, alone. Fan-out: 1, 2 and 4 workers of 1 MB to 1 GB that check the file's fingerprint as a real one does
and then sleep as long as applying takes, so that two cores do not stand in for four machines; limit: that sleep.

Beside the limit: copying the bytes once, and the usual way by disk (write a file, reload from it; nobody is paused or
told, so it is a lower bound). Each repeat runs all of them once, in turn: the service reads the learner's memory, as it
does on one machine; everything is sent, as from another; and only the difference, with 1 % of the weights changed. All
three include the snapshot. The gateway and the engine are one process tree, the learner another; Ray is not there.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from local_parts import ConstantScorer, SleepEngine, arguments, child, machine, write_json
from service import QUICKSTART, print_versions

from rlx.config.sections import ServiceSection
from rlx.envs.single_turn import SingleTurn
from rlx.processes import die_with_parent
from rlx.rollout.app import create_app
from rlx.rollout.client import ClientTimeouts, RolloutClient
from rlx.rollout.engine_worker import EngineWorker
from rlx.rollout.gateway import serving
from rlx.rollout.manifest import WeightManifest, fingerprint
from rlx.rollout.service import RolloutService
from rlx.rollout.worker import Taken

APPLY_GB_S = 1.0
"""How fast the sleeping workers apply: what vLLM reaches on a CPU."""
CHANGED = 0.01
TOKEN = "of-this-benchmark"
SWAP_S = 0.003
"""How long they pause for it: what an engine of vLLM takes for the exchange (the pause in the first table)."""
SHAPES = {"quickstart": None, "36 MB": (512, 1536, 5), "270 MB": (1024, 4096, 8)}
"""Hidden size, intermediate size and layers."""


# --- the service's process --------------------------------------------------------------------------------------------


class ApplyingEngine(SleepEngine):
    """Takes any weights, in the time that applying them takes; as a worker with vLLM does it, it compares the fingerprint
    and applies side by side, while it generates, and then pauses for the exchange."""

    async def commit(self, manifest: WeightManifest, path: str) -> Taken:
        applying = asyncio.create_task(asyncio.sleep(manifest.nbytes / APPLY_GB_S / 1e9))
        found = await asyncio.to_thread(_fingerprint, path)
        await applying
        await asyncio.sleep(SWAP_S)
        self._version = manifest.version
        return Taken(found, SWAP_S)


def _fingerprint(path: str) -> str:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return fingerprint(memoryview(data))


def reload_alone(worker: Any, path: str) -> float:
    """Inside vLLM's worker: seconds of its layer-wise reload of the file."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    from rlx.rollout.vllm_worker import _tensors

    engine = worker.weight_transfer_engine
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    began = time.perf_counter()
    initialize_layerwise_reload(engine.model)
    engine.model.load_weights(_tensors(data))
    finalize_layerwise_reload(engine.model, engine.model_config)
    return time.perf_counter() - began


async def serve(listener: socket.socket, model: str | None, workers: int) -> None:
    engines: list[Any]
    if model is not None:
        from rlx.rollout.vllm_engine import VllmEngine
        from rlx.rollout.vllm_params import VllmOptions

        engines = [VllmEngine(VllmOptions(model=model, max_model_len=128, kv_cache_gib=0.1))]
    else:
        engines = [ApplyingEngine(0.0, 1) for _ in range(workers)]
    members: list[Any] = [EngineWorker(f"worker-{i}", engine) for i, engine in enumerate(engines)]
    service = RolloutService(
        members, ConstantScorer(), SingleTurn(), ServiceSection(), model="none", start_timeout_s=300
    )
    app = create_app(service, TOKEN, require_token_for_data=False)

    async def reload(path: str) -> float:
        if model is None:
            seconds = (await asyncio.to_thread(os.path.getsize, path)) / APPLY_GB_S / 1e9
            await asyncio.sleep(seconds)
            return seconds
        [seconds] = await engines[0]._llm.collective_rpc(reload_alone, args=(path,))
        return float(seconds)

    app.add_api_route("/reload", reload, methods=["POST"])
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    async with serving(app, listener):
        await service.start()
        await over.wait()
    await service.drain(0)


# --- the learner's ----------------------------------------------------------------------------------------------------


def measure(url: str, model: Any, repeats: int, folder: Path) -> dict[str, Any]:
    """Medians in seconds. `folder` is on disk."""
    import torch

    from rlx.learner.weights.handoff import Buffers
    from rlx.learner.weights.publish import Publisher, pack

    torch.set_num_threads(1)  # as a learner on a CPU
    moved = [torch.rand(p.numel()) < CHANGED for p in model.parameters()]
    times: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        note(name, time.perf_counter() - began)
        return result

    def step(turn: int) -> None:
        with torch.no_grad():
            for parameter, where in zip(model.parameters(), moved, strict=True):
                parameter.view(-1)[where] *= 1.03 if turn % 2 == 0 else 1 / 1.03

    with RolloutClient(url, TOKEN, ClientTimeouts(publish_s=120)) as client, httpx.Client(timeout=120) as http:
        client.wait_until_ready(150)

        def reload(path: Path) -> float:
            answer = http.post(f"{url}/reload", params={"path": str(path)})
            answer.raise_for_status()
            return float(answer.json())

        def by_disk() -> None:
            (folder / "weights.safetensors").write_bytes(packed.payload)
            reload(folder / "weights.safetensors")

        publishers = {
            "delta": Publisher(client, torch.bfloat16),
            "full": Publisher(client, torch.bfloat16, transfer="full"),
            "near": Publisher(client, torch.bfloat16, buffers=Buffers()),
        }
        for publisher in reversed(publishers.values()):
            publisher.publish(model)  # now all are beyond the gate, and the service holds the base of the first
        version = publishers["delta"].version
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as shared:
            for turn in range(repeats + 1):
                packed = pack(model, torch.bfloat16)
                source = np.frombuffer(packed.payload, np.uint8)
                timed("copy", source.copy)
                (Path(shared) / "weights").write_bytes(packed.payload)
                note("apply", reload(Path(shared) / "weights"))
                (Path(shared) / "weights").unlink()
                timed("disk", by_disk)
                step(turn)
                for kind, publisher in publishers.items():
                    publisher.version = version
                    sent = publisher.publish(model)
                    version = publisher.version
                    for name in ("total", "pause", "transfer", "snapshot"):
                        note(f"{kind}_{name}", getattr(sent, f"{name}_s"))
                    if kind == "delta":
                        delta_bytes = sent.nbytes
                if turn == 0:  # the warm-up
                    times.clear()
    spreads = {f"{name}_spread": [min(values), max(values)] for name, values in times.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"nbytes": len(packed.payload), "delta_bytes": delta_bytes, **medians, **spreads}


def real_model(name: str, folder: Path) -> Path:
    """A folder with a random Qwen3 and the quickstart's tokenizer, or the quickstart's model itself."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    quickstart = QUICKSTART.parent / "out" / "model"
    if (shape := SHAPES[name]) is None:
        return quickstart
    tokenizer = AutoTokenizer.from_pretrained(quickstart)
    hidden, intermediate, layers = shape
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_parameters(megabytes: int) -> Any:
    """A module of `megabytes` MB in bfloat16, in matrices of 16 MB at most."""
    import torch

    count, columns = megabytes * 500_000, 4096
    rows = [min(2048, left) for left in range(count // columns, 0, -2048)]
    return torch.nn.ParameterList([torch.nn.Parameter(torch.randn(n, columns) * 0.02) for n in rows])


HEADINGS = ("MB", "workers", "copy", "apply", "disk", "snapshot", "near: total", "transfer", "pause", "pause÷total",
            "apply÷total", "GB/s", "all: total", "transfer", "apply÷total", "1 %: total", "transfer", "kB sent")  # fmt: skip


def row(label: str, workers: int, m: dict[str, Any]) -> str:
    ms = {key: f"{1000 * value:.1f}" for key, value in m.items() if isinstance(value, float)}
    cells = [
        label, str(workers), ms["copy"], ms["apply"], ms["disk"], ms["near_snapshot"], ms["near_total"],
        ms["near_transfer"], ms["near_pause"], f"{m['near_pause'] / m['near_total']:.2f}",
        f"{m['apply'] / m['near_total']:.2f}", f"{m['nbytes'] / m['near_total'] / 1e9:.2f}", ms["full_total"],
        ms["full_transfer"], f"{m['apply'] / m['full_total']:.2f}", ms["delta_total"], ms["delta_transfer"],
        f"{m['delta_bytes'] / 1e3:.0f}",
    ]  # fmt: skip
    return "  ".join(cell.rjust(max(len(head), 8)) for cell, head in zip(cells, HEADINGS, strict=True))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=("real", "fan-out"), help="one of the two tables")
    args = parser.parse_args()
    repeats = 3 if args.quick else 7
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    print_versions()
    print(f"{machine()}; medians of {repeats} in milliseconds")
    numbers: list[dict[str, Any]] = []

    def report(label: str, workers: int, engine: str, found: dict[str, Any]) -> None:
        print(row(label, workers, found), flush=True)
        numbers.append({"engine": engine, "label": label, "workers": workers, **found})

    headings = "  ".join(head.rjust(max(len(head), 8)) for head in HEADINGS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.only != "fan-out":
            print(f"\none vLLM engine\n{headings}")
            for shape in SHAPES:
                path = real_model(shape, folder / shape)
                insecure = ("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to time the reload where it happens
                quiet = ("VLLM_LOGGING_LEVEL", "ERROR")
                with child(Path(__file__), {"model": str(path), "workers": 1}, insecure, quiet) as url:
                    from transformers import AutoModelForCausalLM

                    found = measure(url, AutoModelForCausalLM.from_pretrained(path, dtype="float32"), repeats, folder)
                report(f"{found['nbytes'] / 1e6:.1f}", 1, "vllm", found)
        if args.only != "real":
            print(f"\nworkers that sleep {APPLY_GB_S:g} GB/s\n{headings}")
            for megabytes in (1, 10, 100, 1000)[: 3 if args.quick else None]:
                model = random_parameters(megabytes)
                for workers in (1, 2, 4):
                    with child(Path(__file__), {"model": None, "workers": workers}) as url:
                        report(str(megabytes), workers, "sleep", measure(url, model, min(repeats, 5), folder))
    print(machine())
    write_json(args.json, {"rows": numbers})


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].isdigit():  # `child` of this program
        die_with_parent()
        asyncio.run(serve(socket.socket(fileno=int(sys.argv[1])), **json.loads(sys.argv[2])))
    else:
        main()
