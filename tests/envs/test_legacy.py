"""The older shapes of rollout functions on the tape of an episode, and what their authors are told."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from env_parts import chat_of
from rollout_parts import Policy, config_of, episodes_of, trained

from rlx.dotted import resolve
from rlx.envs.facades import for_threads
from rlx.envs.legacy import accounted_for, documented_prompt
from rlx.envs.single_turn import sample
from rlx.envs.threads import GRACE_S, in_thread, stuck_threads
from rlx.episode import Episode
from rlx.errors import UserCodeError
from rlx.rewards.scoring import ScoreRequest, load_reward, score_group
from rlx.rollout.engine_worker import EngineWorker
from rlx.rollout.fake_engine import FakeEngine
from rlx.wire import Completion, GroupRequest, Sampling

QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]

MATH_ENV = '''
import re


def math_solver_rollout(model, processing_class, prompts, generation_config=None):
    """Generates step-by-step math solutions."""
    completions = []
    for prompt in prompts:
        # Apply chat template to prompt
        messages = prompt.get("messages", [])
        formatted_prompt = processing_class.apply_chat_template(
            messages, processing_class=False, add_generation_prompt=True
        )
        # Generate step-by-step solution
        full_response = ""
        for step in range(5):  # Max 5 reasoning steps
            current_input = formatted_prompt + full_response + "\\nNext step:"
            inputs = processing_class(current_input, return_tensors="pt").to(model.device)
            outputs = model.generate(
                **inputs,
                max_new_tokens=100,
                generation_config=generation_config,
            )
            step_text = processing_class.decode(
                outputs[0][inputs.input_ids.shape[1]:],
                skip_special_tokens=True
            )
            # Check if solution is complete
            if "FINAL ANSWER:" in step_text:
                full_response += step_text
                break
            full_response += step_text + "\\n"
        completions.append(full_response)
    return completions


def math_reward(prompts, completions, answers, **kwargs):
    """Reward function that checks mathematical correctness"""
    rewards = []
    for completion, correct_answer in zip(completions, answers):
        # Extract predicted answer
        match = re.search(r"FINAL ANSWER:\\s*(.+)", completion)
        predicted = match.group(1).strip() if match else ""
        # Compare with correct answer
        reward = 1.0 if predicted == str(correct_answer) else 0.0
        rewards.append(reward)
    return rewards


def math_transform(cfg, *args, **kwargs):
    """Transform dataset to GRPO format with answer field"""
    def transform_fn(example, processing_class=None):
        return {
            "prompt": [{"role": "user", "content": example["question"]}],
            "answer": str(example["answer"]),
        }
    return transform_fn, {"remove_columns": ["question"]}
'''


def written(folder: Path, source: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(source)
    return folder


async def run(folder: Path, source: str, says: Any, prompt: Any = QUESTION, **options: Any) -> tuple[Episode, Policy]:
    """The first episode of the function `f` in `source`, and the policy that it ran on."""
    policy = Policy(chat_of(), says)
    episodes = await episodes_of(
        config_of(written(folder, source), rollout_func="mine.f"), chat_of(), policy, prompt, **options
    )
    return episodes[0], policy


async def refusal(folder: Path, source: str, says: Any = lambda _: "four", **options: Any) -> str:
    episode, _ = await run(folder, source, says, **options)
    assert episode.status == "aborted"
    assert not episode.scorable
    assert "trl.rollout_func (mine.f) " in episode.error
    return episode.error


# --- the documented example


async def test_the_documented_example_runs_as_it_is_written(tmp_path):
    (tmp_path / "math_env.py").write_text(MATH_ENV)
    config = config_of(tmp_path, rollout_func="math_env.math_solver_rollout", max_completion_length=512)
    transform, options = resolve("math_env.math_transform", base_dir=tmp_path, key="type")(config)
    assert options == {"remove_columns": ["question"]}
    row = transform({"question": "What is 12 + 30?", "answer": 42})

    steps = ["10 + 30 = 40", "40 + 2 = 42", "so it is", "FINAL ANSWER: 42"]
    policy = Policy(chat_of(), [*steps])
    episodes = await episodes_of(config, chat_of(), policy, row["prompt"], answer=row["answer"])
    [episode] = episodes

    assert (episode.status, episode.error) == ("ok", "")
    assert len(policy.completions) == len(episode.rows) == 4
    assert trained(episode) == policy.sampled
    assert all(row.mask.all() for row in episode.rows)
    for prompt_ids, row_ in zip(policy.prompts, episode.rows, strict=True):
        assert row_.prompt_ids is not None
        assert row_.prompt_ids.tolist() == prompt_ids.tolist()
        assert [version for version, _ in row_.versions] == [7]
    assert all(sampling.max_tokens == 100 for sampling in policy.samplings)
    text = chat_of().tokenizer.decode(policy.prompts[1])
    assert text.endswith("10 + 30 = 40\n\nNext step:")
    assert episode.completion == "10 + 30 = 40\n40 + 2 = 42\nso it is\nFINAL ANSWER: 42"
    assert episode.exact

    request = GroupRequest("g", row["prompt"], policy.prompts[0], 1, Sampling(512), {"answer": row["answer"]})
    reward = load_reward("math_env.math_reward", tmp_path, "trl.reward_funcs[0]")
    assert score_group(reward, ScoreRequest.of(request, episodes)).tolist() == [1.0]


async def test_the_documented_example_runs_on_the_fake_engine(tmp_path):
    (tmp_path / "math_env.py").write_text(MATH_ENV)
    config = config_of(tmp_path, rollout_func="math_env.math_solver_rollout")
    worker = EngineWorker("fake", FakeEngine(seed=3))
    await worker.start()
    sampled: list[int] = []

    async def sampling(request_id: str, prompt_ids: np.ndarray, how: Sampling) -> Completion:
        [completion] = await sample(worker, request_id, prompt_ids, 1, how)
        sampled.extend(int(i) for i in completion.ids)
        return completion

    episodes = await episodes_of(config, chat_of(), sampling, QUESTION, n=1, answer="42")
    assert [(episode.status, len(episode.rows), episode.exact) for episode in episodes] == [("ok", 5, True)]
    assert trained(episodes[0]) == sampled
    request = GroupRequest("g", QUESTION, chat_of().start(QUESTION), 1, Sampling(512), {"answer": "42"})
    reward = load_reward("math_env.math_reward", tmp_path, "trl.reward_funcs[0]")
    assert score_group(reward, ScoreRequest.of(request, episodes)).tolist() == [0.0]


async def test_a_documented_episode_that_is_cut_still_gives_its_rewards_a_string(tmp_path):
    (tmp_path / "math_env.py").write_text(MATH_ENV)
    config = config_of(tmp_path, rollout_func="math_env.math_solver_rollout")
    policy = Policy(chat_of(), lambda _: "x" * 60)
    [episode] = await episodes_of(config, chat_of(), policy, QUESTION, max_model_len=250)
    assert episode.status == "truncated"
    assert isinstance(episode.completion, str)
    assert episode.completion.startswith("x" * 60 + "\n" + "x" * 60)
    assert trained(episode) == policy.sampled


async def test_the_documented_example_scores_a_wrong_answer_and_one_that_never_comes(tmp_path):
    (tmp_path / "math_env.py").write_text(MATH_ENV)
    config = config_of(tmp_path, rollout_func="math_env.math_solver_rollout")
    reward = load_reward("math_env.math_reward", tmp_path, "trl.reward_funcs[0]")
    request = GroupRequest("g", QUESTION, chat_of().start(QUESTION), 1, Sampling(512), {"answer": "42"})
    for says, calls in ((lambda _: "FINAL ANSWER: 41"), 1), ((lambda _: "hm"), 5):
        policy = Policy(chat_of(), says)
        episodes = await episodes_of(config, chat_of(), policy, QUESTION, answer="42")
        assert len(policy.completions) == len(episodes[0].rows) == calls
        assert score_group(reward, ScoreRequest.of(request, episodes)).tolist() == [0.0]


def test_a_documented_prompt_is_the_prompt_and_a_mapping():
    chat = documented_prompt({"prompt": QUESTION, "answer": "42"})
    assert chat == QUESTION
    assert chat[0]["content"] == "What is 12 + 30?"
    assert chat["messages"] == chat.get("messages", []) == QUESTION
    assert (chat["answer"], chat.get("nothing"), "messages" in chat, "nothing" in chat) == ("42", None, True, False)
    assert dict(chat) == {"messages": QUESTION, "prompt": QUESTION, "answer": "42"}
    text = documented_prompt({"prompt": "2+2=", "answer": "4"})
    assert text + "4" == "2+2=4"
    assert text["messages"] == [{"role": "user", "content": "2+2="}]
    assert text[0:3] == "2+2"


# --- model.generate

GENERATE = """
def f(model, processing_class, prompts, generation_config=None):
    inputs = processing_class(prompts[0], return_tensors="pt").to(model.device)
    outputs = model.generate(**inputs, {arguments})
    return [processing_class.decode(outputs[0][inputs.input_ids.shape[1]:], skip_special_tokens=True)]
