"""Does the Python in the completion pass its tests? It runs in a process without rights (`sandbox.py`).

    completion ─► extract_code ─► run_python(code, tests) ─► CodeResult ─► the share of tests passed

The columns that say what the tests are, and what this does not protect from: docs/guides/code_rewards.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from rlx.errors import ServiceError, UserCodeError
from rlx.processes import kill_tree
from rlx.rewards.text import Completion, answer_text, completion_text

Tests: TypeAlias = str | Sequence[str] | Sequence[Mapping[str, str]] | Mapping[str, Sequence[str]]
"""A program; snippets such as assert statements; `{"input", "output"}` of a program; the same as JSON."""
Status = Literal["passed", "failed", "timeout", "memory", "error"]

TIMEOUT_S = 6.0
MEMORY_MIB = 512
PARALLEL = max(4, os.cpu_count() or 1)
"""Completions of a group that run at a time."""
_GRACE_S = 10.0
_OUTPUT_BYTES = 1 << 20
_SANDBOX = Path(__file__).with_name("sandbox.py")
_LANGUAGES = ("python", "python3", "py", "")


@dataclass(frozen=True)
class CodeResult:
    """What running a program came to.

    `status`: passed, all tests; failed, a test did not pass; timeout; memory, more than was allowed; error, the code
    raised or ended before its tests. `passed` of `total` tests; `output` is the end of what it printed and raised.
    """

    status: Status
    passed: int
    total: int
    output: str = ""


class Runner(Protocol):
    """What `grade` runs code with; `run_python` is one."""

    def __call__(self, code: str, tests: Any, /) -> CodeResult: ...


def reward(
    completions: Sequence[Completion], log_extra: Callable[[str, list[Any]], None] | None = None, **columns: Any
) -> list[float | None]:
    """The share of tests that the code of each completion passes, None where its row has no tests."""
    results = _graded(completions, columns, log_extra)
    return [None if result is None else result.passed / result.total for result in results]


def all_or_nothing(
    completions: Sequence[Completion], log_extra: Callable[[str, list[Any]], None] | None = None, **columns: Any
) -> list[float | None]:
    """1.0 where the code of the completion passes all tests, else 0.0; None where its row has no tests."""
    results = _graded(completions, columns, log_extra)
    return [None if result is None else float(result.status == "passed") for result in results]


def grade(
    completions: Sequence[Completion], tests: Sequence[Tests | None], runner: Runner | None = None
) -> list[CodeResult | None]:
    """Run the code of every completion against its tests, side by side; None where there are no tests."""
    run = runner or run_python

    def one(completion: Completion, tests: Tests | None) -> CodeResult | None:
        return run(extract_code(completion_text(completion)), tests) if tests else None

    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(one, completions, tests))


def extract_code(text: str) -> str:
    """The last fenced block of Python after the reasoning; the whole answer when nothing is fenced."""
    answer = answer_text(text)
    blocks: list[tuple[str, list[str]]] = []
    inside = False
    for line in answer.splitlines():
        if line.lstrip().startswith("```"):
            if not inside:
                blocks.append((line.strip().strip("`").strip().lower(), []))
            inside = not inside
        elif inside:
            blocks[-1][1].append(line)
    if not blocks:
        return answer
    return next(("\n".join(lines) for language, lines in reversed(blocks) if language in _LANGUAGES), "")


def run_python(
    code: str,
    tests: Tests,
    *,
    timeout_s: float = TIMEOUT_S,
    memory_mib: int = MEMORY_MIB,
    disk_mib: int = 16,
    processes: int = 16,
    packages: bool = False,
    namespaces: bool = True,
) -> CodeResult:
    """Run `code` against `tests`, all of them within `timeout_s` seconds.

    `memory_mib` is the address space of each of at most `processes` processes and threads, `disk_mib` what can be
    written to the temporary folder. Only the standard library can be imported, unless `packages` lets in what is
    installed beside rlx. `namespaces=False` makes do with what containers without them give. ValueError when `tests`
    are in no known form, UserCodeError when the code could only run with the rights of root, ServiceError when the
    sandbox failed.
    """
    cases = _cases(tests)
    pairs = [case for case in cases if isinstance(case, tuple)]
    if not code.strip():
        return CodeResult("error", 0, len(cases), "there is no code")
    jobs = [{"stdin": given} for given, _ in pairs] if pairs else [{"tests": cases}]
    limits = {"timeout_s": timeout_s, "memory_mib": memory_mib, "disk_mib": disk_mib, "processes": processes}
    contained, results = _sandboxed({"code": code, "jobs": jobs, "namespaces": namespaces, **limits}, packages)
    _say_once(contained)
    return _compare(results, [wanted for _, wanted in pairs]) if pairs else _count(results[0], len(cases))


def _sandboxed(spec: dict[str, Any], packages: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How the code was contained, and the results of the jobs, fewer when they ran out of time."""
    python = {sys.base_prefix, *([sys.prefix] if packages else [])}
    spec |= {"homes": _homes(), "python": sorted(python), "output_bytes": _OUTPUT_BYTES, "parent": os.getpid()}
    command = [sys.executable, "-I", *([] if packages else ["-S"]), str(_SANDBOX)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        cwd="/", env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        out, err = process.communicate(json.dumps(spec).encode(), spec["timeout_s"] + _GRACE_S)
    except subprocess.TimeoutExpired:
        raise ServiceError(f"the sandbox of rlx.rewards.code did not end in {spec['timeout_s']:g} s") from None
    finally:
        if process.poll() is None:
            kill_tree(process)
            process.communicate()
    lines = out.decode().splitlines()
    if process.returncode != 0 or len(lines) < 2:
        raise ServiceError(f"the sandbox of rlx.rewards.code failed: {err.decode(errors='replace')[-2000:].strip()}")
    contained, *results = [json.loads(line) for line in lines]
    for event in results[0]["events"]:
        if event.startswith("unsafe "):
            raise UserCodeError(
                f"the code of completions is not run as root: {event.removeprefix('unsafe ')}"
                f"{', and ' if contained['why_not'] else ''}{contained['why_not']}. Run rlx as another user, install "
                "Python where all can read it, or permit namespaces (CAP_SYS_ADMIN)."
            )
    return contained, results


def _homes() -> list[str]:
    """The folders that hold what is this user's alone."""
    homes = {os.path.expanduser("~")}
    with contextlib.suppress(KeyError):  # a container's user need not be in its list of users
        homes.add(pwd.getpwuid(os.geteuid()).pw_dir)
    return sorted(home for home in homes if os.path.isabs(home) and home != "/")


def _count(result: dict[str, Any], total: int) -> CodeResult:
    """The result of tests that ran beside the code."""
    events = result["events"]
    passed = min(total, events.count("passed"))
    status: Status = _how_it_ended(result)
    if status == "passed" and "end" not in events:
        status = "error"
    elif status == "passed" and passed < total:
        status = "failed"
    return CodeResult(status, passed, total, result["tail"])


def _compare(results: list[dict[str, Any]], wanted: list[str]) -> CodeResult:
    """The result of a program whose output is compared here, where it does not run."""
    states: list[Status] = []
    for result, output in zip(results, wanted, strict=False):
        state = _how_it_ended(result)
        states.append("failed" if state == "passed" and _lines(result["stdout"]) != _lines(output) else state)
    passed = states.count("passed")
    first_bad = next((index for index, state in enumerate(states) if state != "passed"), None)
    if first_bad is None:
        return CodeResult("passed", passed, len(wanted), results[-1]["tail"])
    return CodeResult(states[first_bad], passed, len(wanted), results[first_bad]["tail"])


def _how_it_ended(result: dict[str, Any]) -> Status:
    if result["expired"]:
        return "timeout"
    if "memory" in result["events"]:
        return "memory"
    return "error" if result["exit"] != 0 or "error" in result["events"] else "passed"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _cases(tests: Any) -> list[str] | list[tuple[str, str]]:
    """`tests` as snippets, or as (input, output) of a program."""
    if isinstance(tests, str) and tests.lstrip().startswith(("[", "{")):
        try:
            tests = json.loads(tests)
        except json.JSONDecodeError as error:
            raise _unknown(tests) from error
    if isinstance(tests, str):
        return [tests]
    if isinstance(tests, Mapping) and {"inputs", "outputs"} == {k for k, v in tests.items() if v is not None}:
        tests = [{"input": i, "output": o} for i, o in zip(tests["inputs"], tests["outputs"], strict=True)]
    if not isinstance(tests, Sequence) or not tests:
        raise _unknown(tests)
    if all(isinstance(test, str) for test in tests):
        return list(tests)
    if all(
        isinstance(t, Mapping) and isinstance(t.get("input"), str) and isinstance(t.get("output"), str) for t in tests
    ):
        return [(test["input"], test["output"]) for test in tests]
    raise _unknown(tests)


def _unknown(tests: Any) -> ValueError:
    return ValueError(
        f"the tests {tests!r:.120} are not known. Write a list of assert statements, a list of "
        '{"input": text, "output": text}, {"inputs": [...], "outputs": [...]}, one of these as JSON, or a program.'
    )


def _graded(
    completions: Sequence[Completion],
    columns: Mapping[str, Sequence[Any]],
    log_extra: Callable[[str, list[Any]], None] | None,
) -> list[CodeResult | None]:
    results = grade(completions, _tests_in(columns))
    if log_extra is not None:
        log_extra("code_status", [result and result.status for result in results])
        log_extra("code_output", [result and result.output[-500:] for result in results])
    return results


def _tests_in(columns: Mapping[str, Sequence[Any]]) -> list[Any]:
    """The tests of each completion, from the columns of its row."""
    if "test" not in columns and "tests" not in columns:
        raise UserCodeError(f"needs a column `tests`, or `test` and `entry_point`. Columns: {', '.join(columns)}.")
    if "tests" in columns:
        return list(columns["tests"])
    names = columns.get("entry_point") or [None] * len(columns["test"])
    return [program and _program(program, name) for program, name in zip(columns["test"], names, strict=True)]


def _program(test: str, entry_point: str | None) -> str:
    """A test program; one that defines `check(candidate)`, as HumanEval's do, is called with the entry point."""
    if entry_point:
        return f"{test}\ncheck({entry_point})"
    if test.count("check(") == 1 and "def check(" in test:
        raise UserCodeError("the column `test` defines `check` and does not call it: add a column `entry_point`.")
    return test


_said: set[str] = set()


def _say_once(contained: Mapping[str, Any]) -> None:
    if not contained["contained"] and contained["why_not"] not in _said:
        _said.add(contained["why_not"])
        print(
            f"note: rlx.rewards.code: {contained['why_not']}. The code of completions is only kept from the network and "
            "from files by Python itself, which it can evade. docs/guides/code_rewards.md says what to permit.",
            file=sys.stderr,
            flush=True,
        )
