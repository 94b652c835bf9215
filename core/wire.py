"""What crosses the network between learner and service, and its binary form.

A frame is `b"RLX1"`, a little-endian uint32 header length, a JSON header, then raw blocks. The header lists each
block as `[name, dtype, count]`; token ids are int32, log-probabilities and rewards float32, all little-endian, so
that 1,000 tokens with their log-probabilities cost 8,000 bytes and no per-token Python object. `decode` gives
views on the received bytes. JSON for people is the same objects through `to_json`.
"""

from __future__ import annotations

import json
import operator
import struct
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from typing import Any, Literal, get_args

import numpy as np

from rlx.episode import Episode, Row, Status, StepReward
from rlx.errors import ServiceError
from rlx.record import record

CONTENT_TYPE = "application/x-rlx"
_MAGIC = b"RLX1"
_STATUSES = get_args(Status)
_MALFORMED = (KeyError, TypeError, ValueError, OverflowError)
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_DTYPES: dict[str, np.dtype[Any]] = {"i4": np.dtype("<i4"), "f4": np.dtype("<f4"), "u1": np.dtype("u1")}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class WireError(ServiceError, ValueError):
    """Bytes that are not a frame of this format."""


def encode_frame(header: Mapping[str, Any], blocks: Mapping[str, np.ndarray]) -> bytes:
    """One frame. `blocks` are one-dimensional arrays of int32, float32 or uint8."""
    for name, array in blocks.items():
        if array.dtype not in _CODES or array.ndim != 1:
            raise WireError(
                f"block {name!r}: one-dimensional int32, float32 or uint8 expected, got {array.dtype} {array.shape}"
            )
    return _frame(header, [(name, _CODES[array.dtype], [array]) for name, array in blocks.items()])


def _frame(header: Mapping[str, Any], blocks: list[tuple[str, str, list[np.ndarray]]]) -> bytes:
    """`blocks`: name, type, and the arrays that one after the other are its content."""
    table, payload = [], []
    for name, code, arrays in blocks:
        dtype = _DTYPES[code]
        table.append([name, code, sum([array.size for array in arrays])])
        payload += [array.astype(dtype, copy=False).tobytes() for array in arrays]
    head = _ENCODER.encode({**header, "blocks": table}).encode()
    return b"".join([_MAGIC, struct.pack("<I", len(head)), head, *payload])


