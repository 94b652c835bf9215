"""`rlx view OUT [OUT2]`: the page of runs on this machine, for this machine."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from rlx.errors import ConfigError
from rlx.view.app import view_app
from rlx.view.folder import FolderRun

_HOST = "127.0.0.1"
_GRACE_S = 1


def view_main(folders: Sequence[Path], port: int, open_browser: bool) -> int:
    """Serve until Ctrl-C. ConfigError where a folder is none, or the port is taken; port 0 is any free one."""
    runs = [FolderRun(folder) for folder in folders]
    app = view_app(runs)
    with _listener(port) as listener:
        address = f"http://{_HOST}:{listener.getsockname()[1]}/"
        print(f"{' and '.join(run.name for run in runs)}: {address}  (Ctrl-C ends it)", flush=True)
        if open_browser and _has_display():
            webbrowser.open(address)
        server = uvicorn.Server(
            uvicorn.Config(
                app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=_GRACE_S
            )
        )
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again, after it has ended
            server.run(sockets=[listener])
    return 0


def _has_display() -> bool:
    """Whether a browser would have a window, instead of this terminal."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _listener(port: int) -> socket.socket:
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"--port {port} is in use. Write another one, or leave --port away for a free one."
            ) from error
        raise ConfigError(f"--port {port}: {error.strerror}. Write one from 1024 to 65535.") from error
    return listener
