"""The loss does not depend on how a step is cut: micro-batches, processes, padding, chunks; and its parts by hand."""

from __future__ import annotations

import gc
import math
import multiprocessing
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nan, nn, tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlx.learner.microbatches import logprobs as logprobs_module
from rlx.learner.microbatches.batching import MicroBatch, Sample, collate
from rlx.learner.microbatches.logprobs import completion_logprobs
from rlx.learner.microbatches.splitting import split
from rlx.learner.objective.loss_metrics import LossMetrics
from rlx.learner.objective.loss_terms import Sequences, gamma_weight, importance_ratio, kl_k3, on_policy_enough
from rlx.learner.objective.losses import LossOptions, policy_loss, token_weights

B, VOCAB, MAX_LENGTH, EOS = 8, 30, 12, 0
LOSS_TYPES: tuple[Any, ...] = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
VARIANTS: dict[str, LossOptions] = {
    **{loss_type: LossOptions(loss_type, beta=0.04, delta=1.5) for loss_type in LOSS_TYPES},
    "gspo": LossOptions("grpo", "sequence", off_policy_mask_threshold=0.1,
                        vllm_importance_sampling_mode="sequence_mask", vllm_importance_sampling_clip_max=None,
                        vllm_importance_sampling_clip_min=0.01),
    "luspo of sequences": LossOptions("luspo", "sequence", vllm_importance_sampling_mode="sequence_truncate"),
}  # fmt: skip


def make_model() -> Qwen2ForCausalLM:
    """Padding id and end of sequence are both 0, which is also what `collate` fills with."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None,
        eos_token_id=EOS, pad_token_id=EOS, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def make_samples(variant: str, lengths: tuple[int, ...] = (12, 1, 0, 5, 9, 3, 7, 2), masked: int = 4) -> list[Sample]:
    """Ends of sequence, an empty completion and a masked one among them."""
    rng = np.random.default_rng(0)
    is_masked = [i == masked for i in range(len(lengths))]
    weights = token_weights(VARIANTS[variant].loss_type, tensor(lengths), MAX_LENGTH, tensor(is_masked)).tolist()
    samples = []
    for length, weight, hidden in zip(lengths, weights, is_masked, strict=True):
        ids = rng.integers(1, VOCAB, length).astype(np.int32)
        ids[-1:] = EOS
        prompt = rng.integers(1, VOCAB, rng.integers(1, 5)).astype(np.int32)
        logprobs = rng.normal(-3, 1, length).astype(np.float32)
        samples.append(Sample(prompt, ids, logprobs, rng.normal(), weight, hidden))
    return samples


def loss_of(model: nn.Module, batch: MicroBatch, variant: str) -> tuple[Tensor, LossMetrics]:
    """Old policy and reference are functions of the tokens alone, so that no second model is needed."""
    logprobs, entropies = completion_logprobs(model, batch, 0.9)
    old = logprobs.detach() + 0.3 * torch.sin(batch.target_ids_T * 1.7)
    ref = logprobs.detach() + 0.5 * torch.cos(batch.target_ids_T * 2.3)
    sampling, advantages, weights = batch.sampling_logprobs_T, batch.advantages_T, batch.weights_T
    out = policy_loss(logprobs, old, ref, sampling, advantages, weights, batch.lengths_B, VARIANTS[variant], entropies)
    return out.loss, out.metrics


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def accumulate(parts: list[list[Sample]], variant: str) -> tuple[float, Tensor, dict[str, float]]:
    model, total, metrics = make_model(), 0.0, LossMetrics.zero()
    for part in parts:
        loss, measured = loss_of(model, collate(part), variant)
        loss.backward()
        total, metrics = total + loss.item(), metrics + measured
    return total, flat_gradient(model), metrics.report()


def assert_same_gradient(gradient: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 1e-2
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_micro_batch_of_eight_equals_two_of_four_and_eight_of_one(variant: str) -> None:
    samples = make_samples(variant)
    loss, gradient, report = accumulate([samples], variant)
    for cuts in (2, 8):
        cut_loss, cut_gradient, cut_report = accumulate(split(samples, 1, cuts)[0], variant)
        assert cut_loss == pytest.approx(loss, rel=1e-5)
        assert cut_report == pytest.approx(report, rel=1e-5)
        assert_same_gradient(cut_gradient, gradient)


def test_the_order_of_samples_changes_nothing() -> None:
    samples = make_samples("dapo")
    loss, gradient, _ = accumulate([samples], "dapo")
    shuffled_loss, shuffled_gradient, _ = accumulate([random.Random(1).sample(samples, B)], "dapo")
    assert shuffled_loss == pytest.approx(loss, rel=1e-5)
    assert_same_gradient(shuffled_gradient, gradient)


def data_parallel_gradient(variant: str, rank: int, world_size: int) -> Tensor:
    model = DistributedDataParallel(make_model())
    parts = split(make_samples(variant), world_size, 4)[rank]
    for i, part in enumerate(parts):
        with model.no_sync() if i < len(parts) - 1 else nullcontext():
            (loss_of(model, collate(part), variant)[0] * world_size).backward()
    return flat_gradient(model)


def train_rank(rank: int, world_size: int, folder: str) -> None:
    """The gradients of one rank, for each loss, into a file. No model may outlive the process group: freeing the last
    reference to a gloo group waits for its thread, which may wait for the interpreter lock."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    gradients = {variant: data_parallel_gradient(variant, rank, world_size) for variant in VARIANTS}
    torch.save(gradients, f"{folder}/{rank}.pt")
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=train_rank, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=240)
        process.kill()
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    assert any(collate(part).target_ids_T.numel() == 0 for part in split(make_samples("dapo"), 2, 4)[0])
    for variant in VARIANTS:
        _, expected, _ = accumulate([make_samples(variant)], variant)
        for rank in range(2):
            assert_same_gradient(torch.load(tmp_path / f"{rank}.pt")[variant], expected)


