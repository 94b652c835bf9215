"""What the older shapes of rollout functions are handed: a `model`, a tokenizer, a `trainer`, TRL 0.25's `args`.

Only generation is behind them; there are no weights here. What is asked for and is not here is an AttributeError that
says what is.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from rlx.config import Config
from rlx.envs.generation import Generator, Sampled, sampling_changes
from rlx.errors import UserCodeError
from rlx.wire import Sampling

_TRANSFORMERS_NAMES = {"max_new_tokens": "max_tokens", "max_length": "max_length", "stop_strings": "stop"}
_TRANSFORMERS_NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(
        ("token_type_ids", "pad_token_id", "bos_token_id", "use_cache", "tokenizer", "cache_implementation",
         "transformers_version"), ...
    ),
    "do_sample": True, "num_beams": 1, "num_beam_groups": 1, "length_penalty": 1.0, "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0, "min_length": 0, "typical_p": 1.0,
}  # fmt: skip
_VLLM_NAMES = {"max_tokens": "max_tokens", "stop": "stop", "structured_outputs_regex": "regex"}
_VLLM_NEUTRAL: dict[str, Any] = {"logprobs": ..., "use_tqdm": ..., "profiler": ...}


class _Facade:
    """`_what` is its name in messages."""

    _what = ""

    def __getattr__(self, name: str) -> Any:
        here = sorted({n for n in (*dir(type(self)), *vars(self)) if not n.startswith("_")})
        raise AttributeError(f"{self._what}.{name} does not exist here. {self._what} has: {', '.join(here)}.")


# --- the documented shape


class Model(_Facade):
    """`generate` takes and returns torch.LongTensor [B, P] and [B, P + T] on the CPU, as transformers' does."""

    _what = "model"
    training = False
    device = torch.device("cpu")

    def __init__(self, generator: Generator, config: Any):
        self._generator = generator
        self.config = config

    def eval(self) -> Model:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UserCodeError(
            "model(...) is not possible in a rollout function: its weights are in the rollout workers. "
            "Write model.generate(input_ids, max_new_tokens=...)."
        )

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_return_sequences: int | None = None,
        **given: Any,
    ) -> torch.Tensor:
        """One completion of each row [B, P], `num_return_sequences` where given, padded on the right."""
        prompts_BP = _as_batch(inputs if input_ids is None else input_ids)
        asked = {**_settings_of(generation_config), **given}
        repeats = num_return_sequences or asked.pop("num_return_sequences", None) or 1
        ends = asked.pop("eos_token_id", None)
        changes = sampling_changes(asked, _TRANSFORMERS_NAMES, _TRANSFORMERS_NEUTRAL, "model.generate")
        max_length = changes.pop("max_length", None)
        if max_length is not None and "max_tokens" not in changes:
            changes["max_tokens"] = int(max_length) - prompts_BP.shape[1]
        if "max_tokens" in changes and changes["max_tokens"] < 1:
            raise UserCodeError(f"model.generate was asked for {changes['max_tokens']} new tokens. Ask for 1 or more.")
        if ends is not None:
            tokens = [ends] if isinstance(ends, int) else [int(end) for end in ends]
            changes["extra"] = {**self._generator.ctx.sampling.extra, "stop_token_ids": tokens}
        mask_BP = torch.ones_like(prompts_BP) if attention_mask is None else _as_batch(attention_mask)
        rows = [
            torch.cat(
                [prompt, torch.tensor(self._generator.sample(prompt[mask.bool()].tolist(), **changes).ids).long()]
            )
            for prompt, mask in zip(prompts_BP, mask_BP, strict=True)
            for _ in range(repeats)
        ]
        padding = self.config.pad_token_id
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding).long()


def _as_batch(ids: Any) -> torch.Tensor:
    if ids is None:
        raise UserCodeError(
            "model.generate was given no input_ids. Write model.generate(**inputs, max_new_tokens=...)."
        )
    batch = torch.as_tensor(ids, device="cpu").long()
    return batch[None] if batch.ndim == 1 else batch


def _settings_of(generation_config: Any) -> dict[str, Any]:
    """What a GenerationConfig, a dict or a namespace sets."""
    if generation_config is None:
        return {}
    if hasattr(generation_config, "to_dict"):
        generation_config = generation_config.to_dict()
    settings = generation_config if isinstance(generation_config, Mapping) else vars(generation_config)
    return {name: value for name, value in settings.items() if not name.startswith("_")}


def model_config(tokenizer: Any, max_model_len: int) -> SimpleNamespace:
    """The fields of a model's configuration that a rollout function can need."""
    end = tokenizer.eos_token_id
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return SimpleNamespace(
        vocab_size=len(tokenizer), max_position_embeddings=max_model_len, eos_token_id=end, pad_token_id=padding
    )


# --- the tokenizer


