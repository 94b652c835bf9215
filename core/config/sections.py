"""The sections of the YAML below the top level, but `trl:` (`trl.py`): each key with its meaning, default and unit."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rlx.config.section import Section
from rlx.hosts import is_loopback


class VllmSection(Section):
    """`vllm:` the rollout workers and the address they are reached at."""

    host: str = Field(
        "127.0.0.1",
        description="Address that the service listens on. On anything but loopback every request needs the bearer token.",
    )
    port: int = Field(8000, ge=1, le=65535, description="Port that the service listens on.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs per engine.")
    data_parallel_size: int = Field(1, ge=1, description="Engines, each a Ray actor of its own.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of each GPU's memory that vLLM may take.")
    dtype: Literal["auto", "bfloat16", "float16", "float32", "half", "float"] = Field(
        "auto", description="Type of the weights in the engine."
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="Tokens of prompt and completion together. Default: max_prompt_length + max_completion_length.",
    )
    enable_prefix_caching: bool = Field(
        True, description="Reuse the keys and values of shared prompt prefixes; cleared at every weight update."
    )
    enforce_eager: bool | None = Field(
        None, description="No CUDA graphs and no compilation. Default: true without a GPU."
    )
    max_num_seqs: int = Field(256, ge=1, description="Completions that one engine generates at a time.")
    cpu_kv_cache_gib: float = Field(1.0, gt=0, description="GiB of key-value cache per engine where there is no GPU.")
    start_timeout: float = Field(600.0, gt=0, description="Seconds that an engine may take to load.")

    @property
    def needs_token(self) -> bool:
        return not is_loopback(self.host)


class DatasetSection(Section):
    """One entry of `datasets:` or `test_datasets:`."""

    path: str | None = Field(
        None, description="Hub id, local file, or local folder. May be left out when data_files is given."
    )
    name: str | None = Field(None, description="Configuration of a hub data set, for example main.")
    split: str = Field("train", description="Split to load; slices such as train[:100] work.")
    type: str | None = Field(
        None,
        description="Dotted name of a transform `fn(cfg, ...) -> transform_fn | (transform_fn, map_kwargs)`. Without it the rows must have a `prompt`.",
    )
    ds_type: Literal["json", "csv", "parquet", "arrow", "text"] | None = Field(
        None, description="Format of local files; default by their suffix."
    )
    data_files: str | list[str] | None = Field(None, description="Local files, relative to the YAML.")
    revision: str | None = Field(None, description="Revision of a hub data set.")
    trust_remote_code: Literal[False] = Field(False, description="`datasets` no longer runs code from the hub.")

    @model_validator(mode="after")
    def path_or_files(self) -> DatasetSection:
        if self.path is None and self.data_files is None:
            raise ValueError("give `path` (hub id, file or folder) or `data_files`")
        return self


class AsyncSection(Section):
    """`async:` how far generation may run ahead of training, and how weights reach the workers. rlx's own."""

    max_staleness: int = Field(
        1,
        ge=0,
        description="Optimizer steps that the policy may have made since the oldest trained token of a sample was sampled. 0 is the synchronous run: sample, train, publish, one after the other. 1 and more sample the next steps' groups while the learner trains.",
    )
    max_inflight_groups: int | None = Field(
        None,
        ge=1,
        description="Groups that the learner has submitted and not got back. Default: as many as max_staleness admits, and fewer while more completions wait at the workers than run there, as what waits grows too old for nothing; the service takes as many at a time as its workers hold without preempting.",
    )
    max_requeues: int = Field(
        2,
        ge=0,
        description="Times that a group is cancelled, and its prompt sampled anew, because it held a step up for more than twice as long as it had been under way by then; after that the step waits for it, so that long completions are trained, too.",
    )
    oversample: float = Field(
        1.0,
        ge=1,
        description="Submit this many times a step's groups and go on with the first that are complete. The others are cancelled and their prompts come again. For max_staleness: 0; above, the groups of later steps are submitted anyway.",
    )
    dynamic_sampling: bool = Field(
        False,
        description="Leave groups out whose completions all have the same reward, which teach nothing, and sample other prompts in their place (DAPO).",
    )
    max_sampling_attempts: int = Field(
        4,
        ge=1,
        description="Bound of dynamic_sampling: after this many times a step's groups the step is filled with groups that were left out.",
    )
    publish: Literal["together", "rolling"] = Field(
        "together", description="Whether all workers swap to new weights at once, or one after the other."
    )
    weight_transfer: Literal["auto", "full"] = Field(
        "auto",
        description="auto: a service on this machine reads the weights in the learner's memory; another one is sent the elements that changed since the last update, where that is smaller. full: always send everything.",
    )
    parity_threshold: float = Field(
        0.05,
        gt=0,
        description="Nats: the mean |log p(worker) − log p(learner)| over the probe's tokens above which a worker gets no work, and training does not start. Probed before the first step, after every resume and after every restart of a worker.",
    )

    @model_validator(mode="after")
    def later_steps_are_oversampling_enough(self) -> AsyncSection:
        if self.oversample > 1 and self.max_staleness > 0:
            raise ValueError(
                f"oversample ({self.oversample:g}) has no use at max_staleness: {self.max_staleness}, where the groups of "
                "later steps are submitted anyway; remove it, or write max_staleness: 0"
            )
        return self

    @property
    def steps_in_flight(self) -> int:
        """Steps whose groups the service may have at a time."""
        return 1 + self.max_staleness