def test_padded_log_probs_equal_each_sequence_alone_to_its_end_of_sequence() -> None:
    model, samples = make_model(), [s for s in make_samples("dapo") if s.num_trained]
    logprobs, _ = completion_logprobs(model, collate(samples), 0.9)
    alone = []
    for s in samples:
        ids = tensor(np.concatenate([s.prompt_ids, s.completion_ids]).astype(np.int64))
        table = (model(ids[None]).logits[0, :-1] / 0.9).log_softmax(-1)
        alone.append(table.gather(-1, ids[1:, None])[len(s.prompt_ids) - 1 :, 0])
    assert len(logprobs) == sum(s.num_trained for s in samples)
    torch.testing.assert_close(logprobs, torch.cat(alone))


def test_the_end_of_sequence_is_trained_where_the_padding_has_its_id() -> None:
    model = make_model()
    batch = collate([Sample(np.array([3], np.int32), np.array([5, EOS], np.int32), np.zeros(2, np.float32), 1.0, 0.5)])
    before = completion_logprobs(model, batch, 1.0)[0][1].item()
    logprobs, _ = completion_logprobs(model, batch, 1.0)
    advantages = tensor([0.0, 1.0])
    options = LossOptions(vllm_importance_sampling_correction=False)
    policy_loss(logprobs, None, None, None, advantages, batch.weights_T, batch.lengths_B, options).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    assert completion_logprobs(model, batch, 1.0)[0][1].item() > before + 0.01


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_and_masked_completions_only_count_in_the_weights(variant: str) -> None:
    samples = make_samples(variant)
    loss, gradient, report = accumulate([samples], variant)
    rest_loss, rest_gradient, rest_report = accumulate([[s for s in samples if s.num_trained]], variant)
    assert rest_loss == pytest.approx(loss, rel=1e-5)
    assert rest_report == pytest.approx(report, rel=1e-5)
    assert_same_gradient(rest_gradient, gradient)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_micro_batch_without_trained_tokens_has_gradient_zero_for_every_parameter(variant: str) -> None:
    model = make_model()
    loss, metrics = loss_of(model, collate([s for s in make_samples(variant) if not s.num_trained]), variant)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert metrics.report() == {}


def test_chunks_change_neither_log_probs_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model(), collate(make_samples("dapo"))
    results = []
    for size in (2**25, 7 * VOCAB):
        monkeypatch.setattr(logprobs_module, "_CHUNK_ELEMENTS", size)
        model.zero_grad()
        logprobs, entropies = completion_logprobs(model, batch, 0.9)
        assert entropies is not None
        assert not entropies.requires_grad
        (logprobs * batch.advantages_T).sum().backward()
        results.append((logprobs.detach(), entropies, flat_gradient(model)))
    torch.testing.assert_close(results[1], results[0])