"""


@pytest.mark.parametrize(
    ("arguments", "sampling"),
    [
        ("max_new_tokens=3", {"max_tokens": 3}),
        (
            "max_new_tokens=3, temperature=0.5, top_p=0.9, top_k=5",
            {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5},
        ),
        ("max_length=10", {"max_tokens": 6}),
        ("max_new_tokens=3, do_sample=True, num_beams=1, pad_token_id=0, use_cache=True", {"max_tokens": 3}),
        ("generation_config={'max_new_tokens': 2, 'temperature': 0.7}", {"max_tokens": 2, "temperature": 0.7}),
        (
            "generation_config=__import__('transformers').GenerationConfig(max_new_tokens=2)",
            {"max_tokens": 2, "temperature": 1.0},
        ),
        ("max_new_tokens=4, generation_config={'max_new_tokens': 2}", {"max_tokens": 4}),
        ("max_new_tokens=4, stop_strings=['x']", {"stop": ("x",)}),
        ("eos_token_id=[5, 6]", {"extra": {"stop_token_ids": [5, 6]}}),
        ("top_k=None, repetition_penalty=1.1", {"top_k": 0, "repetition_penalty": 1.1, "max_tokens": 512}),
    ],
)
async def test_the_arguments_of_generate_are_honoured(tmp_path, arguments, sampling):
    episode, policy = await run(tmp_path, GENERATE.replace("{arguments}", arguments), lambda _: "four", "2+2=")
    assert (episode.status, episode.error) == ("ok", "")
    assert {name: getattr(policy.samplings[0], name) for name in sampling} == sampling
    assert trained(episode) == policy.sampled
    assert episode.rows[0].prompt_ids is None  # it is the prompt of the group
    assert episode.completion == chat_of().decode(policy.completions[0].ids)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("num_beams=4", "cannot honour num_beams=4"),
        ("do_sample=False", "cannot honour do_sample=False"),
        ("temperature=0.0", "temperature=0.0 samples nothing to learn from"),
        ("logits_processor=[1]", "cannot honour logits_processor=[1]"),
        ("return_dict_in_generate=True", "cannot honour return_dict_in_generate=True"),
        ("max_new_tokens=0", "0 new tokens"),
        ("max_length=2", "-2 new tokens"),
    ],
)
async def test_what_generate_cannot_honour_is_said(tmp_path, arguments, told):
    episode, policy = await run(tmp_path, GENERATE.replace("{arguments}", arguments), lambda _: "four", "2+2=")
    assert episode.status == "aborted"
    assert told in episode.error
    assert not policy.completions


async def test_a_batch_is_generated_row_by_row_without_its_padding(tmp_path):
    source = """
