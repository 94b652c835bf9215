"""The quickstart's data, tokenizer, rewards and model; GSM8K's rewards."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from quickstart_model import MAKE, QUICKSTART, make_quickstart

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(path: Path) -> ModuleType:
    """The module in `path` under a name of its own: several examples have a `rewards.py`."""
    spec = importlib.util.spec_from_file_location(f"example_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


arithmetic = load(QUICKSTART / "arithmetic.py")
characters = load(QUICKSTART / "characters.py")
rewards = load(QUICKSTART / "rewards.py")
gsm8k = load(EXAMPLES / "gsm8k" / "rewards.py")


def replies(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def pairs(sums: list) -> set[tuple[int, int]]:
    return {(min(s.left, s.right), max(s.left, s.right)) for s in sums}


def test_train_and_heldout_share_no_pair_of_operands_in_either_order():
    split = arithmetic.split_questions(seed=0)
    assert len(split.heldout) == 256
    assert len(split.train) > 2000
    assert not pairs(split.train) & pairs(split.heldout)


def test_the_ledger_never_mentions_a_heldout_pair():
    split = arithmetic.split_questions(seed=0)
    entries = arithmetic.ledger(split, 20_000, seed=0)
    asked = {tuple(sorted(int(n) for n in question[:-1].split("+"))) for question, _ in entries}
    assert not asked & pairs(split.heldout)


def test_the_same_seed_gives_the_same_data_and_another_seed_does_not():
    first, again, other = (arithmetic.split_questions(seed) for seed in (0, 0, 1))
    assert first == again
    assert first.heldout != other.heldout
    assert arithmetic.ledger(first, 100, seed=0) == arithmetic.ledger(first, 100, seed=0)
    assert arithmetic.ledger(first, 100, seed=0) != arithmetic.ledger(first, 100, seed=1)


def test_every_answer_is_the_sum_and_every_question_carries():
    split = arithmetic.split_questions(seed=0)
    for row in (s.row for s in split.train + split.heldout):
        left, right = (int(n) for n in row["question"].removesuffix("=").split("+"))
        assert int(row["answer"]) == left + right
        assert left % 10 + right % 10 >= 10


def test_the_careless_answer_drops_every_carry():
    assert arithmetic.Sum(47, 38).careless_answer == "75"
    assert arithmetic.Sum(67, 55).careless_answer == "12"
    assert arithmetic.Sum(41, 38).careless_answer == arithmetic.Sum(41, 38).answer == "79"


def test_the_clerk_forgets_in_most_of_the_sums_that_carry_but_not_in_all():
    entries = arithmetic.ledger(arithmetic.split_questions(seed=0), 20_000, seed=0)
    carrying = [e for e in entries if arithmetic.Sum(*map(int, e[0][:-1].split("+"))).is_question]
    right = sum(int(answer) == sum(map(int, question[:-1].split("+"))) for question, answer in carrying)
    assert right / len(carrying) == pytest.approx(0.42, abs=0.02)


def test_the_chat_template_round_trips_through_64_tokens():
    tokenizer = characters.build_tokenizer()
    chat = [{"role": "user", "content": "47+38="}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n47+38=<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert len(tokenizer) == 64
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.convert_ids_to_tokens([tokenizer.eos_token_id, tokenizer.pad_token_id]) == [
        "<|im_end|>",
        "<|endoftext|>",
    ]
    assert tokenizer.decode(tokenizer("85<|im_end|>")["input_ids"], skip_special_tokens=True) == "85"


def test_the_transform_gives_a_chat_and_keeps_the_answer():
    transform, options = rewards.to_prompt({}, "ignored", also="ignored")
    assert options == {"remove_columns": ["question"]}
    row = {"question": "47+38=", "answer": "85"}
    expected = {"prompt": [{"role": "user", "content": "47+38="}], "answer": "85"}
    assert transform(row) == transform(row, tokenizer=None) == expected


def test_exact_match_pays_for_the_answer_and_nothing_else():
    scores = rewards.exact_match(replies("85", "75", "85 ", "085", ""), answer=["85"] * 5, trainer_state=None)
    assert scores == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_the_shuffled_reward_keeps_each_groups_scores_and_forgets_who_earned_them():
    earned = 0
    for group in range(200):
        prompts = [[{"role": "user", "content": f"{side}{group}"}] for side in "ab" for _ in range(8)]
        completions = replies(*["85"] * 3, *["75"] * 5, *["85"] * 6, *["75"] * 2)
        scores = rewards.shuffled_match(prompts=prompts, completions=completions, answer=["85"] * 16)
        assert (sum(scores[:8]), sum(scores[8:])) == (3.0, 6.0)
        assert scores == rewards.shuffled_match(prompts=prompts, completions=completions, answer=["85"] * 16)
        earned += sum(scores[:3])
    assert earned / 600 == pytest.approx(3 / 8, abs=0.08)


def test_the_gsm8k_transform_takes_the_number_after_the_hashes():
    transform, options = gsm8k.oai_gsm8k_transform({})
    row = transform({"question": "How many?", "answer": "2 * 600 = 1,200\n#### 1,200"}, tokenizer=None)
    assert row == {"prompt": [{"role": "user", "content": "How many?"}], "answer": "1200"}
    assert options == {"remove_columns": ["question"]}


def test_the_gsm8k_reward_compares_the_last_number():
    completions = replies("6 * 200 = 1,200.", "So \\boxed{1200.00}", "1200 or rather 12", "no idea")
    assert gsm8k.correct_reward_func(completions, answer=["1200"] * 4, prompts=None) == [1.0, 1.0, 0.0, 0.0]
    assert all(0 <= score <= 1 for score in gsm8k.rand_reward_func(completions, answer=["1200"] * 4))


@pytest.mark.slow
def test_the_made_model_is_small_tied_loadable_and_solves_some_questions():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = make_quickstart()
    made = json.loads((out / "made.json").read_text())
    assert 0.3 < made["heldout_accuracy"] < 0.55
    assert sorted(p.name for p in out.iterdir()) == ["data", "made.json", "model"]

    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert 1e6 < model.num_parameters() < 5e6
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    rows = [json.loads(line) for line in (out / "data" / "heldout.jsonl").read_text().splitlines()]
    assert len(rows) == 256
    assert rows[0].keys() == {"question", "answer"}

    second = subprocess.run(MAKE, capture_output=True, text=True, timeout=300, check=True)
    assert "nothing to make" in second.stdout
