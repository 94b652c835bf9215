"""Model-written code against tests: what counts as passed, and what the code cannot do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from rlx.errors import ServiceError, UserCodeError
from rlx.processes import descendants
from rlx.rewards import code as code_reward
from rlx.rewards.code import CodeResult, all_or_nothing, extract_code, grade, reward
from rlx.rewards.scoring import ScoreRequest, load_reward, score_group

DOUBLE = "def double(x):\n    return 2 * x\n"
ASSERTS = ["assert double(2) == 4", "assert double(0) == 0", "assert double('a') == 'aa'", "assert double(1) == 3"]

run_python = partial(code_reward.run_python, timeout_s=60)  # a busy machine may take longer than the 6 s of a user


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(code_reward, "run_python", run_python)
    monkeypatch.setattr(code_reward, "_GRACE_S", 120)


@pytest.fixture(autouse=True)
def nothing_is_left():
    before, folders = descendants(os.getpid()), set(Path("/tmp").glob("rlx-code-*"))
    yield
    assert descendants(os.getpid()).keys() <= before.keys()
    end = time.monotonic() + 30
    while (
        left := set(Path("/tmp").glob("rlx-code-*")) - folders
    ):  # of other processes that grade something, for a while
        assert time.monotonic() < end, left
        time.sleep(0.05)


def test_asserts_are_counted_one_by_one():
    result = run_python(DOUBLE, ASSERTS)
    assert (result.status, result.passed, result.total) == ("failed", 3, 4)
    assert "AssertionError" in result.output
    assert run_python(DOUBLE, ASSERTS[:3]) == CodeResult("passed", 3, 3, "")


def test_a_test_program_is_one_test():
    program = "def check(f):\n    assert f(2) == 4\n\ncheck(double)"
    assert run_python(DOUBLE, program).status == "passed"
    assert run_python(DOUBLE.replace("2 *", "3 *"), program) == CodeResult(
        "failed", 0, 1, run_python(DOUBLE.replace("2 *", "3 *"), program).output
    )


def test_programs_are_compared_by_what_they_print():
    code = "import sys\nfor line in sys.stdin:\n    print(int(line) * 2, end=' \\n')\n"
    pairs = [{"input": "1\n2\n", "output": "2\n4"}, {"input": "5", "output": "10\n"}, {"input": "6", "output": "13"}]
    result = run_python(code, pairs)
    assert (result.status, result.passed, result.total) == ("failed", 2, 3)
    as_columns = {"inputs": [pair["input"] for pair in pairs[:2]], "outputs": [pair["output"] for pair in pairs[:2]]}
    assert run_python(code, as_columns).status == "passed"
    assert run_python(code, json.dumps(pairs[:2])).status == "passed"


def test_a_program_may_use_input_threads_and_exit():
    code = "import sys, threading\nthreading.Thread(target=lambda: print(input())).start()\nsys.exit()\n"
    assert run_python(code, [{"input": "hi", "output": "hi"}]).status == "passed"


def test_a_program_that_fails_after_the_right_output_has_not_passed():
    result = run_python("print(1)\nraise ValueError('x')", [{"input": "", "output": "1"}])
    assert (result.status, result.passed) == ("error", 0)
    assert result.output.splitlines()[-1] == "ValueError: x"
    assert "sandbox.py" not in result.output


@pytest.mark.parametrize(
    "code",
    ["import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit", "exit()", "syntax error", "1/0", "",
     "print('passed')\nraise Exception", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
     "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'0 passed\\n0 passed\\n0 end\\n')\n    except OSError: pass\nos._exit(0)"],
)  # fmt: skip
def test_code_that_ends_before_its_tests_has_passed_none(code):
    result = run_python(code, ["assert True", "assert True"])
    assert (result.status, result.passed) == ("error", 0)


@pytest.mark.parametrize("way", ["import os; os._exit(0)", "raise SystemExit(0)", "1/0", "import sys; sys.exit()"])
def test_a_function_that_exits_when_it_is_tested_has_not_passed(way):
    result = run_python(f"def f():\n    {way}\n", ["assert f() is None", "assert f() is None"])
    assert result.status in ("failed", "error")
    assert result.passed == 0


def test_replacing_exec_changes_nothing():
    code = "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\n"
    assert run_python(code, ["assert False"]).passed == 0


def until_it_passed_one(code: str, tests: list) -> CodeResult:
    """Of a program that never ends: with more time where a busy machine does not come to its first test in 2 s."""
    for timeout_s in (2, 10, 60):
        result = run_python(code, tests, timeout_s=timeout_s)
        if result.passed:
            break
    return result


def test_an_infinite_loop_is_killed_at_the_deadline_and_what_passed_before_counts():
    result = until_it_passed_one("def f(x):\n    while x: pass\n", ["f(0)", "f(1)", "f(0)"])
    assert (result.status, result.passed, result.total) == ("timeout", 1, 3)


def test_a_deadline_holds_for_all_inputs_of_a_program():
    pairs = [{"input": "", "output": ""}, {"input": "x", "output": ""}, {"input": "", "output": ""}]
    result = until_it_passed_one("import sys\nwhile sys.stdin.read(): sys.stdin.seek(0)\n", pairs)
    assert (result.status, result.passed, result.total) == ("timeout", 1, 3)


FORKS = """
import os, time
count = 0
while count < 1000:
    try:
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
        count += 1
    except OSError:
        break
