"""Token ids as text, and what colours them."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rlx.view.detail import MOST_TOKENS, detail, tokens
from rlx.view.tokens import find_tokenizer, pieces


@pytest.fixture(scope="module")
def by_bytes():
    """One token a byte."""
    tokenizer = Tokenizer(models.BPE({s: i for i, s in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_a_character_that_is_split_over_tokens_is_one_piece(by_bytes):
    ids = by_bytes.encode("a é🙂 b").ids
    assert pieces(by_bytes, ids) == [("a", 1), (" ", 1), ("é", 2), ("🙂", 4), (" ", 1), ("b", 1)]


def test_bytes_that_are_no_text_take_a_token_each_and_end(by_bytes):
    broken = by_bytes.encode("🙂").ids[:2] * 8
    found = pieces(by_bytes, [*broken, *by_bytes.encode("a").ids])
    assert [count for _, count in found] == [1] * 17
    assert found[-1] == ("a", 1)


def test_spaces_between_words_belong_to_the_word_behind_them():
    tokenizer = Tokenizer(models.WordLevel({"one": 0, "two": 1}, unk_token="one"))
    assert pieces(tokenizer, [0, 1, 1]) == [("one", 1), (" two", 1), (" two", 1)]


def test_ids_stand_where_there_is_no_tokenizer_or_a_broken_one(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{half")
    assert find_tokenizer([str(tmp_path), str(tmp_path / "nowhere"), "no/such"]) is None
    assert pieces(None, [5, 6]) == [("[5] ", 1), ("[6] ", 1)]


def test_a_row_comes_in_parts_with_versions_and_gaps():
    count = MOST_TOKENS + 10
    row = {
        "ids": [0] * count,
        "logprobs": [-1.0] * count,
        "versions": [[4, MOST_TOKENS + 1], [-1, 4], [5, 5]],
        "learner_logprobs": [-0.75] * count,
    }
    record = {"step": 1, "prompt": "q", "rows": [{"ids": [1], "versions": [[3, 1]]}, row]}
    first = tokens(record, 1, 0, [])
    assert (len(first["pieces"]), first["next"], first["known"]) == (MOST_TOKENS, MOST_TOKENS, False)
    rest = tokens(record, 1, MOST_TOKENS, [])
    assert (rest["versions"], rest["next"]) == ([4, -1, -1, -1, -1, 5, 5, 5, 5, 5], None)
    assert rest["gaps"] == [0.25] * 10
    assert tokens(record, 0, 0, [])["gaps"] == []
    assert tokens(record, 2, 0, [])["pieces"] == []


def test_long_texts_are_cut_and_say_how_long_they_are():
    found = detail(7, {"step": 1, "prompt": "p" * 50, "completion": "c" * 90, "columns": {"a": [1] * 99}}, 20)
    assert found["completion"] == {"text": "c" * 20, "length": 90}
    assert found["prompt_messages"] == [{"role": "prompt", "text": "p" * 20, "length": 50}]
    assert len(found["values"][0][1]["text"]) == 20