def f(model, processing_class, prompts, generation_config=None):
    processing_class.padding_side = "left"
    inputs = processing_class(["2+2=", "10+10="], padding=True, return_tensors="pt")
    outputs = model.generate(**inputs, num_return_sequences=2)
    assert outputs.shape[0] == 4 and outputs.dtype.is_floating_point is False, outputs
    assert outputs[:2, : inputs.input_ids.shape[1]].tolist() == [inputs.input_ids[0].tolist()] * 2
    return [" ".join(processing_class.batch_decode(outputs[:, inputs.input_ids.shape[1]:], skip_special_tokens=True))]
"""
    episode, policy = await run(tmp_path, source, ["4", "four", "20", "twenty"])
    assert (episode.status, episode.error) == ("ok", "")
    assert episode.completion == "4 four 20 twenty"
    assert [chat_of().tokenizer.decode(ids) for ids in policy.prompts] == ["2+2=", "2+2=", "10+10=", "10+10="]
    assert len(episode.rows) == 4
    assert trained(episode) == policy.sampled


async def test_a_prompt_that_extends_the_tape_continues_the_row(tmp_path):
    source = """
import torch
def f(model, processing_class, prompts, generation_config=None):
    ids = processing_class(prompts[0], return_tensors="pt").input_ids
    ids = model.generate(ids, max_new_tokens=50)
    ids = torch.cat([ids, processing_class(" and ", return_tensors="pt").input_ids], dim=1)
    ids = model.generate(input_ids=ids)
    return [processing_class.decode(ids[0][4:], skip_special_tokens=True)]