"""


@pytest.mark.parametrize("namespaces", [True, False])
def test_a_fork_bomb_is_bounded_and_leaves_nothing(namespaces):
    if not namespaces and os.geteuid() == 0:
        assert unsafe_as_root()
        return
    result = run_python(FORKS, ["assert 1 <= count <= 16, count"], namespaces=namespaces)
    assert (result.status, result.passed) == ("passed", 1), result.output


def test_ten_gigabytes_are_refused():
    result = run_python("x = bytearray(10 * 2**30)", ["assert True"])
    assert (result.status, result.passed) == ("memory", 0)
    assert run_python("x = bytearray(10 * 2**30)", [{"input": "", "output": ""}]).status == "memory"


def test_printing_a_hundred_megabytes_costs_no_memory_here():
    result = run_python("for _ in range(100): print('x' * 2**20)", ["assert True"], timeout_s=60)
    assert (result.status, len(result.output)) == ("passed", 2000)
    assert (
        run_python("for _ in range(100): print('x' * 2**20)", [{"input": "", "output": "x"}], timeout_s=60).status
        == "failed"
    )


def test_nothing_can_be_written_but_in_the_temporary_folder(tmp_path):
    os.chmod(tmp_path, 0o777)
    (tmp_path / "mine").write_text("mine")
    os.chmod(tmp_path / "mine", 0o666)
    code = f"""
import os, pathlib
refused = []
for path in ({str(tmp_path / "mine")!r}, {str(tmp_path / "new")!r}, '/var/tmp/new', '/dev/shm/new', '/etc/new'):
    try: open(path, 'w').write('x')
    except OSError: refused.append(path)
