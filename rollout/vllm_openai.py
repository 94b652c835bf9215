"""vLLM's own OpenAI serving classes around our engine, without a web server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from rlx.rollout.vllm_start import ENDED


class OpenAIFront:
    """Serves `completions` and `chat/completions`, with the adapter that `adapter()` gives at the time, None: without.
    `seeds` False refuses a request's seed."""

    def __init__(self, llm: AsyncLLM, name: str, adapter: Callable[[], LoRARequest | None], seeds: bool):
        self._seeds = seeds
        models = OpenAIServingModels(
            engine_client=llm, base_model_paths=[BaseModelPath(name=name, model_path=llm.model_config.model)]
        )
        template = {"chat_template": None, "chat_template_content_format": "auto"}
        renderer = OnlineRenderer(model_config=llm.model_config, renderer=llm.renderer, request_logger=None, **template)
        common = {"models": models, "online_renderer": renderer, "request_logger": None}
        self._chat = OpenAIServingChat(engine_client=llm, response_role="assistant", **template, **common)
        self._completions = OpenAIServingCompletion(engine_client=llm, **common)
        for serving in (self._chat, self._completions):  # vLLM would choose by the model's name
            serving._maybe_get_adapters = lambda *_, **__: adapter()

    async def serve(self, route: str, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        """The response as JSON, or the server-sent-event lines of a stream."""
        if body.get("seed") is not None and not self._seeds:
            return _refusal(400, "`seed` is not supported on CPU engines (it kills vLLM's CPU build); remove it")
        try:
            if route == "chat/completions":
                answer = await self._chat.create_chat_completion(ChatCompletionRequest(**body))
            elif route == "completions":
                answer = await self._completions.create_completion(CompletionRequest(**body))
            else:
                return _refusal(404, f"{route!r} is not served here; use completions or chat/completions")
        except ValidationError as error:
            first = error.errors()[0]
            return _refusal(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        except (VLLMClientError, ValueError) as error:
            return _refusal(400, str(error))
        except EngineDeadError:
            return _refusal(503, f"the engine's process is gone: {ENDED}; the worker will be restarted")
        if isinstance(answer, ErrorResponse):
            return _refusal(answer.error.code, answer.error.message)
        return answer if isinstance(answer, AsyncIterator) else answer.model_dump(mode="json")


def _refusal(code: int, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}
