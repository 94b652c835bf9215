"""The page in a real browser: one headless Chromium for all tests, a real server for each."""

from __future__ import annotations

import json
import random
import re
import shutil
import socket
import threading

import pytest
import uvicorn
from fastapi import FastAPI, Request
from playwright.sync_api import Page, expect, sync_playwright
from starlette.exceptions import HTTPException
from tokenizers import Tokenizer, models

from rlx.view.app import view_app, view_router
from rlx.view.folder import FolderRun
from rlx.view.live import LiveRun
from rlx.view.report import report

_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
_TIMEOUT_MS = 180_000
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\u202egnp\x00\x1b[31m\u200b"


class Server:
    """An app on a port of its own, below those that systems give out, so that it is still free after `stop`."""

    def __init__(self, app: FastAPI):
        self._app, self.port = app, 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        listener = self._listener()
        self._server = uvicorn.Server(
            uvicorn.Config(self._app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(120)
        assert not self._thread.is_alive()

    def _listener(self) -> socket.socket:
        for port in [self.port] if self.port else random.sample(range(20_000, 32_000), 50):
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                listener.close()
                continue
            listener.listen()
            self.port = port
            return listener
        raise AssertionError("no port is free")


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium")
    assert path, "these tests need Chromium: apt-get install --no-install-recommends chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS, timeout=_TIMEOUT_MS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A page that asked nobody but its server, and whose scripts raised nothing."""
    context = chromium.new_context()
    context.set_default_timeout(_TIMEOUT_MS)
    page, raised, asked = context.new_page(), [], set()
    page.on("pageerror", lambda error: raised.append(str(error)))
    page.on("request", lambda request: asked.add(re.sub(r"//127\.0\.0\.1:\d+/.*", "//own/", request.url)))
    yield page
    context.close()
    assert raised == []
    assert asked <= {"http://own/", "data:,"}


@pytest.fixture
def serve():
    servers = []

    def start(*runs) -> Server:
        servers.append(Server(view_app(runs)))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def see(locator, text) -> None:
    expect(locator).to_contain_text(text, timeout=_TIMEOUT_MS)


def write(path, *records) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)


def metric(step, reward, **more):
    return {"step": step, "time": 1_700_000_000 + step, "reward": reward, "entropy": 0.25, "perf/step_s": 2.0, **more}


def sample(index, text, reward=0.0, **more):
    ids = [0, 1, 2, 1]
    row = {"ids": ids, "logprobs": [-0.1, -5.0, None, -0.2], "versions": [[3, 2], [-1, 1], [4, 1]]}
    return {"step": 3, "key": f"g{index}", "index": index, "prompt": [{"role": "user", "content": f"question {index}"}], "completion": text, "status": "ok",
            "rows": [row], "rewards": {"right": reward}, "worker": "w0", **more}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "known"
    out.mkdir()
    (out / "run.json").write_text('{"total_steps": 4}')
    write(out / "metrics.jsonl", *[metric(step, step / 8, **{"rewards/right/mean": step / 8}) for step in (1, 2, 3)])
    write(out / "evals.jsonl", {"step": 0, "reward": 0.0625}, {"step": 3, "reward": 0.4375})
    write(
        out / "samples.jsonl",
        sample(0, "wrong"),
        sample(1, "right", 1.0),
        sample(2, "cut off", 0.5, status="truncated"),
    )
    write(out / "events.jsonl", {"time": 2.0, "kind": "publish", "text": "weights 2"})
    write(
        out / "events.jsonl",
        {"time": 1.0, "source": "service", "kind": "worker_down", "step": 2, "text": "w0 is gone", "worker": "w0"},
    )
    Tokenizer(models.WordLevel({"one": 0, "two": 1, "three": 2}, unk_token="one")).save(str(out / "tokenizer.json"))
    return out


def test_it_shows_the_numbers_of_a_known_run(page: Page, serve, folder):
    page.goto(serve(FolderRun(folder)).url)
    see(page.locator("#runs"), "known")
    see(page.locator("#runs"), "step 3 of 4")
    see(page.locator("#runs"), "stopped")
    see(page.locator(".tile", has_text="Held-out reward"), "0.438")
    see(page.locator(".tile", has_text="Held-out reward"), "from 0.0625")
    reward = page.locator(".chart").first
    see(reward.locator(".legend"), "training prompts 0.375")
    reward.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    see(reward.locator(".legend"), "step 2")
    see(reward.locator(".legend"), "training prompts 0.25")
    see(page.locator("#workers"), "w0 is gone")
    page.locator("#tab-overview").press("ArrowLeft")
    see(page.locator("#events .event"), "worker down")
    page.select_option("[name=kind]", "all")
    expect(page.locator("#events .event")).to_have_count(2, timeout=_TIMEOUT_MS)
    page.select_option("[name=kind]", "=publish")
    see(page.locator("#events .event"), "weights 2")
    assert page.title() == "known · rlx"


def test_samples_are_filtered_and_their_tokens_coloured(page: Page, serve, folder):
    page.goto(serve(FolderRun(folder)).url + "#samples")
    items = page.locator("#samples .item")
    expect(items).to_have_count(3, timeout=_TIMEOUT_MS)
    page.select_option("[name=status]", "truncated")
    see(page.locator("#samples .counted"), "1 of 3 samples")
    see(items, "cut off")
    page.click("text=Clear")
    page.select_option("[name=order]", "best")
    see(items.first, "right")
    page.fill("[name=text]", "QUESTION 0")
    expect(items).to_have_count(1, timeout=_TIMEOUT_MS)
    see(items, "wrong")
    items.first.click()
    see(page.locator(".sample"), "weight versions 3 (2), 4 (1)")
    page.get_by_label("log-prob", exact=True).check(force=True)
    see(page.locator(".sample"), "one two three two")
    tokens = page.locator(".sample .t")
    assert [tokens.nth(i).get_attribute("class") for i in range(4)] == ["t ", "t h4", "t context", "t "]
    page.get_by_label("weight version").check(force=True)
    expect(page.locator(".sample .t.v1")).to_have_count(1, timeout=_TIMEOUT_MS)
    page.locator(".sample .t.v1").hover()
    see(page.locator(".tokeninfo"), "token 4 · weight version 4 · log-prob -0.2000")


def test_it_survives_a_service_that_goes_away_and_goes_on_when_it_is_back(page: Page, serve):
    run = LiveRun(workers=lambda: [{"name": "rlx-rollout-0", "state": "ready", "weight_version": 7, "in_flight": 3}])
    run.add({"run": {"name": "live", "total_steps": 9}, "metrics": [metric(1, 0.5)]})
    server = serve(run)
    page.goto(server.url)
    see(page.locator("#runs"), "step 1 of 9")
    see(page.locator("#workers"), "rlx-rollout-0")
    server.stop()
    see(page.locator("#trouble"), "No answer since")
    see(page.locator("#runs"), "step 1 of 9")
    page.click("#tab-samples")
    run.add({"metrics": [metric(2, 0.75)], "samples": [sample(1, "fresh")]})
    server.start()
    see(page.locator("#runs"), "step 2 of 9")
    expect(page.locator("#trouble")).to_be_hidden(timeout=_TIMEOUT_MS)
    page.click("text=Show newer samples")
    see(page.locator("#samples .item"), "fresh")
    page.click("#tab-overview")
    see(page.locator(".chart").first, "0.75")


def test_text_of_a_run_is_never_more_than_text(page: Page, serve, tmp_path):
    out = tmp_path / "<b>name"
    out.mkdir()
    write(out / "metrics.jsonl", metric(1, 0.5, bottleneck=HOSTILE, **{f"rewards/{HOSTILE}/mean": 1.0, HOSTILE: 2.0}))
    write(
        out / "events.jsonl",
        {"time": 1, "kind": HOSTILE, "source": HOSTILE, "text": HOSTILE, "worker": HOSTILE, "traceback": HOSTILE},
    )
    conversation = [{"role": HOSTILE, "content": HOSTILE, "tool_calls": [HOSTILE]}]
    write(out / "samples.jsonl", sample(0, HOSTILE, key=HOSTILE, prompt=conversation, messages=conversation, rewards={HOSTILE: 1.0}, error=HOSTILE,
          worker=HOSTILE, columns={HOSTILE: HOSTILE}, timings={HOSTILE: 1.0}))  # fmt: skip
    page.goto(serve(FolderRun(out)).url)
    see(
        page.locator("#bottleneck"),
        "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>U+202Egnp",
    )
    page.click("#tab-events")
    see(page.locator("#events"), "U+202Egnp")
    page.click("#tab-samples")
    page.locator("#samples .item").click()
    see(page.locator(".sample .block.sampled"), "onerror='window.hacked = 1'>U+202EgnpU+0000U+001B[31mU+200B")
    assert page.locator("main script, main img, main b:has(*), #runs b").count() == 0
    assert page.evaluate("window.hacked") is None
    assert not re.search("[\u202e\u200b\x00\x1b]", page.locator("body").inner_text())
    refused = page.evaluate("""() => new Promise((resolve) => {
        document.addEventListener("securitypolicyviolation", (event) => resolve(event.violatedDirective));
        const script = document.createElement("script");
        script.textContent = "window.hacked = 1";
        document.body.append(script);
    })""")
    assert refused == "script-src-elem"


def test_a_sample_of_100_000_tokens_is_shown_a_part_at_a_time(page: Page, serve, folder):
    count = 100_000
    long = {"ids": [1] * count, "logprobs": [-0.5] * count, "versions": [[3, count]]}
    write(folder / "samples.jsonl", sample(3, "two " * count, rows=[long]))
    page.goto(serve(FolderRun(folder)).url + "#samples")
    page.locator("#samples .item").first.click()
    see(page.locator(".sample .block.sampled"), "Show more (392,000 characters)")
    page.get_by_label("trained").check(force=True)
    tokens = page.locator(".sample .t")
    expect(tokens).to_have_count(2_000, timeout=_TIMEOUT_MS)
    page.click("text=Show more (98,000 tokens)")
    expect(tokens).to_have_count(4_000, timeout=_TIMEOUT_MS)


def test_two_runs_are_compared(page: Page, serve, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write(other / "metrics.jsonl", metric(1, 0.875))
    write(other / "samples.jsonl", sample(9, "another answer", prompt=[{"role": "user", "content": "question 1"}]))
    page.goto(serve(FolderRun(folder), FolderRun(other)).url)
    see(page.locator(".chart").first.locator(".legend"), "training prompts 0.3750.875")
    page.click("#tab-samples")
    page.locator("#samples .item", has_text="question 1").click()
    expect(page.locator(".sample")).to_have_count(2, timeout=_TIMEOUT_MS)
    see(page.locator(".sample").last, "another answer")
    page.locator("#samples .item").first.focus()
    page.keyboard.press("j")
    expect(page.locator("#samples .item").nth(1)).to_have_attribute("aria-current", "true", timeout=_TIMEOUT_MS)


def test_a_service_that_wants_its_token_is_told_it_once(page: Page, folder):
    async def authorize(request: Request) -> None:
        if request.headers.get("authorization") != "Bearer secret":
            raise HTTPException(401)

    app = FastAPI()
    app.include_router(view_router([FolderRun(folder)], authorize))
    server = Server(app)
    try:
        page.goto(server.url)
        page.fill("[name=token]", "secret")
        page.click("text=Open")
        see(page.locator("#runs"), "step 3 of 4")
        page.evaluate("sessionStorage.clear()")
        page.goto(server.url + "?token=secret")
        see(page.locator("#runs"), "step 3 of 4")
        assert "secret" not in page.url
    finally:
        server.stop()


def test_the_report_is_shown_as_it_is_written(chromium, folder):
    write(folder / "samples.jsonl", sample(3, HOSTILE, 2.0))
    (folder / "report.html").write_text(report(FolderRun(folder)))
    context = chromium.new_context()
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))  # where a refused style or script is told
    page.goto((folder / "report.html").as_uri())
    see(page.locator("h1"), "known")
    see(page.locator("article").first, "U+202Egnp")
    assert page.locator("h1").evaluate("element => getComputedStyle(element).fontSize") == "26px"
    assert page.locator("svg path.curve").count() >= 2
    assert page.evaluate("window.hacked") is None
    assert said == []
    context.close()
