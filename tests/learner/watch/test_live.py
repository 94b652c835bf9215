"""The live view at several widths, its pace, and that the terminal is as before after it."""

from __future__ import annotations

import io
import math
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from rlx.errors import ServiceUnavailable
from rlx.learner.watch.live import LiveView, _fleet_line, sparkline
from rlx.learner.watch.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def view(width: int, height: int = 24, steps: int = 3) -> tuple[LiveView, Console]:
    clock = Clock()
    pace = Pace(0, 40, clock)
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    live = LiveView(console, pace)
    for step in range(1, steps + 1):
        clock.seconds += 2.0
        pace.reached(step)
        live.step(
            step / 10, "len 34.5  kl 0.0012", "2.00 s = rollouts 1.20 + train 0.70 + publish 0.10", "generation-bound"
        )
    return live, console


def shown(live: LiveView, console: Console) -> list[str]:
    with console.capture() as capture:
        console.print(live)
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [40, 60, 100, 200])
def test_the_view_has_the_same_height_at_every_moment_and_fits_every_width(width: int) -> None:
    live, console = view(width, steps=0)
    heights = {len(shown(live, console))}
    for _ in range(5):
        live.tell(f"an event of which much is to be said {'and more ' * 30}{_}")
        lines = shown(live, console)
        heights.add(len(lines))
        assert max(map(len, lines)) <= width
    assert heights == {8}


def test_the_view_shows_progress_time_left_rewards_and_events_each_once() -> None:
    live, console = view(100)
    for text in ("worker a: restarting", "worker a: restarting", "worker a: ready"):
        live.tell(text)
    lines = shown(live, console)
    assert lines[0].startswith("step 3/40   ━━━─")
    assert lines[0].endswith("0:06, 1:14 left")
    assert lines[1].startswith("reward      0.300  ▁▅█  0.100 to 0.300   len 34.5  kl 0.0012")
    assert lines[2].startswith("time        2.00 s = rollouts 1.20")
    assert lines[3].startswith("bound       generation-bound")
    assert [line[12:].rstrip() for line in lines[5:]] == ["worker a: restarting", "worker a: ready", ""]


def test_two_threads_that_tell_something_at_once_are_both_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes while the first is about to be added."""
    live, console = view(100)
    second = threading.Thread(target=live.tell, args=("worker-1 restarts",))

    def now(form: str) -> str:
        if not second.ident:
            second.start()
            second.join(0.2)
        return "12:00:00"

    monkeypatch.setattr("rlx.learner.watch.live.time.strftime", now)
    live.tell("the service is lost")
    second.join(60)
    said = "\n".join(shown(live, console))
    assert "worker-1 restarts" in said
    assert "the service is lost" in said


def test_a_checkpoint_takes_the_place_of_the_one_before() -> None:
    live, console = view(100)
    for step in (5, 10, 15):
        live.tell(f"checkpoint-{step} is complete", "checkpoint")
        live.tell("worker a: down")
    assert [line[12:].rstrip() for line in shown(live, console)[5:]] == [
        "worker a: down",
        "checkpoint-15 is complete",
        "",
    ]


def test_a_low_terminal_gets_the_first_lines_only() -> None:
    assert [line[:6] for line in shown(*view(80, height=4))] == ["step 3", "reward"]


def test_a_step_without_rewards_leaves_the_curve_as_it_was() -> None:
    live, console = view(100)
    live.step(math.nan, "", "", "")
    assert "0.300  ▁▅█" in shown(live, console)[1]


def test_an_outage_does_not_change_the_time_left() -> None:
    clock = Clock()
    pace = Pace(10, 100, clock)
    assert pace.left_s is None
    for step in range(11, 31):
        clock.seconds += 600.0 if step == 20 else 1.0
        pace.reached(step)
    assert pace.left_s == pytest.approx(70.0)
    assert pace.elapsed_s == 619.0


@pytest.mark.parametrize(
    ("values", "width", "blocks"),
    [
        ([1.0], 8, "▁"),
        ([0.0, 1.0], 8, "▁█"),
        ([5.0] * 4, 2, "▁▁"),
        ([0.0, 0.0, 1.0, 1.0], 2, "▁█"),
        ([1.0] * 10, 3, "▁▁▁"),
    ],
)
def test_a_sparkline_is_at_most_as_wide_as_asked(values: list[float], width: int, blocks: str) -> None:
    assert sparkline(values, width) == blocks


def test_the_workers_line_counts_the_ready_and_names_the_others() -> None:
    def status(name: str, state: str) -> dict[str, object]:
        return {"name": name, "state": state, "weight_version": 7}

    def away() -> list[dict[str, object]]:
        raise ServiceUnavailable("nobody answers")

    assert _fleet_line(lambda: [status("a", "ready"), status("b", "down")]) == "1/2 ready, weights 7, b down"
    assert _fleet_line(lambda: [status("b", "down")]) == "0/1 ready, b down"
    assert _fleet_line(away) == "the service does not answer: nobody answers"


def test_a_warning_of_the_service_after_it_is_up_becomes_an_event(tmp_path: Path) -> None:
    live, console = view(100)
    log = tmp_path / "service.log"
    log.write_text("warning: while loading\nready: http://x\nwarning: first\nworker b: down\nwarning: hal")
    place = live._follow(log, 0)
    assert [line[12:].rstrip() for line in shown(live, console)[5:]] == ["warning: first", "", ""]
    with log.open("a") as stream:
        stream.write("f\n")
    live._follow(log, place)
    assert [line[12:].rstrip() for line in shown(live, console)[5:]] == ["warning: first", "warning: half", ""]


_CHILD = """
import sys
from rich.console import Console
from rlx.learner.watch.live import LiveView
from rlx.learner.watch.pace import Pace
live = LiveView(Console(), Pace(0, 3))
live.start()
print("said meanwhile")
try:
    live.step(0.5, "len 3", "1 s", "balanced")
    raise KeyboardInterrupt if sys.argv[1] == "ctrl-c" else ValueError("broken")
finally:
    live.stop()
"""


@pytest.mark.parametrize("how", ["ctrl-c", "error"])
def test_the_cursor_is_back_and_the_error_comes_after_the_view(how: str) -> None:
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, how],
        stdin=child,
        stdout=child,
        stderr=child,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(child)
    said = b""
    try:
        while piece := os.read(parent, 4096):
            said += piece
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(parent)
    assert process.wait(60) != 0
    text = said.decode()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert text.index("\x1b[?25h") < text.index("Traceback")
    assert text.index("said meanwhile") < text.index("\x1b[?25h")