def test_token_weights_by_hand() -> None:
    lengths, masked = tensor([2, 5, 0, 3]), tensor([False, True, False, False])
    by_type = {t: token_weights(t, lengths, 10, masked) for t in LOSS_TYPES}
    torch.testing.assert_close(by_type["grpo"], tensor([1 / 8, 0, 0, 1 / 12]))
    torch.testing.assert_close(by_type["dr_grpo"], tensor([1 / 40, 0, 0, 1 / 40]))
    torch.testing.assert_close(by_type["sapo"], by_type["grpo"])
    torch.testing.assert_close(by_type["luspo"], tensor([1 / 4, 0, 0, 1 / 4]))
    for loss_type in ("dapo", "bnpo", "cispo", "vespo"):
        torch.testing.assert_close(by_type[loss_type], tensor([1 / 5, 0, 0, 1 / 5]))
    torch.testing.assert_close(token_weights("dapo", lengths, 10), torch.tensor([0.1, 0.1, 0, 0.1]))
    assert token_weights("dapo", lengths, 10, torch.ones(4, dtype=torch.bool)).tolist() == [0.0] * 4


def test_the_clipped_objective_by_hand() -> None:
    ratios, advantages = tensor([1.5, 1.5, 0.5, 0.5, 4.0, 1.1]), tensor([1.0, -1.0, 1.0, -1.0, -1.0, 2.0])
    options = LossOptions(epsilon=0.2, epsilon_high=0.3, delta=3.0, vllm_importance_sampling_correction=False)
    logprobs = ratios.log().requires_grad_()
    out = policy_loss(logprobs, torch.zeros(6), None, None, advantages, torch.ones(6), tensor([6]), options)
    assert out.loss.item() == pytest.approx(-1.3 + 1.5 - 0.5 + 0.8 + 3.0 - 2.2)
    out.loss.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, tensor([0, 1.5, -0.5, 0, 0, -2.2]))
    report = out.metrics.report()
    assert [report[f"clip_ratio/{name}_mean"] for name in ("low", "high", "region")] == [1 / 6, 1 / 6, 1 / 3]


def test_the_kl_term_by_hand() -> None:
    kl = kl_k3(tensor([0.5, 0.25]).log(), tensor([0.25, 0.25]).log())
    torch.testing.assert_close(kl, tensor([0.5 + math.log(2) - 1, 0.0]))
    q = torch.distributions.Dirichlet(torch.ones(2, 5)).sample()
    exact = (q[0] * (q[0] / q[1]).log()).sum()
    torch.testing.assert_close((q[0] * kl_k3(q[0].log(), q[1].log())).sum(), exact, atol=1e-5, rtol=1e-5)


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens() -> None:
    logprobs = tensor([1.2, 1.5, 0.5]).log().requires_grad_()
    options = LossOptions("grpo", "sequence", epsilon=0.6, vllm_importance_sampling_correction=False)
    weights = tensor([0.5, 0.5, 1.0])
    out = policy_loss(
        logprobs, torch.zeros(3), None, None, tensor([1.0, 1.0, -2.0]), weights, tensor([2, 0, 1]), options
    )
    mean = (1.2 * 1.5) ** 0.5
    assert out.loss.item() == pytest.approx(-mean + 1.0)
    out.loss.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, tensor([-mean / 2, -mean / 2, 1.0]))


def test_the_bounded_ratio_of_cispo_carries_no_gradient() -> None:
    logprobs = tensor([3.0, 1.5]).log().requires_grad_()
    options = LossOptions("cispo", epsilon_high=2.0, vllm_importance_sampling_correction=False)
    out = policy_loss(logprobs, torch.zeros(2), None, None, tensor([1.0, -1.0]), torch.ones(2), tensor([2]), options)
    out.loss.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, tensor([-2.0, 1.5]))
    assert out.metrics.report()["cispo_clip_ratio"] == 0.5


def test_the_soft_bound_of_sapo_has_the_gradient_of_the_plain_ratio_at_one() -> None:
    logprobs = torch.zeros(2, requires_grad=True)
    options = LossOptions("sapo", vllm_importance_sampling_correction=False)
    advantages = tensor([1.0, -1.0])
    policy_loss(logprobs, None, None, None, advantages, torch.ones(2), tensor([2]), options).loss.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -advantages)


