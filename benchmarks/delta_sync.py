"""C6: how much of a model an optimizer step changes in bfloat16, and what sending only that costs.

Trajectories: real GRPO with AdamW in float32 (completions sampled from the model, advantages within groups of 8) on the
quickstart's model with its own reward, and on a random Qwen3 with a reward on its tokens. After every step the weights
are packed as a publish packs them and compared with those of the step before.

Baselines: all weights in bfloat16, and 4 bytes of index + 2 of value for each changed element.
Then, on synthetic changes, from which changed fraction on sending everything is cheaper, by bytes and by time.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin on busy cores make a step much slower

import numpy as np
import torch
from local_parts import arguments, machine, write_json
from service import QUICKSTART, print_versions
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from rlx.learner.weights.publish import Packed, pack
from rlx.rollout import delta

RATES = (1e-6, 1e-5, 1e-4)
GROUP = 8
INDEX_AND_VALUE = 6
FRACTIONS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6)


@dataclass(frozen=True)
class Step:
    """Of one step: sizes in bytes."""

    changed: float
    dense: int
    difference: int
    sent: bool
    """Whether a publish would send the difference, not everything."""
    index_and_value: int
    encode_s: float
    apply_s: float


# --- trajectories -----------------------------------------------------------------------------------------------------


class Quickstart:
    """The quickstart's model, questions and reward: 8 tokens a completion, 16 prompts a step."""

    name, new_tokens, prompts = "quickstart", 8, 16

    def __init__(self) -> None:
        folder = QUICKSTART.parent / "out"
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        self._tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
        self._rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
        self._random = random.Random(0)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], list[float]]]:
        """Prompt ids and mask [B, P], GROUP rows each, and the reward of completions [B, T]."""
        rows = [row for row in self._random.sample(self._rows, self.prompts) for _ in range(GROUP)]
        texts = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": row["question"]}], tokenize=False, add_generation_prompt=True
            )
            for row in rows
        ]
        ids = self._tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)

        def reward(completions: torch.Tensor) -> list[float]:
            said = self._tokenizer.batch_decode(completions, skip_special_tokens=True)
            return [float(text == row["answer"]) for text, row in zip(said, rows, strict=True)]

        return ids.input_ids, ids.attention_mask, reward


class RandomQwen3:
    """A random Qwen3 of 29 M parameters; the reward is the share of even tokens among 32, 4 prompts of 16 a step."""

    name, new_tokens, prompts = "random Qwen3", 32, 4

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=4, head_dim=64, max_position_embeddings=256, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        self.model = Qwen3ForCausalLM(config)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], list[float]]]:
        ids = torch.randint(1, 8192, (self.prompts, 16)).repeat_interleave(GROUP, 0)
        return ids, torch.ones_like(ids), lambda done: (done % 2 == 0).float().mean(1).tolist()


def grpo_step(task: Quickstart | RandomQwen3, optimizer: torch.optim.Optimizer) -> None:
    """Sample, score, and one on-policy update, as the learner's defaults make it: AdamW, gradient norm at most 1."""
    model = task.model
    ids_BP, mask_BP, reward = task.batch()
    with torch.no_grad():
        all_BS = model.generate(
            input_ids=ids_BP, attention_mask=mask_BP, max_new_tokens=task.new_tokens, do_sample=True, top_k=0,
            pad_token_id=model.config.pad_token_id,
        )  # fmt: skip
    done_BT = all_BS[:, ids_BP.shape[1] :]
    rewards_PG = torch.tensor(reward(done_BT)).view(-1, GROUP)
    advantages_B = ((rewards_PG - rewards_PG.mean(1, True)) / (rewards_PG.std(1, keepdim=True) + 1e-4)).view(-1)
    ends_BT = done_BT == (model.config.eos_token_id if model.config.eos_token_id is not None else -1)
    live_BT = ends_BT.cumsum(1) - ends_BT.long() == 0
    mask_BS = torch.cat([mask_BP, torch.ones_like(done_BT)], 1)
    logits_BTV = model(input_ids=all_BS, attention_mask=mask_BS, logits_to_keep=done_BT.shape[1] + 1).logits[:, :-1]
    logprobs_BT = logits_BTV.log_softmax(-1).gather(2, done_BT[..., None])[..., 0]
    loss = -(advantages_B[:, None] * logprobs_BT)[live_BT].mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def trajectory(make: type[Quickstart] | type[RandomQwen3], rate: float, steps: int, folder: Path) -> list[Step]:
    torch.manual_seed(1)
    task = make()
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=rate, weight_decay=0.0)
    before, found = pack(task.model, torch.bfloat16), []
    for _ in range(steps):
        grpo_step(task, optimizer)
        after = pack(task.model, torch.bfloat16)
        found.append(measure(before, after, folder))
        before = after
    return found


def measure(before: Packed, after: Packed, folder: Path) -> Step:
    """Encode and apply as a publish does; also where it would send everything, for the bytes and the times."""
    sent = delta.encode(before.payload, after.payload).data
    data, changed, encode_s, apply_s = there_and_back(before.payload, after.payload, folder)
    dense, count = len(after.payload), round(changed * len(after.payload) / 2)
    assert sent is None or sent == data
    return Step(changed, dense, len(data), sent is not None, INDEX_AND_VALUE * count, encode_s, apply_s)