"""
    episode, policy = await run(tmp_path, source, ["four", "more"], "2+2=")
    [row] = episode.rows
    assert trained(episode) == policy.sampled
    assert chat_of().tokenizer.decode(row.ids[~row.mask]) == " and "
    assert episode.exact


async def test_the_model_has_no_weights_and_says_so(tmp_path):
    source = "def f(model, processing_class, prompts, generation_config=None):\n    return model.eval()({what})"
    episode, _ = await run(tmp_path, source.replace("{what}", "prompts"), [])
    assert "model.generate(input_ids, max_new_tokens=...)" in episode.error
    source = "def f(model, processing_class, prompts, generation_config=None):\n    return model.parameters()"
    episode, _ = await run(tmp_path / "other", source, [])
    assert "model.parameters does not exist here. model has: config, device, eval, generate, training" in episode.error


# --- what the documented shape returns

RETURNS = """
def f(model, processing_class, prompts, generation_config=None):
    inputs = processing_class("2+2=", return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=20)
    text = processing_class.decode(outputs[0][inputs.input_ids.shape[1]:], skip_special_tokens=True)
    return {what}
"""


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("[]", "returned 0 completions for 1 prompt. It is called once per episode"),
        ("[text, text]", "returned 2 completions for 1 prompt"),
        ("text", "returned 'four' (a value of type str). Return a list with one string per prompt"),
        ("None", "returned None"),
        ("[outputs[0].tolist()]", "a list that holds ["),
        ("{'completions': [text]}", "returned {'completions': ['four']}"),
    ],
)
async def test_what_is_not_one_string_is_refused_with_the_line_to_write(tmp_path, what, told):
    error = await refusal(tmp_path, RETURNS.replace("{what}", what))
    assert told in error
    assert "append" in error or "return completions" in error


async def test_an_empty_string_is_a_completion(tmp_path):
    episode, policy = await run(tmp_path, RETURNS.replace("{what}", "['']"), [""])
    assert (episode.status, episode.completion, episode.exact) == ("ok", "", True)
    assert trained(episode) == policy.sampled == [chat_of().tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("what", "exact"),
    [
        ("[text]", True),
        ("['  ' + text + '\\n']", True),
        ("['2+2= ' + text]", True),
        ("[text + ' FINAL ANSWER: 4']", False),
        ("['four']", True),
        ("[text[:2]]", False),
        ("['']", False),
    ],
)
async def test_exact_says_whether_the_returned_text_is_what_was_sampled(tmp_path, what, exact):
    episode, policy = await run(tmp_path, RETURNS.replace("{what}", what), ["four"])
    assert episode.status == "ok"
    assert episode.exact is exact
    assert trained(episode) == policy.sampled


def test_samples_are_searched_in_their_order():
    assert accounted_for("a\nb", ["a", "b"], [])
    assert not accounted_for("b\na", ["a", "b"], [])
    assert not accounted_for("a", ["a", "a"], [])
    assert accounted_for("a seen b", ["a", "b"], ["x seen y"])
    assert not accounted_for("a made up b", ["a", "b"], ["x seen y"])


async def test_a_function_that_never_generated_is_refused(tmp_path):
    source = "def f(model, processing_class, prompts, generation_config=None):\n    return ['42']"
    error = await refusal(tmp_path, source)
    assert "never generated through what it was given" in error
    assert "Use model.generate(...)" in error


async def test_an_error_of_the_function_is_shown_with_its_line(tmp_path):
    source = "def f(model, processing_class, prompts, generation_config=None):\n    return 1 / 0\n"
    episode, _ = await run(tmp_path, source, [])
    assert episode.status == "aborted"
    assert "ZeroDivisionError" in episode.error
    assert "mine.py" in episode.error
    assert "legacy.py" not in episode.error
    episode, _ = await run(tmp_path / "other", source.replace("1 / 0", "exit(3)"), [])
    assert "SystemExit, which ends a program" in episode.error


# --- TRL's shapes

TRL = """
def f(prompts, trainer):
    ids = trainer.processing_class.apply_chat_template(prompts[0], add_generation_prompt=True, return_dict=False)
    prompt_ids, completion_ids, logprobs, token_ids = trainer.vllm_generation.generate(
        prompts=[ids], images=None, num_generations=trainer.args.num_generations)
    out = {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}
    {change}
    return out
