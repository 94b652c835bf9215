"""Dotted names of the YAML, resolved next to it or among the installed packages."""

import inspect
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from rlx.dotted import resolve, user_traceback
from rlx.errors import UserCodeError

KEY = "trl.reward_funcs[0]"

SEED_REWARDS = """
import random
def rand_reward_func(completions, **kwargs) -> list[float]:
    return [random.uniform(0, 1) for _ in completions]
def oai_gsm8k_transform(cfg, *args, **kwargs):
    def transform_fn(example, tokenizer=None):
        label = example["answer"].split("####")[-1].strip().replace(",", "")
        return {
            "prompt": [{"role": "user", "content": example["question"]},],
            "answer": label,
        }
    return transform_fn, {"remove_columns": ["question"]}
"""


def write(folder: Path, **files: str) -> Path:
    """Files by their path without `.py`; `__` stands for a slash, `INIT` for `__init__`."""
    for stem, text in files.items():
        file = folder / (stem.replace("__", "/").replace("INIT", "__init__") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def message(name: str, folder: Path) -> str:
    with pytest.raises(UserCodeError) as caught:
        resolve(name, base_dir=folder, key=KEY)
    text = str(caught.value)
    assert text.startswith(f"{KEY} ({name}): ")
    return text


def test_the_documented_reward_and_transform_load_from_a_file_next_to_the_yaml(tmp_path):
    write(tmp_path, rewards=SEED_REWARDS)
    reward = resolve("rewards.rand_reward_func", base_dir=tmp_path, key=KEY)
    scores = reward(completions=["a", "b", "c"], prompts=["p"] * 3)
    assert len(scores) == 3
    assert all(0 <= score <= 1 for score in scores)
    transform, map_kwargs = resolve("rewards.oai_gsm8k_transform", base_dir=tmp_path, key=KEY)(None)
    assert transform({"question": "6*7?", "answer": "so\n#### 1,042"})["answer"] == "1042"
    assert map_kwargs == {"remove_columns": ["question"]}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tasks.grade.exact", "packaged"),
        ("plain.deep.exact", "plain folder"),
        ("rewards.Judge.score", "method"),
        ("rewards.py:exact", "file"),
        ("rewards.py:Judge.score", "method"),
        ("plain/deep.py:exact", "plain folder"),
        ("./rewards.py:exact", "file"),
    ],
)
def test_every_form_of_a_name_finds_its_function(tmp_path, name, expected):
    write(
        tmp_path,
        tasks__INIT="",
        tasks__grade="from .words import WORD\ndef exact(): return WORD",
        tasks__words="WORD = 'packaged'",
        plain__deep="def exact(): return 'plain folder'",
        rewards="def exact(): return 'file'\nclass Judge:\n  @staticmethod\n  def score(): return 'method'",
    )
    assert resolve(name, base_dir=tmp_path, key=KEY)() == expected


def test_the_two_forms_of_a_name_give_the_same_object(tmp_path):
    write(tmp_path, plain__deep="def exact(): ...")
    dotted, file = (resolve(n, base_dir=tmp_path, key=KEY) for n in ("plain.deep.exact", "plain/deep.py:exact"))
    assert dotted is file


def test_a_file_outside_the_folder_of_the_yaml_loads_by_path(tmp_path):
    write(tmp_path / "shared", rewards="import words\ndef exact(): return words.WORD", words="WORD = 'shared'")
    (tmp_path / "run").mkdir()
    for name in ("../shared/rewards.py:exact", f"{tmp_path}/shared/rewards.py:exact"):
        assert resolve(name, base_dir=tmp_path / "run", key=KEY)() == "shared"


def test_installed_names_resolve_nested_attributes_included(tmp_path):
    assert resolve("os.path.join", base_dir=tmp_path, key=KEY)("a", "b") == "a/b"
    assert resolve("collections.OrderedDict.fromkeys", base_dir=tmp_path, key=KEY)("a") == {"a": None}
    assert resolve("rlx.rewards.format", base_dir=tmp_path, key=KEY, main="reward").__name__ == "think"
    assert resolve("rlx.rewards.format.boxed", base_dir=tmp_path, key=KEY).__name__ == "boxed"


def test_a_function_wins_over_a_submodule_of_the_same_name(tmp_path):
    write(tmp_path, pkg__INIT="from .grade import grade", pkg__grade="def grade(): return 'function'")
    assert resolve("pkg.grade", base_dir=tmp_path, key=KEY)() == "function"
    assert resolve("pkg.grade.grade", base_dir=tmp_path, key=KEY)() == "function"


