"""What crosses the network between learner and service: requests for groups of episodes, and the scored groups.

Between machines each is one binary frame (`rlx.frame`), through `encode` and `decode`; for people the same content is
JSON, through `from_json` and `to_json`. What weight updates announce is in `rlx.rollout.manifest`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import MISSING, asdict, field, fields
from functools import cache
from typing import Any, Literal, get_args

import numpy as np

from rlx.episode import Episode, Row, Status, StepReward
from rlx.errors import WireError
from rlx.frame import decode_frame, encode_parts, reading
from rlx.record import record

_STATUSES = get_args(Status)


@record
class Sampling:
    """How to sample a completion. `top_k` 0 and `min_p` 0 mean off; `max_tokens` bounds the completion, in tokens."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    regex: str | None = None
    seed: int | None = None
    """Of this request alone; engines on CPU cannot take one and leave it out."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More fields of vLLM's SamplingParams, by its names (`trl.generation_kwargs`)."""


@record
class Completion:
    """What an engine sampled in one request: T tokens, end-of-sequence token included when it was sampled.

    `ids` int32 [T]; `logprobs` float32 [T], of the distribution that was sampled from; `versions`: run-length
    encoded `(weight_version, count)` whose counts sum to T; `finish_reason`: stop, length or abort.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    versions: tuple[tuple[int, int], ...]
    finish_reason: str
    text: str


@record
class GroupRequest:
    """`num_generations` completions of one prompt, scored together.

    `key` makes it idempotent: the same key gives the same result, never a second rollout. `prompt` is what the
    user's data set holds (a string or chat messages); `prompt_ids` int32 [P] is what the engine continues.
    `columns` are the other columns of the row, JSON values, for the rewards.
    """

    key: str
    prompt: str | list[dict[str, Any]]
    prompt_ids: np.ndarray
    num_generations: int
    sampling: Sampling
    columns: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    deadline_s: float = 600.0
    """Seconds after which the service gives up on this group, counted from its arrival."""
    seed: int = 0
    """The environments' seed, the same for all episodes of the group."""

    def encode(self) -> bytes:
        head = {"kind": "group_request", "key": self.key, "prompt": self.prompt, "n": self.num_generations,
                "sampling": vars(self.sampling), "columns": dict(self.columns), "step": self.step,
                "deadline_s": self.deadline_s, "seed": self.seed}  # fmt: skip
        return encode_parts(head, [("prompt_ids", "i4", [self.prompt_ids])])

    @staticmethod
    def decode(frame: bytes | memoryview) -> GroupRequest:
        head, blocks = decode_frame(frame)
        return GroupRequest.from_json({**head, "prompt_ids": blocks.get("prompt_ids", [])})

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> GroupRequest:
        """From the JSON form: `key, prompt, prompt_ids, n, sampling{...}, columns, step, deadline_s`."""
        with reading("group request"):
            sampling = dict(body["sampling"])
            sampling["stop"] = tuple(sampling.get("stop") or ())
            return GroupRequest(
                key=str(body["key"]),
                prompt=body["prompt"],
                prompt_ids=np.asarray(body["prompt_ids"], dtype=np.int32),
                num_generations=int(body["n"]),
                sampling=Sampling(**sampling),
                columns=body.get("columns", {}),
                step=int(body.get("step", 0)),
                deadline_s=float(body.get("deadline_s", 600.0)),
                seed=int(body.get("seed", 0)),
            )


Outcome = Literal["ok", "exception", "timeout", "crash", "invalid"]


@record
class RewardOutcome:
    """What one reward function said of one group: `values` float32 [G], NaN where it gave None or failed. `extra` are
    the columns that it logged with `log_extra`, JSON values [G] each.

    `outcome` says how the call ended; where it is not ok, `failed` completions have no value because of that, and
    `error` is the message with the user's traceback.
    """

    name: str
    values: np.ndarray
    seconds: float
    extra: Mapping[str, list[Any]] = field(default_factory=dict)
    outcome: Outcome = "ok"
    failed: int = 0
    error: str = ""
    process: str = ""
    """The process that scored it, and when that began, in unix seconds; empty and 0 where they are not known."""
    began_at: float = 0.0


@record
class GroupTimes:
    """When the service received a group, had a worker for it, had its episodes and had its rewards: unix seconds of the
    service's clock."""

    received: float
    placed: float
    generated: float
    scored: float