def test_the_gamma_weight_is_one_on_policy_and_falls_on_both_sides() -> None:
    sequences = Sequences.of(tensor([2, 1, 1]), 4)
    ratios, advantages = tensor([0.5, 0.5, 1.0, 3.0]), tensor([1.0, 1.0, -1.0, -1.0])
    phi = gamma_weight(ratios.log(), None, advantages, sequences, (2.0, 3.0), (3.0, 2.0))
    low, high = math.exp(3) * 0.25**2 * math.exp(-3 * 0.25), math.exp(2) * 3**3 * math.exp(-2 * 3)
    torch.testing.assert_close(phi, tensor([low, low, 1.0, high]))
    corrected = gamma_weight(torch.zeros(4), ratios, advantages, sequences, (2.0, 3.0), (3.0, 2.0))
    torch.testing.assert_close(corrected, phi)


def test_only_bad_sequences_that_have_drifted_are_left_out() -> None:
    sequences = Sequences.of(tensor([2, 0, 2, 1, 2]), 7)
    sampling = tensor([-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, nan])
    present = tensor([-3.0, -1.0, -3.0, -1.0, -1.4, -3.0, -9.0])
    advantages = tensor([-1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    kept = on_policy_enough(present, sampling, advantages, sequences, 0.9)
    assert kept.tolist() == [False, False, True, True, True, False, False]
    assert on_policy_enough(present, sampling, advantages, sequences, 1.0).all()
    assert on_policy_enough(present, sampling, torch.zeros(7), sequences, 0.1).all()
    options = LossOptions("grpo", off_policy_mask_threshold=0.9, vllm_importance_sampling_correction=False)
    out = policy_loss(present, None, None, sampling, advantages, torch.ones(7), tensor([2, 0, 2, 1, 2]), options)
    assert out.loss.item() == pytest.approx(-1.0)
    assert out.metrics.report()["off_policy_masked_fraction"] == 0.5


def test_importance_ratios_by_hand_in_every_mode() -> None:
    lengths = tensor([1, 3])
    old = tensor([0.8, 0.5, 0.5, 0.1]).log()
    sampling = torch.cat([tensor([0.1, 0.25]).log(), tensor([nan]), tensor([0.2]).log()])

    def ratio(mode: str, low: float | None, high: float | None) -> list[float]:
        return importance_ratio(old, sampling, Sequences.of(lengths, 4), mode, low, high).tolist()

    assert ratio("token_truncate", None, 3.0) == pytest.approx([3.0, 2.0, 1.0, 0.5])
    assert ratio("token_truncate", 0.9, None) == pytest.approx([8.0, 2.0, 1.0, 0.9])
    assert ratio("token_mask", 0.9, 3.0) == pytest.approx([0.0, 2.0, 1.0, 0.0])
    assert ratio("token_mask", None, None) == pytest.approx([8.0, 2.0, 1.0, 0.5])
    assert ratio("sequence_truncate", None, 3.0) == pytest.approx([3.0, 1.0, 1.0, 1.0])
    assert ratio("sequence_mask", None, 3.0) == pytest.approx([0.0, 1.0, 1.0, 1.0])

    out = policy_loss(old, None, None, sampling, torch.ones(4), torch.ones(4), lengths, LossOptions())
    report = out.metrics.report()
    gap = [math.log(8), math.log(2), math.log(2)]
    assert out.loss.item() == pytest.approx(-6.5)
    assert report["sampling/sampling_logp_difference/mean"] == pytest.approx(sum(gap) / 3)
    assert report["sampling/sampling_logp_difference/max"] == pytest.approx(gap[0])
    assert report["sampling/importance_sampling_ratio/max"] == pytest.approx(3.0)


def test_a_missing_reference_or_sampler_is_an_error_that_names_the_option() -> None:
    zeros, lengths = torch.zeros(2), tensor([2])
    with pytest.raises(ValueError, match="reference"):
        policy_loss(zeros, None, None, zeros, zeros, zeros, lengths, LossOptions(beta=0.1))
    with pytest.raises(ValueError, match="vllm_importance_sampling_correction"):
        policy_loss(zeros, None, None, None, zeros, zeros, lengths, LossOptions())
