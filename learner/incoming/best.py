"""The weights of the best evaluation, in `output_dir/best`: a model that transformers loads, with its tokenizer, or
the adapter alone where one is trained.

    .best (being written) ─► best ─► .best-previous, gone at once

`best` is whole or not there. Where a crash fell between the two renames, the next start of the run finishes them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from rlx.config import Config
from rlx.hub import located
from rlx.learner.durable import write_atomically
from rlx.learner.incoming.evaluation import Evaluation
from rlx.learner.policy.model import rollout_dtype
from rlx.learner.weights.publish import Packed

_RECORD = "evaluation.json"


class BestModel:
    """Keeps the best of the evaluations that it is shown, on rank 0. Call it from one thread at a time."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, output_dir: Path, resumed: bool):
        """`resumed`: whether the run goes on from a checkpoint. Then what an earlier part of it kept in `best` stays
        until it is surpassed; a new run knows nothing of it, and its first evaluation takes its place."""
        self._config, self._tokenizer = config, tokenizer
        self._folder, self._new, self._old = (output_dir / name for name in ("best", ".best", ".best-previous"))
        self._reward = -math.inf
        if config.save_best:
            self._finish_renames()
            if resumed and (self._folder / _RECORD).is_file():
                self._reward = json.loads((self._folder / _RECORD).read_text())["reward"]

    def is_best(self, evaluation: Evaluation) -> bool:
        """Whether `consider` would keep its weights. Never where no completion had a reward, or `save_best` is off."""
        return self._config.save_best and evaluation.reward > self._reward

    def consider(self, evaluation: Evaluation, packed: Packed) -> bool:
        """Write `packed`, the weights that were evaluated, when their weighted mean reward is above all before."""
        if not self.is_best(evaluation):
            return False
        shutil.rmtree(self._new, ignore_errors=True)
        self._new.mkdir(parents=True)
        if packed.adapter is None:
            (self._new / "model.safetensors").write_bytes(packed.payload)
            self._write_settings()
        for name, data in (packed.adapter or {}).items():
            (self._new / name).write_bytes(data)
        self._tokenizer.save_pretrained(self._new)
        for path in [*self._new.rglob("*"), self._new]:
            _to_disk(path)
        record = {k: v for k, v in asdict(evaluation).items() if k != "samples"}
        write_atomically(self._new / _RECORD, json.dumps(record, indent=2) + "\n")  # so that it says: whole
        if self._folder.exists():
            self._folder.replace(self._old)
        self._finish_renames()
        self._reward = evaluation.reward
        return True

    def _write_settings(self) -> None:
        """config.json, generation_config.json where the base model has one, and code that a local one brought."""
        config = self._config
        name, revision = located(config, "base_model"), config.revision_of_model
        settings = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code)
        settings.dtype = rollout_dtype(config)
        settings.save_pretrained(self._new)
        with contextlib.suppress(OSError):  # not every model has one
            GenerationConfig.from_pretrained(name, revision=revision).save_pretrained(self._new)
        if config.trust_remote_code and Path(name).is_dir():
            for file in Path(name).glob("*.py"):
                shutil.copy(file, self._new)

    def _finish_renames(self) -> None:
        """Put `.best` in the place of `best` where that was moved away for it, or there was none before."""
        if not self._folder.exists() and (self._new / _RECORD).is_file():
            self._new.replace(self._folder)
            _to_disk(self._folder.parent)
        shutil.rmtree(self._old, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