def test_two_folders_with_files_of_the_same_names_stay_apart(tmp_path):
    path_before = list(sys.path)
    functions = []
    for folder in ("one", "two.five"):
        write(
            tmp_path / folder,
            rewards="import helpers\nfrom helpers import WHO\ndef who():\n  import helpers as h\n  return WHO, h.WHO",
            helpers=f"WHO = {folder!r}",
        )
        functions.append(resolve("rewards.who", base_dir=tmp_path / folder, key=KEY))
    assert [f() for f in functions] == [("one", "one"), ("two.five", "two.five")]
    assert sys.path == path_before
    assert "rewards" not in sys.modules
    assert "helpers" not in sys.modules


def test_user_files_named_like_installed_modules_shadow_nothing(tmp_path):
    write(
        tmp_path,
        numpy="import numpy, random\ndef pi(): return numpy.pi, random.random() < 1",
        random="raise RuntimeError('not the standard library')",
        rewards="def foo(): return 'mine'",
    )
    assert resolve("numpy.pi", base_dir=tmp_path, key=KEY)() == (3.141592653589793, True)
    assert resolve("rewards.foo", base_dir=tmp_path, key=KEY)() == "mine"
    import numpy

    assert not Path(numpy.__file__).is_relative_to(tmp_path)


def test_a_data_folder_does_not_hide_an_installed_package(tmp_path):
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "train.jsonl").write_text("{}")
    write(tmp_path, rewards="import numpy.linalg\nfrom numpy import pi\ndef f(): return numpy.linalg.norm([pi])")
    assert resolve("rewards.f", base_dir=tmp_path, key=KEY)() == pytest.approx(3.14159, abs=1e-4)
    assert resolve("numpy.sum", base_dir=tmp_path, key=KEY)([1, 2]) == 3


def test_siblings_import_as_packages_and_with_a_star(tmp_path):
    write(
        tmp_path,
        rewards="import tools.text as t\nimport tools.text\nfrom tools import text\nfrom words import *\n"
        "def f(): return t.X, tools.text.X, text.X, WORD",
        tools__text="X = 1",
        words="WORD = 'star'",
    )
    assert resolve("rewards.f", base_dir=tmp_path, key=KEY)() == (1, 1, 1, "star")


def test_functions_pickle_and_show_their_source(tmp_path):
    write(tmp_path, rewards="class Judge:\n  pass\ndef exact(x): return x + 1")
    exact = resolve("rewards.exact", base_dir=tmp_path, key=KEY)
    judge = resolve("rewards.Judge", base_dir=tmp_path, key=KEY)
    assert pickle.loads(pickle.dumps(exact)) is exact
    assert type(pickle.loads(pickle.dumps(judge()))) is judge
    assert inspect.getsource(exact) == "def exact(x): return x + 1\n"
    assert inspect.getfile(exact) == str(tmp_path / "rewards.py")


def test_functions_cross_to_spawned_processes(tmp_path):
    write(tmp_path, rewards="import helpers\ndef exact(x): return x + helpers.ONE", helpers="ONE = 1")
    exact = resolve("rewards.exact", base_dir=tmp_path, key=KEY)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(exact, (41,)).get(timeout=60) == 42


def test_a_missing_module_says_where_it_was_looked_for(tmp_path):
    write(tmp_path, rewards="def foo(): ...")
    text = message("rewrads.foo2", tmp_path)
    assert f"{tmp_path}/rewrads.py" in text
    assert "installed module" in text
    assert text.endswith("Did you mean 'rewards'?")


def test_a_format_of_axolotl_is_told_that_grpo_needs_a_function(tmp_path):
    write(tmp_path, rewards="def intel(): ...")
    with pytest.raises(UserCodeError, match=r"chatml is one of Axolotl's formats .*write `type: file.function`"):
        resolve("chatml.intel", base_dir=tmp_path, key="datasets[0].type")
    assert "no module called 'chatml'" in message("chatml.intel", tmp_path)
    write(tmp_path, chatml="def intel(): return 1")
    assert resolve("chatml.intel", base_dir=tmp_path, key="datasets[0].type")() == 1


def test_a_function_named_without_its_file_is_found_for_the_user(tmp_path):
    write(tmp_path, rewards="async def foo(): ...")
    assert message("foo", tmp_path).endswith("rewards.py defines 'foo': write `rewards.foo`.")
    assert message("other.foo", tmp_path).endswith("rewards.py defines 'foo': write `rewards.foo`.")


def test_a_module_in_the_current_directory_only_is_pointed_out(tmp_path, monkeypatch):
    write(tmp_path / "cwd", my_code="def foo(): ...")
    (tmp_path / "yaml").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    assert "move it next to the YAML" in message("my_code.foo", tmp_path / "yaml")