class ServiceSection(Section):
    """`service:` deadlines of the rollout service. rlx's own."""

    group_timeout: float = Field(
        600.0,
        gt=0,
        description="Seconds that one group may take, from its arrival to its rewards; times 1 + async.max_staleness, as the groups of that many steps wait in one queue.",
    )
    publish_timeout: float = Field(120.0, gt=0, description="Seconds that every worker has to take new weights.")
    probe_interval: float = Field(
        5.0, gt=0, description="Seconds without a token after which a worker is asked for one."
    )
    probe_timeout: float = Field(60.0, gt=0, description="Seconds without a token after which a worker counts as down.")
    drain_timeout: float = Field(
        20.0, gt=0, description="Seconds that running groups get to finish when the service stops."
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="Times in a row that a worker which died or did not take weights is restarted, brought to the newest weights and verified before it gets work again; then it stays out.",
    )
    max_workers: int | None = Field(
        None,
        ge=1,
        description="Rollout workers that the service grows to while the Ray cluster grows: it starts with vllm.data_parallel_size, and each of the others joins as soon as the cluster has devices for it. Default: no more than those it starts with; `rlx workers add` adds some by hand.",
    )
    direct: bool = Field(
        False,
        description="The gateway only hands out addresses: groups go from the learner to the workers' own endpoints and tokens come back directly. For services larger than one gateway process carries. Plain replies only.",
    )


class RewardLimits(Section):
    """One entry of `rewards.functions:`."""

    timeout: float | None = Field(None, gt=0, description="Seconds that one call may take; default rewards.timeout.")
    workers: int | None = Field(None, ge=1, description="Processes of this function; default rewards.workers.")


class RewardsSection(Section):
    """`rewards:` how reward functions are run. rlx's own."""

    timeout: float = Field(
        30.0,
        gt=0,
        description="Seconds that one call of a reward function may take; then its process is killed and replaced, and the group has no value from it.",
    )
    workers: int = Field(1, ge=1, description="Processes per reward function; each scores one group at a time.")
    memory_gib: float = Field(
        4.0, gt=0, description="GiB that a reward process may allocate; beyond, the function gets a MemoryError."
    )
    reward_failure_budget: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of a function's last 200 completions that may have no value because it failed; above, the run stops with the first traceback.",
    )
    functions: dict[str, RewardLimits] = Field(
        default={}, description="Other limits for single functions, by the name that reward_funcs has."
    )


class EpisodesSection(Section):
    """`episodes:` how rollout functions and environments are run. rlx's own."""

    timeout: float = Field(300.0, gt=0, description="Seconds that one episode may take; then it ends as `timeout`.")
    processes: int = Field(1, ge=1, description="Processes that run the rollout functions, each many episodes at once.")
    retries: int = Field(
        2,
        ge=0,
        le=2,
        description="Times that an episode is begun anew, with the same seed, after its environment was lost.",
    )
    failure_budget: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of the last 200 episodes that may end as timeout, env_lost or aborted; above, the run stops with the first cause.",
    )
    stall_timeout: float = Field(
        10.0,
        gt=0,
        description="Seconds that a rollout function may block its process without `await`; then the process is killed and replaced.",
    )


class OpenEnvSection(Section):
    """`envs[].openenv:` an OpenEnv server, by its address, or by the command that starts it here."""

    url: str | None = Field(None, description="Address of a running server, for example http://10.0.0.7:8000.")
    command: str | list[str] | None = Field(
        None,
        description="Starts the server on this machine, from the folder of the YAML; `{port}` stands for the port it must listen on. It is probed, and restarted when it dies or hangs.",
    )
    max_sessions: int | None = Field(
        None,
        ge=1,
        description="Sessions open at a time; default: as many as the server allows, found by asking.",
    )
    reset: dict[str, Any] = Field(default={}, description="Arguments of every reset, beside the seed.")
    start_timeout: float = Field(60.0, gt=0, description="Seconds that the server may take to start.")
    reset_timeout: float = Field(30.0, gt=0, description="Seconds that a reset may take.")
    step_timeout: float = Field(30.0, gt=0, description="Seconds that a step may take.")
    close_timeout: float = Field(5.0, gt=0, description="Seconds that closing a session may take.")
    lease_timeout: float = Field(120.0, gt=0, description="Seconds that an episode waits for a free session.")

    @model_validator(mode="after")
    def url_or_command(self) -> OpenEnvSection:
        if (self.url is None) == (self.command is None):
            raise ValueError("give either `url` (a running server) or `command` (one to start here)")
        return self


class EnvSection(Section):
    """One entry of `envs:`."""

    name: str = Field("env", description="What `ctx.env(name)` and the column `environment` call it.")
    openenv: OpenEnvSection = Field(description="An OpenEnv server.")
    max_turns: int = Field(
        16, ge=1, description="Turns of an episode where no rollout_func is given and rlx plays the environment itself."
    )


class ClusterSection(Section):
    """`cluster:` the Ray cluster. rlx's own. RAY_ADDRESS joins a running one instead of starting one."""

    dashboard: bool = Field(True, description="Serve the Ray dashboard.")
    dashboard_host: str = Field(
        "127.0.0.1",
        description="Address of the dashboard. On others than loopback it is served only with Ray's token (RAY_AUTH_MODE "
        "not switched off): Ray's job API runs commands for anybody who reaches it.",
    )
    dashboard_port: int | None = Field(
        None, ge=1, le=65535, description="Port of the dashboard. Default: 8265 or the next free one; it is printed."
    )
    object_store_mib: int = Field(
        512, ge=80, description="MiB of shared memory for Ray's object store when rlx starts Ray."
    )

    @property
    def dashboard_is_local(self) -> bool:
        return is_loopback(self.dashboard_host)