"""


async def test_trls_shape_gives_ids_and_columns(tmp_path):
    change = 'assert token_ids == [[[i] for i in completion_ids[0]]]; out["env_reward"] = [0.5]'
    episode, policy = await run(tmp_path, TRL.replace("{change}", change), ["four"], answer="4")
    assert (episode.status, episode.error, episode.exact) == ("ok", "", True)
    assert episode.completion == [{"role": "assistant", "content": "four"}]
    assert episode.extra == {"env_reward": 0.5}
    [row] = episode.rows
    assert row.prompt_ids is None
    assert row.ids.tolist() == policy.sampled
    assert row.logprobs.tolist() == policy.completions[0].logprobs.tolist()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("out = completion_ids", "Write `return {"),
        ("del out['logprobs']", "returned a dict without logprobs"),
        ("out['completion_ids'] = []", "returned 0 items in 'completion_ids' for 1 prompt"),
        ("out['completion_ids'] = completion_ids * 2", "returned 2 items in 'completion_ids' for 1 prompt"),
        ("out['completion_ids'] = [[]]; out['logprobs'] = [[]]", "no token ids in 'completion_ids'"),
        ("out['prompt_ids'] = [[]]", "no token ids in 'prompt_ids'"),
        ("out['completion_ids'] = ['four']", "Return a list of token ids"),
        ("out['logprobs'] = [logprobs[0][:-1]]", "returned 5 completion_ids with 4 logprobs"),
        ("out['logprobs'] = [[[a, a] for [a] in logprobs[0]]]", "Return one number per token"),
        ("out['logprobs'] = None", "returned None (a value of type NoneType) as 'logprobs'"),
        ("out['env_mask'] = [[1, 1]]", "returned 5 completion_ids with 2 values of env_mask"),
        ("out['env_mask'] = [[2] * 5]", "Return 1 for sampled tokens"),
        ("out['env_reward'] = []", "returned 0 items in 'env_reward' for 1 prompt"),
        ("out['env_reward'] = 0.5", "returned 0.5 (a value of type float) as 'env_reward'"),
        ("out['env'] = [object()]", "Return numbers, strings, lists or dicts"),
        ("out['completion_ids'] = [[70, 71]]; out['logprobs'] = [[0, 0]]", "none of the tokens that it sampled"),
    ],
)
async def test_a_dict_that_does_not_fit_together_is_refused(tmp_path, change, told):
    assert told in await refusal(tmp_path, TRL.replace("{change}", change))


@pytest.mark.parametrize(
    ("change", "exact"),
    [
        ("out['logprobs'] = [[a for [a] in logprobs[0]]]", True),
        ("out['env_mask'] = [[1] * 5]", True),
        (
            "out['completion_ids'] = [ids[:3] + completion_ids[0]]; out['logprobs'] = [[0.0] * 8]; out['env_mask'] = [[0] * 3 + [1] * 5]",
            True,
        ),
        ("out['completion_ids'] = [ids[:3] + completion_ids[0]]; out['logprobs'] = [[0.0] * 8]", True),
        (
            "out['completion_ids'] = [ids[:3] + completion_ids[0]]; out['logprobs'] = [[0.0] * 8]; out['env_mask'] = [[1] * 8]",
            False,
        ),
        ("out['completion_ids'] = [completion_ids[0] + [70]]; out['logprobs'] = [[0.0] * 6]", False),
        ("out['env_mask'] = [[0, 1, 1, 1, 1]]", False),
    ],
)
async def test_an_edited_dict_is_trained_as_it_was_sampled_and_not_exact(tmp_path, change, exact):
    episode, policy = await run(tmp_path, TRL.replace("{change}", change), ["four"])
    assert (episode.status, episode.error, episode.exact) == ("ok", "", exact)
    assert trained(episode) == policy.sampled


async def test_trls_turns_are_one_row_when_each_prompt_extends_the_last(tmp_path):
    source = """