def for_threads(tokenizer: Any) -> Any:
    """A copy of `tokenizer` for several threads at once. A call sets padding and truncation on the one tokenizer
    below, so calls go one after the other. Its `apply_chat_template` understands `processing_class=False`, which the
    documented example writes for `tokenize=False`."""
    lock = threading.RLock()

    class ThreadSafe(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with lock:
                return super().__call__(*args, **kwargs)

        def encode(self, *args: Any, **kwargs: Any) -> Any:
            with lock:
                return super().encode(*args, **kwargs)

        def decode(self, *args: Any, **kwargs: Any) -> Any:
            with lock:
                return super().decode(*args, **kwargs)

        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            if "processing_class" in kwargs:
                kwargs.setdefault("tokenize", kwargs.pop("processing_class"))
            with lock:
                return super().apply_chat_template(*args, **kwargs)

    ThreadSafe.__name__ = ThreadSafe.__qualname__ = type(tokenizer).__name__
    own = copy.deepcopy(tokenizer)
    own.__class__ = ThreadSafe
    return own


# --- TRL's shapes


class VllmClient(_Facade):
    """TRL's client of its vLLM server: `generate` and `chat`."""

    _what = "trainer.vllm_generation.vllm_client"

    def __init__(self, generator: Generator):
        self._generator = generator

    def generate(self, prompts: Sequence[Any], images: Any = None, n: int = 1, **given: Any) -> dict[str, list[Any]]:
        """`n` completions of each prompt, which is a string or a list of token ids: `prompt_ids` [N], `completion_ids`
        [N × n], `logprobs` [N × n][T][1] and `logprob_token_ids` of that shape."""
        if images:
            raise UserCodeError(f"{self._what} generates from text alone. Leave images out.")
        asked = {**given, **(given.pop("generation_kwargs", None) or {})}
        changes = sampling_changes(asked, _VLLM_NAMES, _VLLM_NEUTRAL, self._what)
        prompt_ids = [self._generator.ids_of(prompt) for prompt in prompts]
        samples = [self._generator.sample(ids, **changes) for ids in prompt_ids for _ in range(n)]
        return {"prompt_ids": prompt_ids, **_as_trl(samples)}

    def chat(self, messages: Sequence[Any], **given: Any) -> dict[str, list[Any]]:
        """The same for a list of conversations."""
        return self.generate(messages, **given)


class VllmGeneration(_Facade):
    """TRL's generation backend."""

    _what = "trainer.vllm_generation"
    mode = "server"

    def __init__(self, generator: Generator):
        self.vllm_client = VllmClient(generator)

    def generate(
        self, prompts: Sequence[Any], images: Any = None, num_generations: int = 1, profiler: Any = None, **given: Any
    ) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """One completion for each of `prompts`, which already hold every prompt `num_generations` times:
        `(prompt_ids [N], completion_ids [N], logprobs [N][T][1], logprob_token_ids [N][T][1])`."""
        answer = self.vllm_client.generate(prompts, images, **given)
        return answer["prompt_ids"], answer["completion_ids"], answer["logprobs"], answer["logprob_token_ids"]


class Trainer(_Facade):
    """The `trainer` of `(prompts, trainer)`: its tokenizer, its arguments, its generation."""

    _what = "trainer"
    use_vllm = True
    vllm_mode = "server"
    accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=True, num_processes=1, process_index=0)

    def __init__(self, generator: Generator, args: Any):
        self.args = args
        self.processing_class = generator.tokenizer
        self.vllm_generation = VllmGeneration(generator)
        self.vllm_client = self.vllm_generation.vllm_client
        for name, value in _sampling_arguments(generator.ctx.sampling).items():
            setattr(self, name, value)

    @property
    def model(self) -> Any:
        raise UserCodeError(
            "trainer.model is not here: the weights are in the learner and in the rollout workers. "
            "Sample with trainer.vllm_generation.generate(prompts=..., images=None, num_generations=1)."
        )


def generate_rollout_completions(
    trainer: Trainer,
    prompts: Sequence[Any],
    *,
    generation_overrides: Mapping[str, Any] | None = None,
    as_chat: Any = None,
) -> list[dict[str, Any]]:
    """As `trl.experimental.openenv` had it: for each prompt a dict of `prompt_ids`, `completion_ids`, `logprobs` [T]
    and `text`."""
    answer = trainer.vllm_client.generate(prompts, **(generation_overrides or {}))
    return [
        {
            "prompt_ids": prompt_ids,
            "completion_ids": ids,
            "logprobs": [logprob for [logprob] in logprobs],
            "text": trainer.processing_class.decode(ids, skip_special_tokens=True),
        }
        for prompt_ids, ids, logprobs in zip(
            answer["prompt_ids"], answer["completion_ids"], answer["logprobs"], strict=True
        )
    ]


class Arguments(_Facade):
    """`args`: what the YAML says under `trl:`, for one prompt and one completion. The server that it names, as TRL's
    does, generates for this episode alone; `server` is called for its port when somebody asks."""

    _what = "args"
    vllm_server_host = "127.0.0.1"

    def __init__(self, config: Config, sampling: Sampling, server: Callable[[], int]):
        given = config.trl.model_dump() | _sampling_arguments(sampling)
        vars(self).update({name: value for name, value in given.items() if not name.startswith("vllm_server_")})
        self._server = server

    @property
    def vllm_server_port(self) -> int:
        return self._server()

    @property
    def vllm_server_base_url(self) -> str:
        return f"http://{self.vllm_server_host}:{self.vllm_server_port}"


def _sampling_arguments(sampling: Sampling) -> dict[str, Any]:
    return {
        "num_generations": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_completion_length": sampling.max_tokens,
    }


def _as_trl(samples: Sequence[Sampled]) -> dict[str, list[Any]]:
    return {
        "completion_ids": [sampled.ids for sampled in samples],
        "logprobs": [[[logprob] for logprob in sampled.logprobs] for sampled in samples],
        "logprob_token_ids": [[[i] for i in sampled.ids] for sampled in samples],
    }