def test_a_missing_function_suggests_the_nearest(tmp_path):
    write(tmp_path, rewards="import os\ndef accuracy(): ...\ndef shape(): ...")
    text = message("rewards.acuracy", tmp_path)
    assert f"{tmp_path}/rewards.py" in text
    assert text.endswith("has no attribute 'acuracy'. Did you mean 'accuracy'?")
    assert message("rewards.zzz", tmp_path).endswith("It has: accuracy, shape.")
    assert message("os.path.joinn", tmp_path).endswith("Did you mean 'join'?")


def test_a_missing_file_suggests_the_nearest(tmp_path):
    write(tmp_path, rewards="def foo(): ...")
    assert message("reward.py:foo", tmp_path).endswith("Did you mean 'rewards.py'?")


def test_a_missing_dependency_inside_the_file_is_shown_as_such(tmp_path):
    write(tmp_path, rewards="import helpers\n", helpers="x = 1\nimport not_installed_lib\n")
    text = message("rewards.foo", tmp_path)
    assert f'File "{tmp_path}/rewards.py", line 1, in <module>\n    import helpers' in text
    assert f'File "{tmp_path}/helpers.py", line 2, in <module>\n    import not_installed_lib' in text
    assert "ModuleNotFoundError: No module named 'not_installed_lib'" in text
    assert text.endswith("Install 'not_installed_lib' where rlx runs, or remove that import.")
    assert text.count("File ") == 2, "only the user's frames are shown"


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("def foo(:\n  pass", "SyntaxError: invalid syntax"),
        ("x = 1\nraise RuntimeError('by hand')", "line 2, in <module>"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
    ],
)
def test_a_failing_import_shows_the_traceback_of_the_user(tmp_path, source, shown):
    write(tmp_path, rewards=source)
    text = message("rewards.foo", tmp_path)
    assert "its import failed." in text
    assert shown in text
    assert f'File "{tmp_path}/rewards.py"' in text
    assert "dotted.py" not in text
    assert "importlib" not in text


def test_a_failed_import_is_tried_anew(tmp_path):
    write(tmp_path, rewards="raise RuntimeError('first')")
    message("rewards.foo", tmp_path)
    write(tmp_path, rewards="def foo(): return 'repaired, and longer'")
    assert resolve("rewards.foo", base_dir=tmp_path, key=KEY)() == "repaired, and longer"


def test_an_installed_package_that_fails_inside_is_not_called_missing(tmp_path, monkeypatch):
    write(tmp_path / "site", brokenpkg__INIT="", brokenpkg__part="import not_installed_lib")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert "No module named 'not_installed_lib'" in message("brokenpkg.part.foo", tmp_path)
    assert "brokenpkg" in message("brokenpkg.prat.foo", tmp_path)


def test_values_that_cannot_be_called_are_refused(tmp_path):
    write(tmp_path, rewards="nothing = None\nnumber = 3\ndef foo(): ...")
    assert "this is None, not a function" in message("rewards.nothing", tmp_path)
    assert "a value of type int, not a function" in message("rewards.number", tmp_path)
    text = message("rewards", tmp_path)
    assert text.endswith("this is a module. Name a function in it, for example `rewards.foo`.")
    with pytest.raises(UserCodeError, match="without a function called 'reward'"):
        resolve("rewards", base_dir=tmp_path, key=KEY, main="reward")


@pytest.mark.parametrize("name", ["", "a..b", "org/model-name", "rewards.foo()", "rewards:foo", "rewards.py:", "r.py"])
def test_malformed_names_are_refused_with_the_form_to_write(tmp_path, name):
    assert "Write `file.function`" in message(name, tmp_path)


def test_chained_errors_of_the_user_are_all_shown_without_our_frames(tmp_path):
    write(
        tmp_path,
        helpers="1 / 0",
        rewards="try:\n  import helpers\nexcept ArithmeticError as e:\n  raise ValueError from e",
    )
    text = message("rewards.foo", tmp_path)
    assert text.index("ZeroDivisionError") < text.index("direct cause") < text.index("ValueError")
    assert text.count("File ") == 3
    assert "dotted.py" not in text


def test_grouped_errors_are_shown_without_our_frames(tmp_path):
    write(
        tmp_path,
        helpers="1 / 0",
        rewards="try:\n  import helpers\nexcept ArithmeticError as e:\n  raise ExceptionGroup('all', [e]) from None",
    )
    text = message("rewards.foo", tmp_path)
    assert "ZeroDivisionError" in text
    assert text.count("File ") == 3
    assert "dotted.py" not in text


def test_the_frames_of_a_caller_can_be_hidden():
    with pytest.raises(ZeroDivisionError) as caught:
        1 / 0  # noqa: B018
    assert f'File "{__file__}"' in user_traceback(caught.value)
    assert user_traceback(caught.value, hide=[__file__]) == "ZeroDivisionError: division by zero"


def test_resolving_loads_nothing_heavy():
    code = "import sys, rlx.dotted; print({'torch','vllm','ray','numpy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "set()"