def there_and_back(old: memoryview, new: memoryview, folder: Path) -> tuple[bytes, float, float, float]:
    """The difference however large, the changed fraction, seconds to encode and to apply; checks every bit."""
    (folder / "base").write_bytes(old)
    with any_fraction():
        began = time.perf_counter()
        found = delta.encode(old, new)
        encode_s = time.perf_counter() - began
    assert found.data is not None
    began = time.perf_counter()
    delta.apply(folder / "base", found.data, folder / "out")
    apply_s = time.perf_counter() - began
    assert (folder / "out").read_bytes() == new
    return found.data, found.changed_fraction, encode_s, apply_s


@contextmanager
def any_fraction() -> Iterator[None]:
    kept, delta.MAX_CHANGED = delta.MAX_CHANGED, 1.0
    try:
        yield
    finally:
        delta.MAX_CHANGED = kept


# --- crossover --------------------------------------------------------------------------------------------------------


def crossover(megabytes: int, repeats: int, folder: Path) -> list[dict[str, float]]:
    """Weights of a normal distribution, some of them moved to a neighbouring value."""
    rng = np.random.default_rng(0)
    old = (rng.standard_normal(megabytes * 500_000, np.float32) * 0.02).view(np.uint32) >> 16
    old = old.astype(np.uint16)
    rows = []
    for fraction in FRACTIONS:
        new = old.copy()
        moved = rng.random(old.size, np.float32) < fraction
        new[moved] += rng.choice(np.array([1, 0xFFFF], np.uint16), int(moved.sum()))
        views = old.data.cast("B"), new.data.cast("B")
        times, copies = [], []
        for _ in range(repeats):
            data, changed, encode_s, apply_s = there_and_back(*views, folder)
            times.append((encode_s, apply_s))
            began = time.perf_counter()
            (folder / "dense").write_bytes(views[1])
            copies.append(time.perf_counter() - began)
        encode_s, apply_s = (statistics.median(column) for column in zip(*times, strict=True))
        dense_s = statistics.median(copies)
        more_s = max(encode_s + apply_s - dense_s, 1e-9)
        rows.append(
            {"changed": changed, "sent": len(data), "times_less": new.nbytes / len(data), "encode_s": encode_s,
             "apply_s": apply_s, "dense_write_s": dense_s, "cheaper_below_gb_s": (new.nbytes - len(data)) / more_s / 1e9}
        )  # fmt: skip
    return rows


def main() -> None:
    parser = arguments(__doc__)
    args = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(2)
    print_versions()
    print(f"numpy {np.__version__}; {machine()}")
    numbers: dict[str, Any] = {"trajectories": [], "crossover": []}
    shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=shared) as name:
        folder = Path(name)
        print(
            "\nsteps of AdamW; medians of the steps after the first 2. Bytes of a step's update, times less than bf16"
        )
        print(f"{'model':14}{'rate':>7} {'MB bf16':>8} {'changed: first':>15}{'later':>9} {'min to max':>17}"
              f"{'delta kB':>10}{'less':>7}{'index+value':>13}{'sent':>7}{'encode ms':>11}{'apply ms':>10}")  # fmt: skip
        for make, steps in ((Quickstart, 10 if args.quick else 30), (RandomQwen3, 6 if args.quick else 15)):
            for rate in RATES:
                found = trajectory(make, rate, steps, folder)
                numbers["trajectories"].append(summary(make.name, rate, found))
        print(f"\n{'changed':>9}{'times less':>12}{'encode ms':>11}{'apply ms':>10}{'dense write ms':>16}"
              "   cheaper than bf16 on links below")  # fmt: skip
        for row in crossover(64 if args.quick else 256, 2 if args.quick else 5, folder):
            print(f"{row['changed']:9.2%}{row['times_less']:12.0f}{1000 * row['encode_s']:11.1f}"
                  f"{1000 * row['apply_s']:10.1f}{1000 * row['dense_write_s']:16.1f}"
                  f"   {row['cheaper_below_gb_s']:.2f} GB/s")  # fmt: skip
            numbers["crossover"].append(row)
    print(
        f"sent as a difference up to {delta.MAX_CHANGED:.0%} changed; every update above was applied bit by bit; {machine()}"
    )
    write_json(args.json, numbers)


def summary(name: str, rate: float, steps: list[Step]) -> dict[str, Any]:
    """One printed line, and its numbers."""
    later = steps[2:]

    def median(of: Callable[[Step], float]) -> float:
        return statistics.median(map(of, later))

    changed = [step.changed for step in later]
    row = {
        "model": name, "rate": rate, "dense_bytes": steps[0].dense, "changed_first": steps[0].changed,
        "changed": median(lambda s: s.changed), "changed_min": min(changed), "changed_max": max(changed),
        "difference_bytes": median(lambda s: s.difference), "times_less": median(lambda s: s.dense / s.difference),
        "sent_as_difference": sum(s.sent for s in later) / len(later),
        "index_and_value_times_less": median(lambda s: s.dense / s.index_and_value),
        "encode_s": median(lambda s: s.encode_s), "apply_s": median(lambda s: s.apply_s),
    }  # fmt: skip
    print(
        f"{name:14}{rate:7.0e} {row['dense_bytes'] / 1e6:8.2f} {row['changed_first']:15.2%}{row['changed']:9.2%} "
        f"{row['changed_min']:8.2%}–{row['changed_max']:.2%}{row['difference_bytes'] / 1e3:10.1f}{row['times_less']:6.0f}×"
        f"{row['index_and_value_times_less']:12.1f}×{'delta' if row['sent_as_difference'] > 0.5 else 'all':>7}{1000 * row['encode_s']:11.2f}{1000 * row['apply_s']:10.2f}",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
