"""Packed, shared, chunked and split: the loss and its gradients stay those of padded rows with all their logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlx.config import Config
from rlx.errors import ConfigError
from rlx.learner.microbatches import batching, head, packing
from rlx.learner.microbatches.batching import PADDED, Layout, Sample, collate
from rlx.learner.microbatches.forward import ForwardPlan, prepare
from rlx.learner.microbatches.logprobs import completion_logprobs
from rlx.learner.microbatches.packing import Segments, Span
from rlx.learner.microbatches.splitting import cost, num_tokens, split

VOCAB = 40
PACKED = Layout(packed=True)
SHARED = Layout(packed=True, share_prompts=True)
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip


def qwen(**more: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True, **more))


def config_of(**keys: Any) -> Config:
    return Config(base_model="m", rl="grpo", datasets=[{"path": "d", "type": "t.f"}], **keys)


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    ForwardPlan(SHARED, True, ()).apply_to(model)
    return model


def make_samples() -> list[Sample]:
    """Two groups of four and a single one; an empty, a masked and an episode's completion among them."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, VOCAB, n).astype(np.int32) for n in (6, 3, 4)]
    samples = []
    for i, (length, group) in enumerate(zip((9, 1, 5, 0, 4, 12, 2, 7, 3), (0, 0, 0, 0, 1, 1, 1, 1, 2), strict=True)):
        ids = rng.integers(1, VOCAB, length).astype(np.int32)
        ids[-1:] = 0  # the end of sequence, which is the padding, too
        sampled = np.array([False, True] * 6) if length == 12 else None
        logprobs = rng.normal(-3, 1, length).astype(np.float32)
        samples.append(Sample(prompts[group], ids, logprobs, rng.normal(), 0.1, i == 6, sampled))
    return samples


def outcome(model: PreTrainedModel, parts: list[list[Sample]], layout: Layout = PADDED) -> tuple[Tensor, Tensor]:
    """Loss, an entropy term included, and the gradient of every parameter."""
    model.zero_grad()
    total = torch.zeros(())
    for part in parts:
        batch = collate(part, layout)
        logprobs, entropies = completion_logprobs(model, batch, 0.9, entropy_gradient=True)
        assert entropies is not None
        loss = -(logprobs * batch.advantages_T * batch.weights_T).sum() - 0.05 * entropies.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert got[1].shape == expected[1].shape
    assert (got[1] - expected[1]).norm() < 1e-5 * expected[1].norm()


@pytest.mark.parametrize("layout", [PACKED, SHARED])
@pytest.mark.parametrize("window", [None, 5])
def test_packed_and_shared_rows_equal_padded_ones(layout: Layout, window: int | None) -> None:
    samples = make_samples()
    keys = {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0} if window else {}
    expected = outcome(qwen(**keys), [samples])
    assert_same(outcome(prepared(qwen(**keys)), [samples], layout), expected)


def test_gradient_checkpointing_of_a_shared_row_changes_nothing() -> None:
    samples, model = make_samples(), prepared(qwen()).train()
    expected = outcome(qwen(), [samples])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(outcome(model, [samples], SHARED), expected)


@pytest.mark.parametrize("layout", [PADDED, PACKED, SHARED])
@pytest.mark.parametrize(("world", "budget"), [(1, 8), (1, 30), (1, 10_000), (3, 20)])
def test_a_step_split_by_tokens_equals_one_micro_batch(layout: Layout, world: int, budget: int) -> None:
    samples = make_samples()
    ranks = split(samples, world, 1, budget, layout)
    assert len({len(parts) for parts in ranks}) == 1
    parts = [part for parts in ranks for part in parts]
    assert sorted(id(s) for part in parts for s in part) == sorted(map(id, samples))
    assert all(num_tokens(part, layout) <= budget or len(part) == 1 for part in parts)
    assert_same(outcome(prepared(qwen()), parts, layout), outcome(qwen(), [samples]))