from rlx.envs.facades import generate_rollout_completions
def f(prompts, trainer):
    tokenizer = trainer.processing_class
    [first] = generate_rollout_completions(trainer, ["2+2="], generation_overrides={"max_tokens": 30})
    heard = tokenizer(" now 3+3=")["input_ids"]
    [second] = trainer.vllm_client.generate(
        prompts=[first["prompt_ids"] + first["completion_ids"] + heard], n=1, temperature=trainer.temperature,
        max_tokens=trainer.max_completion_length - 40, logprobs=0)["completion_ids"]
    assert first["text"] == "four" and len(first["logprobs"]) == 5
    ids = first["completion_ids"] + heard + second
    mask = [1] * len(first["completion_ids"]) + [0] * len(heard) + [1] * len(second)
    return {"prompt_ids": [first["prompt_ids"]], "completion_ids": [ids], "logprobs": [[0.0] * len(ids)], "env_mask": [mask]}
"""
    episode, policy = await run(tmp_path, source, ["four", "six"], "2+2=")
    assert (episode.status, episode.error, episode.exact) == ("ok", "", True)
    [row] = episode.rows
    assert trained(episode) == policy.sampled
    assert chat_of().tokenizer.decode(row.ids[~row.mask]) == " now 3+3="
    assert [s.max_tokens for s in policy.samplings] == [30, 472]
    assert episode.completion == "four now 3+3=six"


async def test_the_trainer_has_no_model_and_no_batch(tmp_path):
    episode, _ = await run(tmp_path, "def f(prompts, trainer):\n    trainer.model", [])
    assert "trainer.model is not here" in episode.error
    episode, _ = await run(tmp_path / "b", "def f(prompts, trainer):\n    trainer.optimizer", [])
    assert "trainer.optimizer does not exist here. trainer has: accelerator, args," in episode.error
    assert "never generated" in await refusal(
        tmp_path / "c",
        "def f(prompts, trainer):\n    return dict(prompt_ids=[[1]], completion_ids=[[1]], logprobs=[[0.0]])",
    )


async def test_trl_0_25_generates_over_http_as_its_example_does(tmp_path):
    source = """
import requests
def f(prompts, args, processing_class):
    payload = {"prompts": prompts, "n": args.num_generations, "temperature": args.temperature, "top_p": args.top_p,
               "top_k": -1 if args.top_k is None else args.top_k, "min_p": 0.0 if args.min_p is None else args.min_p,
               "max_tokens": args.max_completion_length, "repetition_penalty": args.repetition_penalty}
    url = f"http://{args.vllm_server_host}:{args.vllm_server_port}"
    assert url == args.vllm_server_base_url
    assert requests.get(f"{url}/health/", timeout=60).status_code == 200
    assert "num_beams" in requests.post(f"{url}/generate/", json={**payload, "num_beams": 3}, timeout=60).json()["error"]
    assert requests.post(f"{url}/other/", json=payload, timeout=60).status_code == 404
    result = requests.post(f"{url}/generate/", json=payload, timeout=60)
    result.raise_for_status()
    result = result.json()
    result["env_reward"] = [len(text) for text in processing_class.batch_decode(result["completion_ids"], skip_special_tokens=True)]
    return result
"""
    episode, policy = await run(tmp_path, source, ["four"])
    assert (episode.status, episode.error, episode.exact) == ("ok", "", True)
    assert episode.extra == {"env_reward": 4}
    [row] = episode.rows
    assert row.prompt_ids is None  # the template's text gave the ids of the group's prompt again
    assert trained(episode) == policy.sampled


async def test_trl_0_25_that_asks_another_server_is_told_where_ours_is(tmp_path):
    source = """