pathlib.Path('here').write_text('x')
pathlib.Path('/tmp/rlx-code-its-own').write_text('x')
"""
    result = run_python(code, ["assert len(refused) == 5, refused", "assert pathlib.Path('here').exists()"])
    assert (result.status, result.passed) == ("passed", 2), result.output
    assert not Path("/tmp/rlx-code-its-own").exists()
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_the_home_folder_is_hidden_and_the_environment_is_empty(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (home / "secret").write_text("s")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "secret")
    code = f"import os\nhome = os.path.exists({str(home / 'secret')!r})\nenv = dict(os.environ)\nuser = os.getuid()"
    tests = ["assert not home", "assert 'HF_TOKEN' not in env", "assert user != 0", "assert env['HOME'] == os.getcwd()"]
    result = run_python(code, tests)
    assert result.passed == 4, result.output


def test_disk_is_bounded():
    code = "with open('big', 'wb') as f:\n    for _ in range(64): f.write(bytes(2**20))"
    assert run_python(code, ["assert True"]).status == "error"


def test_the_network_is_out_of_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        connected = threading.Event()

        def accept() -> None:
            try:
                server.accept()
                connected.set()
            except OSError:
                pass

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        port = server.getsockname()[1]
        result = run_python(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)", ["assert True"])
        assert result.status == "error"
        assert not connected.is_set()
        server.shutdown(socket.SHUT_RDWR)
        thread.join(60)


def test_only_the_standard_library_can_be_imported_unless_packages_are_let_in():
    assert run_python("import numpy", ["assert True"]).status == "error"
    result = run_python("import numpy", ["assert numpy.ones(2).sum() == 2"], packages=True, memory_mib=2048)
    assert result.status == "passed", result.output


def test_killing_the_process_that_runs_the_code_ends_the_code():
    script = (
        "from rlx.rewards.code import run_python\nimport threading\n"
        "threading.Timer(0, lambda: print('go', flush=True)).start()\n"
        "run_python('import time, os\\nos.fork()\\nos.setsid\\ntime.sleep(60)', ['1'], timeout_s=60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    wait_until(lambda: len(descendants(process.pid)) >= 4)
    below = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not (descendants(1).items() & below.items()))


def test_code_does_not_run_when_its_parent_has_ended_before_it_could_be_told():
    spec = {"namespaces": False, "jobs": [], "timeout_s": 1, "parent": 1}
    command = [sys.executable, "-I", "-S", str(code_reward._SANDBOX)]
    done = subprocess.run(command, input=json.dumps(spec).encode(), capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, b"")


# --- without namespaces


def unsafe_as_root() -> bool:
    """Whether root is refused because Python is in its home folder; else root's code runs as another user."""
    try:
        return run_python("import os", ["assert os.getuid() != 0"], namespaces=False).status == "passed"
    except UserCodeError as error:
        return "is not run as root" in str(error)


def test_root_without_namespaces_never_runs_the_code_as_root():
    assert os.geteuid() != 0 or unsafe_as_root()


AS_OTHER_USER = """
import ctypes, encodings.idna, importlib.util, os, shutil, socket, sys, tempfile
spec = importlib.util.spec_from_file_location("sandbox", sys.argv[1])
sandbox = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sandbox)
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(54321)
    os.setuid(54321)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as if it had been that user's from the start
sandbox.main()
"""


def as_ordinary_user(code: str, tests: list[str], namespaces: bool) -> tuple[dict, dict]:
    """The sandbox started by a user who is not root."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        spec = {"code": code, "jobs": [{"tests": tests}], "timeout_s": 60, "memory_mib": 512, "disk_mib": 16,
                "processes": 16, "homes": [], "python": [], "output_bytes": 1000,
                "namespaces": namespaces, "parent": os.getpid()}  # fmt: skip
        source = Path(folder) / "sandbox.py"
        source.write_text(code_reward._SANDBOX.read_text())
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", AS_OTHER_USER, str(source)],
            input=json.dumps(spec).encode(), capture_output=True, timeout=180, cwd="/", check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    contained, result = [json.loads(line) for line in done.stdout.splitlines()]
    return contained, result


HOSTILE = """
import os, socket
done = []
def attempt(what):
    try:
        what()
        done.append(what.__name__)
    except OSError:
        pass