def test_a_shared_prompt_stands_in_the_row_once_and_predicts_every_first_token() -> None:
    ids = [np.array(values, np.int32) for values in ([1, 2, 3], [4, 5], [6], [7, 8, 9], [3])]
    prompt, first, second, other, reply = ids
    samples = [
        Sample(p, c, np.zeros(len(c), np.float32), 1.0, 1.0)
        for p, c in ((prompt, first), (other, reply), (prompt, second))
    ]
    batch = collate(samples, SHARED)
    assert batch.input_ids_BS.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 3]]
    assert batch.col_T.tolist() == [2, 3, 8, 2]
    assert batch.target_ids_T.tolist() == [4, 5, 3, 6]
    assert batch.segments is not None
    assert batch.segments.spans == (Span(0, 3), Span(3, 5, 0, 3), Span(5, 6, 0, 3), Span(6, 10))
    assert batch.segments.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3]]
    assert num_tokens(samples, SHARED) == 10
    assert num_tokens(samples, PACKED) == 13
    assert num_tokens(samples, PADDED) == 15
    by_hand = 3 * 1.5 + 2 * (3 + 1) + 1 * (3 + 0.5) + 4 * 2
    assert cost(samples, replace(SHARED, pair_cost=1.0)) == 10 + by_hand


def test_a_prompt_is_shared_where_that_saves_a_tenth_of_the_tokens() -> None:
    assert batching.worth_sharing(22, [110, 110])
    assert not batching.worth_sharing(21, [110, 110])
    assert not batching.worth_sharing(1000, [1001])