def decode_frame(frame: bytes | memoryview) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and blocks of a frame; the arrays are read-only views on `frame`."""
    view = memoryview(frame)
    if len(view) < 8 or bytes(view[:4]) != _MAGIC:
        raise WireError("not an rlx frame: it does not start with RLX1")
    (head_size,) = struct.unpack("<I", view[4:8])
    try:
        header = json.loads(str(view[8 : 8 + head_size], "utf-8"))
        table = [(str(name), str(code), operator.index(count)) for name, code, count in header.pop("blocks")]
    except (*_MALFORMED, AttributeError, RecursionError) as error:
        raise WireError(f"the header of the frame is not readable: {error}") from error
    offset, blocks = 8 + head_size, {}
    for name, code, count in table:
        if code not in _DTYPES:
            raise WireError(f"block {name!r} has the unknown type {code!r}")
        size = _DTYPES[code].itemsize * count
        if count < 0 or offset + size > len(view):
            raise WireError(f"block {name!r} needs {size} bytes, the frame ends after {len(view) - offset}")
        blocks[name] = np.frombuffer(view, _DTYPES[code], count, offset)
        offset += size
    if offset != len(view):
        raise WireError(f"{len(view) - offset} bytes too many after the last block")
    return header, blocks


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
    """Of the environments: the same for all episodes of the group."""

    def encode(self) -> bytes:
        head = {"kind": "group_request", "key": self.key, "prompt": self.prompt, "n": self.num_generations,
                "sampling": vars(self.sampling), "columns": dict(self.columns), "step": self.step,
                "deadline_s": self.deadline_s, "seed": self.seed}  # fmt: skip
        return _frame(head, [("prompt_ids", "i4", [self.prompt_ids])])

    @staticmethod
    def decode(frame: bytes | memoryview) -> GroupRequest:
        head, blocks = decode_frame(frame)
        return GroupRequest.from_json({**head, "prompt_ids": blocks.get("prompt_ids", [])})

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> GroupRequest:
        """From the JSON form: `key, prompt, prompt_ids, n, sampling{...}, columns, step, deadline_s`."""
        try:
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
        except _MALFORMED as error:
            raise WireError(f"not a group request: {_said(error)}") from error


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
    """Which scored it, and when it began, in unix seconds; empty and 0 where that is not known."""
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
        return _frame(
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
        try:
            return GroupResult._assemble(head, blocks)
        except _MALFORMED as error:
            raise WireError(f"not a group result: {_said(error)}") from error

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


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (safetensors code such as BF16) and shape of one parameter, in the Hugging Face naming."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Offer:
    """The bytes of an update in a file in memory that process `pid` of this machine has open as `fd`."""

    pid: int
    fd: int
    name: str

    @classmethod
    def from_json(cls, body: Any) -> Offer:
        try:
            return cls(int(body["pid"]), int(body["fd"]), str(body["name"]))
        except (TypeError, KeyError, ValueError) as error:
            raise WireError(f"not an offer of weights: {body!r:.100}") from error


@dataclass(frozen=True)
class Probe:
    """Fixed token sequences with the learner's log-probabilities at temperature 1 under the weights of an update:
    `ids[i]` has T_i tokens, `logprobs[i]` the T_i - 1 log-probabilities of all but the first."""

    ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class WeightManifest:
    """What a weight update will bring. `fingerprint` is the xxh3-128 hex digest of the `nbytes` safetensors bytes.

    With `base_fingerprint` only the difference to the update of that fingerprint travels (`rollout/delta.py`), as
    `transfer_nbytes` bytes; size and fingerprint are still those of the whole. `probe` is what a worker's
    log-probabilities are compared with; with `gate` no worker serves these weights before it passed.
    """

    version: int
    nbytes: int
    fingerprint: str
    tensors: tuple[TensorSpec, ...]
    base_fingerprint: str | None = None
    transfer_nbytes: int | None = None
    probe: Probe | None = None
    gate: bool = False

    @property
    def travels(self) -> int:
        """Bytes that the learner sends."""
        return self.nbytes if self.transfer_nbytes is None else self.transfer_nbytes

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> WeightManifest:
        try:
            tensors = tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in body["tensors"])
            base, transfer, probe = body.get("base_fingerprint"), body.get("transfer_nbytes"), body.get("probe")
            return WeightManifest(
                version=int(body["version"]),
                nbytes=int(body["nbytes"]),
                fingerprint=str(body["fingerprint"]),
                tensors=tensors,
                base_fingerprint=None if base is None else str(base),
                transfer_nbytes=None if transfer is None else int(transfer),
                probe=None if probe is None else _probe(probe),
                gate=bool(body.get("gate", False)),
            )
        except _MALFORMED as error:
            raise WireError(f"not a weight manifest: {_said(error)}") from error


def _probe(body: Mapping[str, Any]) -> Probe:
    ids = tuple(tuple(operator.index(i) for i in sequence) for sequence in body["ids"])
    logprobs = tuple(tuple(float(x) for x in sequence) for sequence in body["logprobs"])
    if [len(i) - 1 for i in ids] != [len(x) for x in logprobs] or not ids or min(map(len, ids)) < 2:
        raise ValueError("a probe needs sequences of two tokens or more, with one log-probability less each")
    return Probe(ids, logprobs)


def _said(error: Exception) -> str:
    """What is wrong with a body, for whoever wrote it by hand."""
    if isinstance(error, KeyError):
        return f"the field {error.args[0]!r} is missing"
    return f"{type(error).__name__}: {error}"
