"""Rollouts on the disk: recorded beside a run (`record_rollouts: true`), trained on again without a service (`replay`).

    output_dir/rollouts/step-N.rlx: one frame of `wire.py`, with the groups that step N trained on as frames within it

Steps are counted from 1 in names, as in metrics.jsonl. Consumes: files, on rank 0. Waits for: nothing. Produces: what the
feed would, without evaluations; the same files give the same parameters, bit for bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlx.config import Config, Plan
from rlx.errors import ConfigError, DatasetError, WireError
from rlx.frame import decode_frame, encode_frame
from rlx.learner.durable import write_atomically
from rlx.learner.incoming.data import Prompt
from rlx.learner.incoming.requests import prompt_order
from rlx.learner.incoming.stream import Fetched, StepBatch
from rlx.learner.policy.checkpoints import ResumePoint
from rlx.wire import GroupResult

FOLDER = "rollouts"
OPEN_BATCH = "generation_batch.rlx"
"""In a checkpoint between two steps on one generation batch: that batch"""
_FORMAT = 1


@dataclass(frozen=True)
class Batch:
    """The groups that are trained on from one step on, in ticket order. `state` is what a checkpoint after them keeps of
    the feed (`Rollouts.state`)."""

    step: int
    tickets: tuple[int, ...]
    groups: list[GroupResult]
    state: Mapping[str, Any]
    old_logprobs: np.ndarray | None = None
    """In a checkpoint: float32, of all trained tokens; see `RolloutStream.open_batch`"""


class Codec:
    """A Batch as bytes, with what it belongs to: vocabulary, prompts, completions per prompt."""

    def __init__(self, config: Config, plan: Plan, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]):
        self._plan, self._tokenizer, self._prompts = plan, tokenizer, prompts
        self._order = prompt_order(config, len(prompts))

    @cached_property
    def _vocabulary(self) -> str:
        return xxhash.xxh3_128_hexdigest(json.dumps(sorted(self._tokenizer.get_vocab().items())).encode())

    def encode(self, batch: Batch) -> bytes:
        frames, prompts = [group.encode() for group in batch.groups], self._ids_of(batch.tickets)
        body = b"".join(frames)
        header = {
            "kind": "recorded_step",
            "format": _FORMAT,
            "step": batch.step,
            "vocabulary": self._vocabulary,
            "num_generations": self._plan.num_generations,
            "tickets": list(batch.tickets),
            "sizes": [len(frame) for frame in frames],
            "digest": xxhash.xxh3_128_hexdigest(body),
            "state": dict(batch.state),
        }
        return encode_frame(
            header,
            {
                **({} if batch.old_logprobs is None else {"old_logprobs": batch.old_logprobs}),
                "prompt_ids": np.concatenate(prompts).astype(np.int32),
                "prompt_lengths": np.array([len(ids) for ids in prompts], np.int32),
                "groups": np.frombuffer(body, np.uint8),
            },
        )

    def decode(self, data: bytes, name: str) -> Batch:
        """Raises DatasetError, which begins with `name`, where the bytes are damaged or belong to another run."""
        try:
            header, blocks = decode_frame(data)
            if header["kind"] != "recorded_step" or header["format"] != _FORMAT:
                raise DatasetError(
                    f"{name} has format {header['format']} of {header['kind']}; this rlx reads format {_FORMAT}. Record it anew."
                )
            body = blocks["groups"].tobytes()
            if xxhash.xxh3_128_hexdigest(body) != header["digest"]:
                raise WireError("its bytes are not those that were written")
            self._check(header, blocks, name)
            ends = np.cumsum([0, *header["sizes"]]).tolist()
            groups = [GroupResult.decode(body[start:end]) for start, end in pairwise(ends)]
        except (WireError, KeyError) as error:
            raise DatasetError(f"{name} is truncated or damaged ({error}). Copy or record it again.") from error
        return Batch(header["step"], tuple(header["tickets"]), groups, header["state"], blocks.get("old_logprobs"))

    def save_open(self, folder: Path, batch: StepBatch, old_logprobs: np.ndarray) -> None:
        """Into a checkpoint that is being written; `batch` is `RolloutStream.open_batch`."""
        kept = Batch(self._plan.first_of(batch.step), batch.tickets, batch.groups, {}, old_logprobs)
        (folder / OPEN_BATCH).write_bytes(self.encode(kept))

    def load_open(self, folder: Path, step: int) -> tuple[Fetched, np.ndarray]:
        """What a run that resumes `folder` at `step` goes on with. Raises ConfigError or DatasetError."""
        path = folder / OPEN_BATCH
        batch = self.decode(path.read_bytes(), str(path)) if path.is_file() else None
        if batch is None or batch.old_logprobs is None or batch.step != self._plan.first_of(step):
            raise ConfigError(
                f"the checkpoint {folder} was written by a run whose generation batches begin at other steps. Set "
                "trl.num_iterations, trl.steps_per_generation and gradient_accumulation_steps as they were."
            )
        return Fetched(batch.tickets, batch.groups), batch.old_logprobs

    def _check(self, header: Mapping[str, Any], blocks: Mapping[str, np.ndarray], name: str) -> None:
        if header["vocabulary"] != self._vocabulary:
            raise DatasetError(
                f"{name} was recorded with another vocabulary than base_model's tokenizer has: its token ids mean something "
                "else here. Name the model of that run, or record anew."
            )
        found = len(header["tickets"]), header["num_generations"]
        expected = self._plan.prompts_per_batch, self._plan.num_generations
        if found != expected:
            raise DatasetError(
                f"{name} holds {found[0]} prompts × {found[1]} completions, this configuration trains "
                f"{expected[0]} × {expected[1]} a batch. Set trl.num_generations, trl.generation_batch_size and "
                "trl.steps_per_generation as they were."
            )
        recorded = np.split(blocks["prompt_ids"], np.cumsum(blocks["prompt_lengths"])[:-1])
        for ticket, ids, here in zip(header["tickets"], recorded, self._ids_of(header["tickets"]), strict=True):
            if not np.array_equal(ids, here):
                raise DatasetError(
                    f"{name} was recorded with another prompt number {ticket} than `datasets` gives now. Keep data, "
                    "transforms, chat template, max_prompt_length, seed and shuffling as they were."
                )

    def _ids_of(self, tickets: Iterable[int]) -> list[np.ndarray]:
        return [self._prompts[self._order.at(ticket)].ids for ticket in tickets]


class Recorder:
    """Writes one file per step into `output_dir/rollouts`; those of `first_step` and later, of an earlier run, go."""

    def __init__(self, output_dir: Path, codec: Codec, first_step: int):
        self._folder, self._codec = output_dir / FOLDER, codec
        self._folder.mkdir(parents=True, exist_ok=True)
        for step, path in _recorded(self._folder).items():
            if step >= first_step:
                path.unlink()

    def write(self, batch: Batch) -> None:
        write_atomically(_path(self._folder, batch.step), self._codec.encode(batch))


class Replay:
    """Stands where `Rollouts` does. Raises DatasetError at once where a file of this run is missing."""

    def __init__(self, config: Config, plan: Plan, codec: Codec, total_steps: int, resume: ResumePoint | None):
        assert config.replay is not None
        self._folder, self._codec = Path(config.local(config.replay)), codec
        self._state: Mapping[str, Any] = resume.feed_state if resume else {"weight_version": 0}
        self._steps_per_batch, there = plan.steps_per_batch, _recorded(self._folder)
        steps = range(plan.next_batch(resume.step if resume else 0), total_steps, plan.steps_per_batch)
        missing = next((step for step in steps if step not in there), None)
        if missing is not None:
            kept = f"it has steps {min(there) + 1} to {max(there) + 1}" if there else "it has none"
            raise DatasetError(
                f"replay: {_path(self._folder, missing)} is missing, of a run of {total_steps} steps; {kept}. Name the "
                f"`{FOLDER}` folder of a run with record_rollouts: true, or set max_steps."
            )

    def start(self) -> None: ...

    def batch(self, step: int, model: nn.Module) -> Fetched:
        if step % self._steps_per_batch:
            return Fetched((), [])
        path = _path(self._folder, step)
        batch = self._codec.decode(path.read_bytes(), f"replay: {path}")
        self._state = batch.state
        return Fetched(batch.tickets, batch.groups)

    def finish(self, model: nn.Module) -> None: ...

    def state(self) -> Mapping[str, Any]:
        return self._state

    def close(self) -> None: ...


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step + 1}.rlx"


def _recorded(folder: Path) -> dict[int, Path]:
    """Files by the step, counted from 0."""
    found = {path: re.fullmatch(r"step-(\d+)\.rlx", path.name) for path in folder.glob("step-*.rlx")}
    return {int(match[1]) - 1: path for path, match in found.items() if match}