def test_a_group_stays_together_and_costs_are_spread_over_the_ranks() -> None:
    rng = np.random.default_rng(0)
    samples = [
        Sample(np.full(40, g, np.int32), np.ones(rng.integers(5, 60), np.int32), np.zeros(60, np.float32), 1.0, 1.0)
        for g in range(24)
        for _ in range(4)
    ]
    rng.shuffle(samples)  # type: ignore[arg-type]
    layout = replace(SHARED, pair_cost=0.01)
    ranks = split(samples, 4, 1, 600, layout)
    costs = [sum(cost(part, layout) for part in parts) for parts in ranks]
    assert max(costs) < 1.2 * min(costs)
    places = {(s.prompt_key, id(part)) for parts in ranks for part in parts for s in part}
    assert len(places) <= 24 + sum(len(parts) for parts in ranks)
    assert sum(num_tokens(part, layout) for parts in ranks for part in parts) < 0.65 * sum(
        s.num_forwarded for s in samples
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_a_head_in_chunks_equals_a_whole_one(
    monkeypatch: pytest.MonkeyPatch, bias: bool, entropy_gradient: bool
) -> None:
    torch.manual_seed(0)
    hidden, ids, layer = torch.randn(13, 8), torch.randint(VOCAB, (13,)), nn.Linear(8, VOCAB, bias)
    weights, entropy_weights = torch.randn(13), torch.randn(13) * entropy_gradient

    def gradients(score: Any) -> list[Tensor]:
        layer.zero_grad()
        inputs = hidden.clone().requires_grad_()
        logprobs, entropies = score(inputs)
        (logprobs @ weights + entropies @ entropy_weights).backward()
        return [logprobs.detach(), entropies.detach(), inputs.grad, *(p.grad for p in layer.parameters())]

    def plain(inputs: Tensor) -> tuple[Tensor, Tensor]:
        table = (layer(inputs) / 0.7).log_softmax(-1)
        return table.gather(1, ids[:, None])[:, 0], -(table.exp() * table).sum(-1)

    def ours(inputs: Tensor) -> tuple[Tensor, Tensor]:
        return head.score(inputs, layer.weight, layer.bias, ids, 0.7, True, entropy_gradient)

    expected = gradients(plain)
    for kept in (2**25, 0):
        monkeypatch.setattr(head, "_KEPT_LOGITS", kept)
        monkeypatch.setattr(head, "_CHUNK_LOGITS", 5 * VOCAB)
        for got, value in zip(gradients(ours), expected, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_that_is_not_trained_is_computed_once_and_equals_a_trained_one(
    monkeypatch: pytest.MonkeyPatch, bias: bool
) -> None:
    torch.manual_seed(0)
    hidden, ids, layer = torch.randn(13, 8), torch.randint(VOCAB, (13,)), nn.Linear(8, VOCAB, bias)
    weights, sizes, logits = torch.randn(13), list[int](), head._logits
    monkeypatch.setattr(head, "_CHUNK_LOGITS", 5 * VOCAB)

    def seen(*arguments: Any) -> Tensor:
        sizes.append(logits(*arguments).numel())
        return logits(*arguments)

    def results() -> list[Tensor]:
        inputs = hidden.clone().requires_grad_()
        logprobs, entropies = head.score(inputs, layer.weight, layer.bias, ids, 0.7)
        (logprobs @ weights).backward()
        assert inputs.grad is not None
        return [logprobs.detach(), entropies, inputs.grad]

    expected = results()
    layer.requires_grad_(False)
    monkeypatch.setattr(head, "_logits", seen)
    for got, value in zip(results(), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6)
    assert sizes == [5 * VOCAB, 5 * VOCAB, 3 * VOCAB]


def test_the_logits_of_all_tokens_never_exist_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_KEPT_LOGITS", 0)
    monkeypatch.setattr(head, "_CHUNK_LOGITS", 4 * VOCAB)
    sizes: list[int] = []
    logits = head._logits

    def seen(*arguments: Any) -> Tensor:
        sizes.append(logits(*arguments).numel())
        return logits(*arguments)

    monkeypatch.setattr(head, "_logits", seen)
    model, samples = prepared(qwen()), make_samples()
    plain = outcome(qwen(), [samples])
    assert_same(outcome(model, [samples], SHARED), plain)
    assert max(sizes) == 4 * VOCAB
    trained = sum(s.num_trained for s in samples)
    assert sum(sizes) == 2 * trained * VOCAB


def test_autocast_takes_the_products_in_its_type() -> None:
    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(6, 8), torch.randn(VOCAB, 8, requires_grad=True), torch.randint(VOCAB, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = head.score(hidden, weight, None, ids, 1.0)
        expected = (hidden @ weight.t()).float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=1e-3, atol=1e-3)
    logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", [LlamaForCausalLM, CohereForCausalLM])
def test_a_head_in_float32_rounds_no_logits(kind: Any) -> None:
    """Under autocast the log-probabilities differ from those of whole logits in float32 only without the key."""
    torch.manual_seed(0)
    model, samples = kind(kind.config_class(**SMALL)).eval(), make_samples()
    gaps = []
    for trl in ({}, {"cast_lm_head_to_fp32": True}):
        plan = prepare(model, config_of(trl=trl, sample_packing=False))
        other = kind(kind.config_class(**SMALL)).eval()
        other.load_state_dict(model.state_dict())
        plan.apply_to(other)
        batch = collate(samples, plan.layout)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(batch.input_ids_BS).last_hidden_state[batch.row_T, batch.col_T]
            found = [completion_logprobs(m, batch, 1.0)[0] for m in (model, other)]
        logits = hidden.float() @ model.get_output_embeddings().weight.t() * getattr(model, "logit_scale", 1.0)
        exact = logits.log_softmax(-1).gather(1, batch.target_ids_T[:, None])[:, 0]
        assert torch.equal(found[0], found[1])
        gaps.append((found[0] - exact).abs().max().item())
    assert gaps[0] > 1e-4
    assert gaps[1] < 1e-5


@pytest.mark.parametrize(
    ("model", "scoring_head", "packed", "note"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), True, True, None),
        (lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)), True, True, None),
        (lambda: PhiForCausalLM(PhiConfig(**SMALL)), True, True, None),  # its head has a bias
        (lambda: CohereForCausalLM(CohereConfig(**SMALL)), False, True, "changes its logits after the head"),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL)), False, False, "softcap"),
        (lambda: Lfm2ForCausalLM(Lfm2Config(**SMALL, layer_types=["conv", "full_attention"])), True, False, "outside of attention"),
    ],
)  # fmt: skip
def test_each_architecture_is_run_the_way_that_it_allows(
    model: Any, scoring_head: bool, packed: bool, note: str | None
) -> None:
    torch.manual_seed(0)
    reference = model().eval()
    torch.manual_seed(0)
    tried = model().eval()
    plan = prepare(tried, config_of())
    assert (plan.scoring_head, plan.layout.packed, plan.layout.share_prompts) == (scoring_head, packed, packed)
    assert (note is None and not plan.notes) or any(str(note) in line for line in plan.notes)
    samples = make_samples()
    assert_same(outcome(tried, [samples], plan.layout), outcome(reference, [samples]))
    ids = torch.randint(1, VOCAB, (2, 9))
    torch.testing.assert_close(tried(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)


def test_packing_can_be_switched_off_and_is_refused_where_it_was_asked_for_in_vain() -> None:
    assert not prepare(qwen(), config_of(sample_packing=False)).layout.packed
    assert not prepare(qwen(), config_of(share_prompt_prefix=False)).layout.share_prompts
    assert not prepare(qwen(), config_of(attn_implementation="eager")).layout.packed
    with pytest.raises(ConfigError, match="Gemma2ForCausalLM"):
        prepare(Gemma2ForCausalLM(Gemma2Config(**SMALL)), config_of(sample_packing=True))


def test_a_model_in_which_packed_sequences_see_each_other_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(self: Segments, span: Span, window: int | None) -> None:
        return None

    model = qwen()
    monkeypatch.setattr(packing.Segments, "mask", leaking)  # what a shared prompt hides is seen
    plan = prepare(model, config_of())
    assert not plan.layout.packed
    assert model.config._attn_implementation == "sdpa"


def test_flash_attention_is_given_the_queries_and_keys_of_each_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no flash attention on a CPU: its variable-length function is played by scaled dot products."""

    def varlen(q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor, bounds_k: Tensor, scale: float) -> Tensor:
        outputs = []
        for i in range(len(bounds_q) - 1):
            part_q, part_k, part_v = (
                x[b[i] : b[i + 1]].transpose(0, 1)[None] for x, b in ((q, bounds_q), (k, bounds_k), (v, bounds_k))
            )
            queries, keys = part_q.shape[2], part_k.shape[2]
            mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            outputs.append(scaled_dot_product_attention(part_q, part_k, part_v, mask, scale=scale, enable_gqa=True))
        return torch.cat([o[0].transpose(0, 1) for o in outputs])

    def forward(query: Tensor, key: Tensor, value: Tensor, mask: None, **given: Any) -> Tensor:
        assert given["is_causal"]
        assert given["attn_implementation"] == "flash_attention_2"
        bounds_q, bounds_k = given["cu_seq_lens_q"], given["cu_seq_lens_k"]
        assert bounds_q.dtype == bounds_k.dtype == torch.int32
        assert given["max_length_q"] == int(bounds_q.diff().max())
        assert given["max_length_k"] == int(bounds_k.diff().max())
        return varlen(query[0], key[0], value[0], bounds_q, bounds_k, given["softmax_scale"])[None]

    monkeypatch.setattr(packing, "_flash_attention_forward", forward)
    samples = make_samples()
    for layout in (PACKED, SHARED):
        flash = replace(layout, flash="flash_attention_2")
        assert_same(outcome(prepared(qwen()), [samples], flash), outcome(qwen(), [samples]))
