"""`rlx rollout test`: one episode on the service, shown token by token."""

from __future__ import annotations

import math
import uuid
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlx.cluster.run import with_service
from rlx.config import Config
from rlx.episode import CONTEXT, Episode, Row
from rlx.wire import GroupRequest, GroupResult

_LOOK_S = 2.0


def rollout_test_main(config: Config, overrides: list[str], row: int) -> int:
    """Show an episode of data set row `row`; the exit status is 1 when it failed."""
    if not _service_answers(config):
        return with_service(config, overrides, ("rollout", "test", str(config.path), "--row", str(row)))
    import datasets

    from rlx.learner.incoming.data import prompt_at
    from rlx.learner.incoming.requests import sampling_of
    from rlx.rollout.auth import service_token
    from rlx.rollout.client import ClientTimeouts, RolloutClient
    from rlx.tokenizer import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(config)
    prompt = prompt_at(config, tokenizer, row)
    client = RolloutClient(config.base_url, service_token(), ClientTimeouts())
    try:
        client.wait_until_ready(config.trl.vllm_server_timeout, lambda message: None)
        request = GroupRequest(
            key=f"test/{uuid.uuid4().hex[:12]}",
            prompt=prompt.prompt,
            prompt_ids=prompt.ids,
            num_generations=1,
            sampling=sampling_of(config),
            columns=prompt.columns,
            deadline_s=config.service.group_timeout,
            seed=config.seed,
        )
        [result] = client.rollouts([request])
    finally:
        client.close()
    show(Console(highlight=False), tokenizer, request, result)
    return 0 if result.episodes[0].scorable else 1


def _service_answers(config: Config) -> bool:
    try:
        httpx.get(f"{config.base_url}/health", timeout=_LOOK_S)
    except httpx.TransportError:
        return False
    return True


def show(console: Console, tokenizer: Any, request: GroupRequest, result: GroupResult) -> None:
    """The only episode of `result`: its rows as coloured tokens, then what it got for them."""
    episode = result.episodes[0]
    for number, row in enumerate(episode.rows):
        prompt_ids = request.prompt_ids if row.prompt_ids is None else row.prompt_ids
        console.rule(f"training row {number + 1} of {len(episode.rows)}", style="dim")
        console.print(coloured(tokenizer, prompt_ids.tolist(), row, mark=not console.is_terminal), soft_wrap=True)
    console.rule(style="dim")
    console.print(_legend(mark=not console.is_terminal))
    console.print(_facts(episode, result))
    if episode.error:
        console.print(episode.error, markup=False, soft_wrap=True)


def coloured(tokenizer: Any, prompt_ids: list[int], row: Row, mark: bool) -> Text:
    """The whole row as text: context dim; what was sampled green, the more surprising the more yellow, then red. `mark`:
    what was sampled stands between « and », for where there are no colours."""
    text = Text(tokenizer.decode(prompt_ids), style="dim")
    begin = 0
    for version, count in row.versions:
        end = begin + count
        if version == CONTEXT:
            text.append(tokenizer.decode(row.ids[begin:end].tolist()), style="dim")
        else:
            text.append("«" * mark)
            for token, logprob in zip(row.ids[begin:end].tolist(), row.logprobs[begin:end].tolist(), strict=True):
                text.append(tokenizer.decode([token]), style=_style(logprob))
            text.append("»" * mark)
            text.append(f"[v{version}]", style="cyan")
        begin = end
    return text


def _style(logprob: float) -> str:
    return "green" if logprob > math.log(0.5) else "yellow" if logprob > math.log(0.05) else "red"


def _legend(mark: bool) -> Text:
    if mark:
        return Text("«sampled and trained», [vN] its weight version; the rest is context")
    return Text.assemble(
        ("context", "dim"), "  sampled and trained: ", ("p > 0.5", "green"), "  ", ("p > 0.05", "yellow"), "  ",
        ("below", "red"), "  ", ("[v1]", "cyan"), " its weight version",
    )  # fmt: skip


def _facts(episode: Episode, result: GroupResult) -> Table:
    table = Table(show_header=False)
    context = sum(row.ids.size for row in episode.rows) - episode.num_sampled
    rows = [
        ("status", episode.status + (f", after {episode.attempts} attempts" if episode.attempts > 1 else "")),
        ("turns", str(episode.turns)),
        ("tokens", f"{episode.num_sampled} sampled and trained, {context} context after the first prompt"),
        ("exact", "yes" if episode.exact else "no: the rollout function hides which tokens it sampled"),
        ("generation", f"{result.generation_s:.2f} s on {result.worker}"),
        *((f"step reward {s.name}{'' if s.turn is None else f', turn {s.turn}'}", f"{s.value:g}") for s in episode.step_rewards),
        *((f"reward {r.name}", "none" if math.isnan(r.values[0]) else f"{r.values[0]:g}") for r in result.rewards),
        *((name, f"{value:g}") for name, value in episode.metrics.items()),
    ]  # fmt: skip
    for name, value in rows:
        table.add_row(name, value)
    return table
