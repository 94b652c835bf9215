"""The four shapes of a rollout function are told apart by their parameters; what has none of them is shown them."""

from pathlib import Path

import pytest
from env_parts import chat_of
from rollout_parts import config_of

from rlx.config import load_config
from rlx.envs.load import LoadedRollout, load_rollout, returns_text
from rlx.errors import ConfigError, UserCodeError


def load(folder: Path, definition: str, name: str = "mine.f") -> LoadedRollout:
    (folder / "mine.py").write_text(f"{definition}\n")
    return load_rollout(config_of(folder, rollout_func=name), chat_of())


@pytest.mark.parametrize(
    ("definition", "shape"),
    [
        ("def f(model, processing_class, prompts, generation_config=None): ...", "documented"),
        ("def f(prompts, model, processing_class): ...", "documented"),
        ("def f(prompts, args, processing_class, **kwargs): ...", "trl_0_25"),
        ("def f(prompts, trainer): ...", "trl"),
        ("def f(prompts, trainer=None): ...", "trl"),
        ("async def f(prompts, trainer): ...", "trl"),
        ("class F:\n    def __call__(self, prompts, trainer): ...\nf = F()", "trl"),
    ],
)
def test_the_older_shapes_have_no_bridges_and_no_reward_of_their_own(tmp_path, definition, shape):
    loaded = load(tmp_path, definition)
    assert loaded.function._shape == shape
    assert not loaded.many_turns
    assert not loaded.own_reward


@pytest.mark.parametrize(
    "definition",
    [
        "async def f(ctx): ...",
        "async def f(episode, tries=3): ...",
        "class F:\n    async def __call__(self, ctx): ...\nf = F()",
        "import functools\nasync def g(ctx, tries): ...\nf = functools.partial(g, tries=3)",
    ],
)
def test_a_coroutine_function_of_one_parameter_is_native(tmp_path, definition):
    loaded = load(tmp_path, definition)
    assert loaded.many_turns
    assert loaded.own_reward
    assert not hasattr(loaded.function, "_shape")


@pytest.mark.parametrize(
    ("definition", "found"),
    [
        ("def f(ctx): ...", "is not a coroutine function. Write `async def` before f(ctx)"),
        ("async def f(): ...", "none of the four shapes: f()"),
        ("async def f(ctx, other): ...", "none of the four shapes: f(ctx, other)"),
        ("async def f(prompts): ...", "none of the four shapes: f(prompts)"),
        ("def f(prompts, trainer, more): ...", "none of the four shapes: f(prompts, trainer, more)"),
        ("def f(model, tokenizer, prompts): ...", "none of the four shapes: f(model, tokenizer, prompts)"),
        ("def f(*args): ...", "none of the four shapes: f(*args)"),
    ],
)
def test_any_other_signature_is_refused_with_the_four(tmp_path, definition, found):
    with pytest.raises(UserCodeError) as caught:
        load(tmp_path, definition)
    text = str(caught.value)
    assert text.startswith("trl.rollout_func (mine.f) ")
    assert found in text
    for shape in (
        "rollout(ctx)",
        "rollout(model, processing_class,",
        "rollout(prompts, args,",
        "rollout(prompts, trainer)",
    ):
        assert shape in text


def test_an_import_that_trl_no_longer_has_is_answered_with_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with pytest.raises(UserCodeError, match=r"from rlx\.envs\.facades import generate_rollout_completions"):
        load(
            tmp_path, "from trl.experimental.openenv import generate_rollout_completions\ndef f(prompts, trainer): ..."
        )


def test_nothing_named_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no rollout_func"):
        load_rollout(config_of(tmp_path), chat_of())


@pytest.mark.parametrize(
    ("definition", "text"),
    [
        ("def f(model, processing_class, prompts): ...", True),
        ("def f(prompts, trainer): ...", False),
        ("async def f(ctx): ...", False),
    ],
)
def test_only_the_documented_shape_gives_the_rewards_strings(tmp_path, definition, text):
    (tmp_path / "mine.py").write_text(definition)
    assert returns_text(config_of(tmp_path, rollout_func="mine.f")) is text
    assert not returns_text(config_of(tmp_path))


def test_environments_without_a_function_are_played(tmp_path):
    config_of(tmp_path)
    path = tmp_path / "cfg.yaml"
    path.write_text(f"{path.read_text()}envs:\n  - openenv: {{url: 'http://127.0.0.1:9'}}\n")
    loaded = load_rollout(load_config(str(path)), chat_of())
    assert (loaded.many_turns, loaded.own_reward) == (True, True)
    assert loaded.function.__qualname__ == "player.<locals>.play"