@record
class GroupResult:
    """A scored group of G episodes. `worker` names who generated it; times are in seconds."""

    key: str
    episodes: tuple[Episode, ...]
    rewards: tuple[RewardOutcome, ...]
    worker: str
    generation_s: float
    reward_s: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the reward functions logged with `log_metric`."""
    times: GroupTimes | None = None

    def encode(self) -> bytes:
        rows = [row for episode in self.episodes for row in episode.rows]
        head = {
            "kind": "group_result",
            "key": self.key,
            "worker": self.worker,
            "generation_s": self.generation_s,
            "reward_s": self.reward_s,
            "metrics": dict(self.metrics),
            **({} if self.times is None else {"times": list(vars(self.times).values())}),
            "episodes": [_episode_head(episode) for episode in self.episodes],
            "rewards": [_without_defaults(r, hidden=("values",)) for r in self.rewards],
        }
        return encode_parts(
            head,
            [
                ("ids", "i4", [row.ids for row in rows]),
                ("logprobs", "f4", [row.logprobs for row in rows]),
                ("prompt_ids", "i4", [row.prompt_ids for row in rows if row.prompt_ids is not None]),
                ("rewards", "f4", [r.values for r in self.rewards]),
            ],
        )

    @staticmethod
    def decode(frame: bytes | memoryview) -> GroupResult:
        head, blocks = decode_frame(frame)
        with reading("group result"):
            return GroupResult._assemble(head, blocks)

    @staticmethod
    def _assemble(head: Mapping[str, Any], blocks: Mapping[str, np.ndarray]) -> GroupResult:
        cursor = _Cursor(blocks)
        episodes = tuple(_episode(dict(item), cursor) for item in head["episodes"])
        cursor.check_all_used()
        values = blocks["rewards"].reshape(len(head["rewards"]), len(episodes))
        return GroupResult(
            key=head["key"],
            episodes=episodes,
            rewards=tuple(RewardOutcome(values=v, **r) for r, v in zip(head["rewards"], values, strict=True)),
            worker=head["worker"],
            generation_s=head["generation_s"],
            reward_s=head["reward_s"],
            metrics=head["metrics"],
            times=GroupTimes(*map(float, head["times"])) if "times" in head else None,
        )

    def to_json(self) -> dict[str, Any]:
        """For people: the same content as plain JSON, None where a reward was not applicable."""
        return {
            "key": self.key,
            "worker": self.worker,
            "generation_s": self.generation_s,
            "reward_s": self.reward_s,
            "metrics": dict(self.metrics),
            "episodes": [
                {
                    **_without_defaults(e, hidden=("rows",)),
                    "status": e.status,
                    "rows": [row_json(row) for row in e.rows],
                    "rewards": {r.name: None if np.isnan(r.values[i]) else float(r.values[i]) for r in self.rewards},
                    "extra": {**e.extra, **{column: values[i] for r in self.rewards for column, values in r.extra.items()}},
                }
                for i, e in enumerate(self.episodes)
            ],
            "failures": {r.name: {"outcome": r.outcome, "failed": r.failed, "error": r.error}
                         for r in self.rewards if r.outcome != "ok"},
        }  # fmt: skip


def row_json(row: Row) -> dict[str, Any]:
    """A training row as plain JSON; log-probabilities are None for context."""
    prompt = {} if row.prompt_ids is None else {"prompt_ids": row.prompt_ids.tolist()}
    logprobs = [None if np.isnan(x) else round(float(x), 6) for x in row.logprobs]
    return {**prompt, "ids": row.ids.tolist(), "logprobs": logprobs, "versions": row.versions}


def _episode_head(episode: Episode) -> dict[str, Any]:
    head = _without_defaults(episode, hidden=("rows",))
    head["rows"] = [
        {"n": row.ids.size, "versions": row.versions}
        if row.prompt_ids is None
        else {"n": row.ids.size, "versions": row.versions, "p": row.prompt_ids.size}
        for row in episode.rows
    ]
    return head


def _without_defaults(value: Any, hidden: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a dataclass that say something, as JSON values."""
    default = _defaults(value.__class__)
    items = {name: item for name, item in vars(value).items() if name not in hidden and item != default[name]}
    if "step_rewards" in items:
        items["step_rewards"] = [asdict(step) for step in items["step_rewards"]]
    for name in ("extra", "metrics"):
        if name in items:
            items[name] = dict(items[name])
    return items


@cache
def _defaults(kind: type) -> dict[str, Any]:
    """Of each field of a dataclass; MISSING, which equals nothing, where it has none."""
    return {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(kind)}


class _Cursor:
    """Takes rows off the blocks of a frame."""

    def __init__(self, blocks: Mapping[str, np.ndarray]):
        self._blocks = blocks
        self._at = {name: 0 for name in ("ids", "logprobs", "prompt_ids")}

    def take(self, name: str, count: int) -> np.ndarray:
        start = self._at[name]
        if count < 0 or start + count > self._blocks[name].size:
            raise WireError(f"the rows announce more {name} than the {self._blocks[name].size} that were sent")
        self._at[name] = start + count
        return self._blocks[name][start : start + count]

    def check_all_used(self) -> None:
        for name, used in self._at.items():
            if used != self._blocks[name].size:
                raise WireError(f"{used} {name} announced, {self._blocks[name].size} sent")


def _episode(head: dict[str, Any], cursor: _Cursor) -> Episode:
    rows = []
    for meta in head.pop("rows"):
        count = operator.index(meta["n"])
        versions = tuple([(int(v), int(n)) for v, n in meta["versions"]])
        counts = [n for _, n in versions]
        if sum(counts) != count or min(counts, default=1) < 1:
            raise WireError(f"versions {versions} do not partition the {count} tokens of a row")
        prompt_ids = cursor.take("prompt_ids", operator.index(meta["p"])) if "p" in meta else None
        rows.append(Row(cursor.take("ids", count), cursor.take("logprobs", count), versions, prompt_ids))
    steps = tuple(StepReward(**step) for step in head.pop("step_rewards", ()))
    turns = tuple((float(start), float(end)) for start, end in head.pop("turn_times", ()))
    if head.get("status", "ok") not in _STATUSES:
        raise WireError(f"an episode has the unknown status {head['status']!r}")
    return Episode(rows=tuple(rows), step_rewards=steps, turn_times=turns, **head)
