"""Pre-trains the quickstart's model on the clerk's ledger, and samples it.

Here: the model's shape, its training loop, and accuracy by sampling. Not here: the data (arithmetic.py), the
tokenizer (characters.py), files and the command line (make_model.py).

Shape suffixes: B sequences, T tokens, N answer tokens of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from arithmetic import Sum
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

IGNORED = -100
MAX_ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to pre-train; the learning rates are the peaks."""

    num_steps: int = 320
    batch_size: int = 128
    matrix_learning_rate: float = 0.02
    other_learning_rate: float = 0.003
    warmup_steps: int = 20


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A fresh model of 1.06 M parameters with tied embeddings, from torch's global seed."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=tokenizer.model_max_length,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def prompt_text(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """The chat with one user message, open for the assistant's answer."""
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def encode(tokenizer: PreTrainedTokenizerFast, entries: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(question, answer) pairs as right-padded ids_BT and labels_BT; only the answers and their end are labels."""
    prompts = tokenizer([prompt_text(tokenizer, question) for question, _ in entries])["input_ids"]
    answers = tokenizer([answer + tokenizer.eos_token for _, answer in entries])["input_ids"]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids_BT = torch.full((len(entries), longest), tokenizer.pad_token_id)
    labels_BT = torch.full((len(entries), longest), IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids_BT[row, :end] = torch.tensor(prompt + answer)
        labels_BT[row, len(prompt) : end] = torch.tensor(answer)
    return ids_BT, labels_BT


def answer_loss(model: Qwen3ForCausalLM, ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens, in nats."""
    hidden_BTD = model.model(input_ids=ids_BT).last_hidden_state[:, :-1]
    targets_BT = labels_BT[:, 1:]
    is_answer_BT = targets_BT != IGNORED
    logits_NV = model.lm_head(hidden_BTD[is_answer_BT])
    return torch.nn.functional.cross_entropy(logits_NV, targets_BT[is_answer_BT])


def build_optimizers(model: Qwen3ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=recipe.other_learning_rate, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def pretrain(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    entries: list[tuple[str, str]],
    recipe: Recipe,
    say: Callable[[str], None],
) -> None:
    """Train in place on `entries` in their order, once; `say` gets a progress line ten times."""

    def learning_rate_scale(step: int) -> float:
        left = recipe.num_steps - step
        return min(1.0, (step + 1) / recipe.warmup_steps, left / (0.5 * recipe.num_steps))

    optimizers = build_optimizers(model, recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, learning_rate_scale) for o in optimizers]
    started = time.monotonic()
    model.train()
    for step in range(recipe.num_steps):
        batch = entries[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        loss = answer_loss(model, *encode(tokenizer, batch))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        done = step + 1
        if done % max(1, recipe.num_steps // 10) == 0:
            left_s = (time.monotonic() - started) / done * (recipe.num_steps - done)
            say(f"step {done}/{recipe.num_steps}  loss {loss.item():.3f}  about {left_s:.0f} s left")
    model.eval()


@torch.inference_mode()
def sample_answers(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[str], num_samples: int
) -> list[list[str]]:
    """`num_samples` answers to each question, sampled at temperature 1 from torch's global seed."""
    prompts = tokenizer([prompt_text(tokenizer, q) for q in questions], return_tensors="pt", padding=True)
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=num_samples,
        max_new_tokens=MAX_ANSWER_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    ids_BT = model.generate(**prompts, generation_config=sampling)
    texts = tokenizer.batch_decode(ids_BT[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return [texts[start : start + num_samples] for start in range(0, len(texts), num_samples)]


def accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, sums: list[Sum], num_samples: int) -> float:
    """The share of sampled answers that are right."""
    answers = sample_answers(model, tokenizer, [s.question for s in sums], num_samples)
    right = [text == s.answer for s, texts in zip(sums, answers, strict=True) for text in texts]
    return sum(right) / len(right)
