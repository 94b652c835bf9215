"""Every benchmark, one after the other, so that none disturbs another; what each printed, and its JSON, in a folder.

    .venv/bin/python benchmarks/all.py [--quick] [--only c7,c10] [--out outputs/benchmarks]

`--quick` is about half an hour on two cores, without it some hours. The others go on when one fails; the exit status
is then 1. Benchmarks that need a GPU, and those whose environment is not there, are named and left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Benchmark:
    """`name`: the number in the suite, or what it is about. `quick`, `json`: whether it knows these options."""

    name: str
    command: tuple[str, ...]
    quick: bool = True
    json: bool = True
    needs: Path | None = None


BENCHMARKS = (
    Benchmark("c1", ("learner/compare.py", "skewed"), json=False),
    Benchmark("c2", ("learner/loss.py",), json=False),
    Benchmark("c3", ("learner/compare.py", "prompts"), json=False),
    Benchmark("c4", ("gateway_throughput.py",)),
    Benchmark("c5", ("weight_sync.py",)),
    Benchmark("c6", ("delta_sync.py",)),
    Benchmark("c7", ("async_pipeline.py", "--only", "c7")),
    Benchmark("c8", ("async_pipeline.py", "--only", "c8")),
    Benchmark("c10", ("gateway_ceiling.py",)),
    Benchmark("c11", ("fleet_scale.py",)),
    Benchmark("quickstart", ("quickstart_split.py",), quick=False, json=False),
    Benchmark("rewards", ("reward_scoring.py",), quick=False, json=False),
    Benchmark("tools", ("tool_calls.py",), quick=False, json=False),
    Benchmark("openenv", ("openenv_sessions.py",), quick=False, json=False, needs=HERE.parent / ".venv-openenv"),
    Benchmark("observability", ("observability.py",)),
    Benchmark("samples", ("samples_reader.py",), quick=False, json=False),
    Benchmark("view", ("view.py",)),
)


def run(benchmark: Benchmark, quick: bool, out: Path) -> bool:
    """Print and keep what it prints; whether it went well."""
    if benchmark.needs is not None and not benchmark.needs.exists():
        print(f"== {benchmark.name}: left out, {benchmark.needs.name} is not there", flush=True)
        return True
    script, *more = benchmark.command
    command = [sys.executable, str(HERE / script), *more]
    command += ["--quick"] if quick and benchmark.quick else []
    command += ["--json", str(out / f"{benchmark.name}.json")] if benchmark.json else []
    print(f"== {benchmark.name}: {' '.join(command[1:])}", flush=True)
    began = time.monotonic()
    with (out / f"{benchmark.name}.txt").open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
        status = process.wait()
    print(f"== {benchmark.name}: exit status {status}, {time.monotonic() - began:.0f} s", flush=True)
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="NAME,...")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"))
    given = parser.parse_args()
    names = [benchmark.name for benchmark in BENCHMARKS]
    if unknown := sorted(set(given.only or ()) - set(names)):
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(names)}")
    given.out.mkdir(parents=True, exist_ok=True)
    failed = [
        benchmark.name
        for benchmark in BENCHMARKS
        if (given.only is None or benchmark.name in given.only) and not run(benchmark, given.quick, given.out)
    ]
    print(f"failed: {', '.join(failed)}" if failed else "all went well")
    print("for a GPU, and not run here: gpu/learner.py")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
