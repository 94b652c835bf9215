"""The `Engine` on real vLLM. What runs inside vLLM's worker process is in `vllm_worker.py`."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np

from rlx.errors import (
    DeadlineExceeded,
    ModelError,
    RequestTooLong,
    ServiceError,
    ServiceUnavailable,
    WeightSyncError,
)
from rlx.imports import loading
from rlx.rollout.manifest import WeightManifest, check_adapter, check_file, check_manifest, checkpoint_specs
from rlx.rollout.vllm_load import LoadMeter
from rlx.rollout.vllm_params import VllmOptions, engine_args, prompt_logprobs_params, sampling_params
from rlx.rollout.vllm_start import first_cause, forget_environment, prepare_environment, reason
from rlx.rollout.vllm_update import adapter_from_file, join_nccl, stage_file, update_from_file, update_over_nccl
from rlx.rollout.vllm_versions import TokenVersions
from rlx.rollout.worker import EngineLoad, Taken
from rlx.safetensors_layout import TensorSpec
from rlx.wire import Completion, Sampling

_SHUTDOWN_S = 2.5
"""Until vLLM kills its engine core, which has freed what it holds by then but takes its time to leave."""


class VllmEngine:
    """One vLLM engine; the protocol is documented on `rlx.rollout.engine.Engine`.

    Versions are exact because of the order in `commit`: the new weights are read beside those that serve, no request is admitted any more, those being handed over
    have reached the engine core, generation pauses (vLLM answers once no step is in flight, through the same queue
    as every sampled token), the host has booked every output that came before that answer, tokens are counted, and
    only then the weights change.
    """

    def __init__(self, options: VllmOptions):
        self._options = options
        self._llm: Any = None
        self._meter: LoadMeter | None = None
        self._causes: Path | None = None
        self._front: Any = None
        self._specs: tuple[TensorSpec, ...] = ()
        self._version = 0
        self._adapter: Any = None
        self._broken = ""
        self._live: dict[str, TokenVersions] = {}
        self._adding: set[asyncio.Task[Any]] = set()
        self._committing, self._swapping = asyncio.Lock(), asyncio.Lock()
        self._booked = True
        self._last_token = time.monotonic()

    async def start(self) -> None:
        self._causes = prepare_environment(self._options.start_timeout_s)
        others = set(multiprocessing.active_children())
        starting = asyncio.ensure_future(asyncio.to_thread(self._start_vllm))
        try:
            async with asyncio.timeout(self._options.start_timeout_s):
                await asyncio.shield(starting)
                await self.generate("warm-up", np.zeros(1, np.int32), 1, Sampling(max_tokens=2))
        except BaseException as error:  # a cancelled start, too, must leave no process of vLLM behind
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            await asyncio.wait([starting], timeout=_SHUTDOWN_S)
            cause = first_cause(self._causes, error)
            await self.close()
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(
                    f"vLLM did not start {self._options.model} within {self._options.start_timeout_s:.0f} s"
                ) from None
            if isinstance(error, asyncio.CancelledError):
                raise
            raise ModelError(f"vLLM could not start {self._options.model}: {cause}") from error

    async def generate(self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        await self._admission()
        versions = TokenVersions(self._version)
        output = await self._run(request_id, prompt_ids, sampling_params(n, sampling), versions)
        return [self._completion(o, versions, bool(sampling.stop)) for o in output.outputs]

    async def prompt_logprobs(self, ids: np.ndarray) -> np.ndarray:
        await self._admission()
        output = await self._run("prompt-logprobs", ids, prompt_logprobs_params(), TokenVersions(self._version))
        flat = output.prompt_logprobs
        first = [flat.start_indices[t] for t in range(1, ids.size)]
        return np.asarray([flat.logprobs[i] for i in first], dtype=np.float32)

    async def announce(self, manifest: WeightManifest) -> None:
        if self._options.lora_rank is not None:
            check_adapter(manifest, self._specs, self._options.lora_rank, self._version)
        else:
            check_manifest(manifest, self._specs, self._tied(), self._version)

    async def commit(self, manifest: WeightManifest, path: str) -> Taken:
        # A caller that goes away must not leave the engine paused.
        return await asyncio.shield(asyncio.ensure_future(self._commit(manifest, path)))

    def weight_version(self) -> int:
        return self._version

    def seconds_since_token(self) -> float:
        return time.monotonic() - self._last_token

    def load(self) -> EngineLoad:
        return EngineLoad() if self._meter is None else self._meter.load()

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        await self._admission()
        if self._front is None:
            from vllm.platforms import current_platform

            from rlx.rollout.vllm_openai import OpenAIFront

            name = self._options.served_model_name or self._options.model
            self._front = OpenAIFront(self._llm, name, lambda: self._adapter, seeds=not current_platform.is_cpu())
        return await self._front.serve(route, body)

    @property
    def in_flight(self) -> int:
        """Sequences that vLLM is working on."""
        return int(self._llm.output_processor.get_num_unfinished_requests())

    async def init_transfer(self, init_info: dict[str, Any]) -> None:
        """The handshake of the `nccl` transport: `init_info` are the fields of vLLM's NCCLWeightTransferInitInfo."""
        await join_nccl(self._llm, init_info)

    async def close(self) -> None:
        if self._llm is not None:
            llm, self._llm = self._llm, None
            self._broken = self._broken or "it was closed"
            if self._live and not llm.errored:
                await llm.abort(list(self._live), internal=True)
            if llm.output_handler is not None:
                llm.output_handler.cancel()
            await asyncio.to_thread(llm.shutdown, _SHUTDOWN_S)
        if self._causes is not None:
            forget_environment(self._causes)
            self._causes = None

    def _start_vllm(self) -> None:
        with loading():
            from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(engine_args(self._options))
        self._meter = LoadMeter(self._llm)
        self._specs = checkpoint_specs(_model_folder(self._options.model, self._options.revision))
        self._watch_outputs()

    def _watch_outputs(self) -> None:
        """Know when vLLM's output loop has booked everything it received, and when it last received a token."""
        core, meter = self._llm.engine_core, self._meter
        assert meter is not None
        receive = core.get_output_async

        async def get_output_async() -> Any:
            self._booked = True
            meter.settle()
            outputs = await receive()
            self._booked = False
            meter.received(outputs)
            if outputs.outputs:
                self._last_token = time.monotonic()
            return outputs

        core.get_output_async = get_output_async

    async def _all_booked(self) -> None:
        # vLLM has no event for it.
        while not (self._booked and self._llm.engine_core.outputs_queue.empty()):  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    async def _admission(self) -> None:
        """Wait until no swap runs; what the caller then does before its next suspension precedes any swap."""
        while self._swapping.locked():
            async with self._swapping:
                pass
        if self._broken:
            raise ServiceUnavailable(f"this vLLM engine cannot be used any more: {self._broken}")

    async def _run(self, request_id: str, prompt_ids: np.ndarray, params: Any, versions: TokenVersions) -> Any:
        """One vLLM request from admission to its only output; aborted when cancelled."""
        if prompt_ids.size >= (most := self._llm.model_config.max_model_len):
            raise RequestTooLong(
                f"{request_id}: a prompt of {prompt_ids.size} tokens leaves no room for a completion in the context of "
                f"{most}; shorten it, or raise vllm.max_model_len"
            )
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        adding = asyncio.ensure_future(self._add(request_id, tokens_input(prompt_ids.tolist()), params, versions))
        self._adding.add(adding)
        adding.add_done_callback(self._adding.discard)
        try:
            queue = await asyncio.shield(adding)
            output = await queue.get()
        except asyncio.CancelledError:
            queue = await adding
            await self._llm.abort(queue.request_id, internal=True)
            raise
        except (VLLMClientError, ValueError) as error:
            raise ServiceError(f"vLLM refused the request {request_id}: {error}") from error
        except EngineDeadError as error:
            self._broken = f"its engine process died: {first_cause(self._causes, error)}"
            raise ServiceUnavailable(f"this vLLM engine cannot be used any more: {self._broken}") from error
        finally:
            if adding.done() and not adding.cancelled() and adding.exception() is None:
                self._live.pop(adding.result().request_id, None)
        if self._broken:
            raise ServiceUnavailable(f"this vLLM engine cannot be used any more: {self._broken}")
        return output

    async def _add(self, request_id: str, prompt: Any, params: Any, versions: TokenVersions) -> Any:
        assert self._meter is not None
        self._meter.admitted()
        queue = await self._llm.add_request(request_id, prompt, params, lora_request=self._adapter)
        self._live[queue.request_id] = versions
        return queue

    def _completion(self, output: Any, versions: TokenVersions, detokenized: bool) -> Completion:
        ids = np.asarray(output.token_ids, dtype=np.int32)
        tokenizer = self._llm.get_tokenizer()
        text = output.text if detokenized else tokenizer.decode(output.token_ids, skip_special_tokens=True)
        return Completion(
            ids=ids,
            logprobs=np.asarray(output.logprobs.logprobs, dtype=np.float32),
            versions=versions.runs(output.index, ids.size),
            finish_reason=output.finish_reason,
            text=text,
        )

    def _tied(self) -> bool:
        return bool(self._llm.model_config.hf_text_config.tie_word_embeddings)

    async def _commit(self, manifest: WeightManifest, path: str) -> Taken:
        async with self._committing:
            await self.announce(manifest)
            if self._options.transport == "cpu":
                await asyncio.to_thread(check_file, manifest, Path(path))
                if self._options.lora_rank is None:
                    await self._stage(manifest, path)
            async with self._swapping:
                return await self._swap_in_time(manifest, path)

    async def _stage(self, manifest: WeightManifest, path: str) -> None:
        """What can be done while it generates; on an error nothing has changed."""
        try:
            async with asyncio.timeout(self._options.sync_timeout_s):
                await stage_file(self._llm, manifest, path)
        except TimeoutError:
            raise DeadlineExceeded(
                f"weights {manifest.version} were not read within {self._options.sync_timeout_s:.0f} s"
            ) from None
        except Exception as error:  # vLLM raises a bare Exception for whatever failed in its worker
            raise WeightSyncError(
                f"weights {manifest.version} could not be read: {reason(self._causes, error)}"
            ) from error

    async def _swap_in_time(self, manifest: WeightManifest, path: str) -> Taken:
        try:
            async with asyncio.timeout(self._options.sync_timeout_s):
                return await self._swap(manifest, path)
        except TimeoutError:
            self._broken = f"weights {manifest.version} were not loaded within {self._options.sync_timeout_s:.0f} s"
            raise DeadlineExceeded(self._broken) from None
        finally:
            if self._broken:
                await self._llm.abort(list(self._live), internal=True)

    async def _swap(self, manifest: WeightManifest, path: str) -> Taken:
        if self._adding:
            await asyncio.wait(self._adding)
        await self._llm.renderer.clear_mm_cache_async()
        paused_at = time.monotonic()
        # Not `pause_generation`, which sleeps for as long as the last outputs may take: `_all_booked` knows.
        await self._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)
        await self._all_booked()
        if self._meter is not None:
            self._meter.cleared()
        in_flight = self._tokens_in_flight()
        if self._options.transport == "nccl":
            await update_over_nccl(self._llm, manifest)
            received = manifest.fingerprint
        else:
            received = await self._swap_file(manifest, path)
        for versions, index, num_tokens in in_flight:
            # What began before the first adapter came goes on with the model alone.
            if self._options.lora_rank is None or versions.start > 0:
                versions.mark(index, num_tokens, manifest.version)
        self._version = manifest.version
        # The engine core takes calls in the order in which they are made.
        await asyncio.gather(self._llm.update_weight_version(str(manifest.version)), self._llm.resume_generation())
        return Taken(received, time.monotonic() - paused_at)

    async def _swap_file(self, manifest: WeightManifest, path: str) -> str:
        try:
            load = update_from_file if self._options.lora_rank is None else adapter_from_file
            reports = await load(self._llm, manifest, path)
        except Exception as error:  # vLLM raises a bare Exception for whatever failed in its worker
            self._broken = f"loading weights {manifest.version} failed half-way: {reason(self._causes, error)}"
            raise WeightSyncError(self._broken) from error
        if all(r["applied"] for r in reports):
            if self._options.lora_rank is not None:
                from rlx.rollout.vllm_lora import policy

                self._adapter = policy(manifest.version)
            return str(reports[0]["fingerprint"])
        if any(r["applied"] for r in reports):
            self._broken = f"only some of its processes took weights {manifest.version}"
            raise WeightSyncError(self._broken)
        await self._llm.resume_generation()
        raise WeightSyncError(
            f"weights {manifest.version}: {manifest.nbytes} bytes with the fingerprint {manifest.fingerprint} were "
            f"announced, {path} has {reports[0]['nbytes']} bytes with {reports[0]['fingerprint'] or 'another one'}; "
            f"version {self._version} keeps serving"
        )

    def _tokens_in_flight(self) -> list[tuple[TokenVersions, int, int]]:
        """(versions, sequence index, tokens so far) of every sequence that has not finished."""
        states = self._llm.output_processor.request_states.values()
        return [
            (self._live[s.queue.request_id], s.request_index, s.detokenizer.num_output_tokens())
            for s in states
            if s.queue is not None and s.queue.request_id in self._live
        ]


def _model_folder(model: str, revision: str | None) -> Path:
    """Where the model's files lie: a folder, or the hub's cache once vLLM has downloaded them."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=["*.safetensors"]))