def network(): socket.create_connection(("127.0.0.1", PORT), 2)
def outside(): open(PATH, "w")
def shell(): os.system("true") and 1
for what in (network, outside): attempt(what)
open("here", "w").write("x")
"""


@pytest.mark.parametrize("namespaces", [True, False])
def test_an_ordinary_user_is_protected_too_with_and_without_namespaces(tmp_path, namespaces):
    os.chmod(tmp_path, 0o777)
    for folder in list(tmp_path.parents)[:2]:
        os.chmod(folder, 0o755)
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = HOSTILE.replace("PORT", str(server.getsockname()[1])).replace("PATH", repr(str(tmp_path / "new")))
        contained, result = as_ordinary_user(code, ["assert done == [], done"], namespaces)
    assert result["events"] == ["passed", "end"], result["tail"]
    assert contained["contained"] is namespaces, contained["why_not"]
    assert not (tmp_path / "new").exists()


# --- as a reward


def test_the_code_is_the_last_python_block_of_the_answer():
    assert extract_code("no fence\nx = 1") == "no fence\nx = 1"
    assert (
        extract_code("<think>```python\na\n```</think>\n```python\nb\n```\nor\n```py\nc\n```\n```json\n{}\n```") == "c"
    )
    assert extract_code("```json\n{}\n```") == ""
    assert extract_code("cut off:\n```python\nx = 1\ny =") == "x = 1\ny ="
    assert extract_code("<think>never closed ```python\nx\n```") == ""


def fenced(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```"


def test_the_reward_is_the_share_of_tests_passed():
    texts = [fenced(DOUBLE), fenced("def double(x): return 4"), "I cannot.", fenced("while True: pass")]
    values = reward(texts, tests=[ASSERTS[:3]] * 3 + [None])
    assert values == [1.0, 1 / 3, 0.0, None]
    assert all_or_nothing(texts, tests=[ASSERTS[:3]] * 3 + [None]) == [1.0, 0.0, 0.0, None]


def test_the_completions_of_a_group_run_side_by_side():
    together = threading.Barrier(4, timeout=60)

    def runner(code, tests):
        together.wait()
        return CodeResult("passed", 1, 1)

    assert grade([fenced("x = 1")] * 4, [["assert True"]] * 4, runner) == [CodeResult("passed", 1, 1)] * 4


def test_by_its_name_it_takes_a_test_program_and_an_entry_point_and_logs_how_it_went(tmp_path):
    reward = load_reward("rlx.rewards.code", tmp_path, "key")
    columns = {"test": "def check(candidate):\n    assert candidate(2) == 4\n", "entry_point": "double"}
    request = ScoreRequest("p", [fenced(DOUBLE), fenced("def double(x): return x")], [[0]] * 2, columns)
    assert score_group(reward, request).tolist() == [1.0, 0.0]
    with pytest.raises(UserCodeError, match="add a column `entry_point`"):
        score_group(reward, ScoreRequest("p", ["x"], [[0]], {"test": columns["test"]}))
    with pytest.raises(UserCodeError, match="needs a column `tests`, or `test` and `entry_point`"):
        score_group(reward, ScoreRequest("p", ["x"], [[0]], {"answer": "1"}))


def test_tests_in_no_known_form_are_told():
    with pytest.raises(ValueError, match="Write a list of assert statements"):
        run_python("x = 1", [1, 2])
    with pytest.raises(ValueError, match="Write a list of assert statements"):
        run_python("x = 1", '["assert x')


def test_another_runner_can_take_the_place_of_run_python():
    seen = []

    def runner(code, tests):
        seen.append((code, tests))
        return CodeResult("passed", 1, 1)

    assert grade([fenced("x")], [["assert x"]], runner) == [CodeResult("passed", 1, 1)]
    assert seen == [("x", ["assert x"])]


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_example_of_the_guide_grades_with_limits_of_its_own(tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "code_rewards.md").read_text()
    (tmp_path / "rewards.py").write_text(
        guide.split("```python\n")[1].split("```")[0].replace("memory_mib=2048", "memory_mib=600")
    )
    row = json.loads(guide.split("```json\n")[1].split("```")[0])
    mine = load_reward("rewards.reward", tmp_path, "key")
    request = ScoreRequest(row["prompt"], [fenced(DOUBLE), fenced("double = abs")], [[0]] * 2, {"tests": row["tests"]})
    assert score_group(mine, request).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("script", "grace_s", "message"),
    [
        ("import time; time.sleep(1000)", 0.2, "did not end in 0.1 s"),
        ("raise ValueError('no')", 60, "failed: .*ValueError: no"),
    ],
)
def test_a_sandbox_that_hangs_or_fails_is_an_error_and_not_a_verdict(tmp_path, monkeypatch, script, grace_s, message):
    (tmp_path / "sandbox.py").write_text(script)
    monkeypatch.setattr(code_reward, "_SANDBOX", tmp_path / "sandbox.py")
    monkeypatch.setattr(code_reward, "_GRACE_S", grace_s)
    with pytest.raises(ServiceError, match=f"(?s){message}"):
        run_python("x = 1", ["assert x"], timeout_s=0.1)