def f(prompts, args, processing_class):
    return dict(prompt_ids=[[1]], completion_ids=[[1]], logprobs=[[0.0]])
"""
    assert 'requests.post(f"{args.vllm_server_base_url}/generate/", json=...)' in await refusal(tmp_path, source)


# --- threads


def test_threads_do_not_see_each_others_truncation():
    tokenizer = for_threads(chat_of().tokenizer)
    lengths: list[tuple[int, int]] = []

    def encode(limit: int) -> None:
        for _ in range(100):
            ids = tokenizer("x" * 500, truncation=limit < 500, max_length=limit)["input_ids"]
            lengths.append((limit, len(ids)))

    threads = [threading.Thread(target=encode, args=(limit,)) for limit in (5, 6, 500, 7, 500)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        sys.setswitchinterval(interval)
    assert len(lengths) == 500
    assert all(limit == length for limit, length in lengths)


async def test_episodes_run_side_by_side_and_the_loop_stays_free(tmp_path):
    source = """
import threading
together = threading.Barrier(3, timeout=60)
def f(model, processing_class, prompts, generation_config=None):
    together.wait()
    return [processing_class.decode(model.generate(processing_class("a", return_tensors="pt").input_ids)[0])]
"""
    (tmp_path / "mine.py").write_text(source)
    policy = Policy(chat_of(), lambda _: "four")
    episodes = await episodes_of(config_of(tmp_path, rollout_func="mine.f"), chat_of(), policy, "2+2=", n=3)
    assert [episode.status for episode in episodes] == ["ok"] * 3


LOOPS = """
import threading, time
ended, entered, go = threading.Event(), threading.Event(), threading.Event()
def f(model, processing_class, prompts, generation_config=None):
    try:
        while True:
            {body}
    finally:
        ended.set()
"""


async def ends(name: str) -> None:
    """Wait for the threads called `name`."""
    for thread in [thread for thread in threading.enumerate() if thread.name == name]:
        await asyncio.to_thread(thread.join, 60)


async def test_a_function_that_generates_for_ever_is_ended_with_its_episode(tmp_path):
    body = """try:
                model.generate(processing_class("a", return_tensors="pt").input_ids, max_new_tokens=5)
            except Exception:
                pass"""
    (tmp_path / "mine.py").write_text(LOOPS.replace("{body}", body))
    config = config_of(tmp_path, rollout_func="mine.f")
    policy = Policy(chat_of(), lambda _: "four", seconds=0.01)
    [episode] = await episodes_of(config, chat_of(), policy, "2+2=", seconds=0.5)
    assert episode.status == "timeout"
    ended = resolve("mine.ended.wait", base_dir=tmp_path, key="test")
    assert await asyncio.to_thread(ended, 60)
    await ends("mine.f of group, episode 0")
    assert not stuck_threads()


async def test_a_thread_that_does_not_end_is_named(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(LOOPS.replace("{body}", "entered.set(); go.wait(60); return ['x']"))
    config = config_of(tmp_path, rollout_func="mine.f")
    started = time.monotonic()
    [episode] = await episodes_of(config, chat_of(), Policy(chat_of(), []), "2+2=", seconds=0.3)
    assert episode.status == "timeout"
    assert time.monotonic() - started < 40
    monkeypatch.setattr("rlx.envs.threads.GRACE_S", 1000.0)
    assert not stuck_threads()  # it has some time to end by itself
    monkeypatch.setattr("rlx.envs.threads.GRACE_S", 0.0)
    assert stuck_threads() == ["mine.f of group, episode 0"]
    resolve("mine.go.set", base_dir=tmp_path, key="test")()
    await ends("mine.f of group, episode 0")
    assert not stuck_threads()


async def test_what_ends_a_thread_does_not_end_the_loop():
    for raised in (SystemExit, KeyboardInterrupt, StopIteration):

        def ends(raised=raised):
            raise raised

        with pytest.raises(UserCodeError, match=f"a tool raised {raised.__name__}"):
            await in_thread(ends, "a tool")
    assert GRACE_S == 2.0
