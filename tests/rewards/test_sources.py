"""What an entry of `trl.reward_funcs` is told from its text and from what lies next to the YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlx.errors import UserCodeError
from rlx.rewards.sources import kind_of, load_source


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rewards.exact", "function"),
        ("rlx.rewards.math", "function"),
        ("rewards.py:exact", "function"),
        ("../shared/rewards.py:Judge.score", "function"),
        ("../shared/rewards.py", "function"),
        ("package", "function"),
        ("org/model", "model"),
        ("org/model.v2-7B", "model"),
        ("./judge", "model"),
        ("~/judge", "model"),
        ("/models/judge", "model"),
        ("judge", "model"),
        ("judge-1.5b", "model"),
        ("http://10.0.0.7:8000/score", "url"),
        ("https://scorer.example", "url"),
        ("HTTPS://scorer.example/x.py", "url"),
    ],
)
def test_the_kind_of_an_entry(tmp_path, name, kind):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("def reward(completions): return [0.0]")
    for folder in ("judge", "judge-1.5b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    assert kind_of(name, tmp_path) == kind


def test_a_function_loads_as_before(tmp_path):
    (tmp_path / "mine.py").write_text("def half(completions): return [0.5]")
    reward = load_source("mine.half", tmp_path, "key")
    assert reward.function(completions=["x"]) == [0.5]


def test_a_dependency_that_is_missing_in_the_users_module_is_what_is_told(tmp_path):
    (tmp_path / "mine.py").write_text("import no_such_dependency\n")
    with pytest.raises(UserCodeError) as caught:
        load_source("mine.half", tmp_path, "trl.reward_funcs[1]")
    assert "trl.reward_funcs[1] (mine.half): its import failed." in str(caught.value)
    assert "Install 'no_such_dependency'" in str(caught.value)


def test_an_address_without_a_host_or_with_a_password_in_it_is_refused(tmp_path):
    for name in ("http:///score", "https://user:secret@host/score"):
        with pytest.raises(UserCodeError, match="RLX_REWARD_TOKEN") as caught:
            load_source(name, tmp_path, "key")
        assert "is not an address to POST to" in str(caught.value)


def test_the_entries_of_the_guide_are_what_it_says_they_are(tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "reward_models.md").read_text()
    names = yaml.safe_load(guide.split("```yaml\n")[1].split("```")[0])["trl"]["reward_funcs"]
    assert [kind_of(name, tmp_path) for name in names] == ["function", "model", "model", "url"]
