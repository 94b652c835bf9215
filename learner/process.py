"""One learner process: `python -m rlx.learner.process NUM_PROCESSES CONFIG [overrides]`, started by `launch.py`.

Nothing heavy is imported before `main`, which tells every error once: rank 0 on the terminal, the others in their log.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from rlx.config import load_config, parse_overrides
from rlx.errors import RlxError
from rlx.imports import loaded, loading
from rlx.learner.launch import log_of
from rlx.processes import die_with_parent, write_output_to

_PEER = re.compile(r"gloo.*(Connection (closed|reset)|Broken pipe)", re.DOTALL)
"""What gloo says when another process is gone; the launcher says why it is."""
_AFTER_RANK_ZERO_S = 30.0
"""How long another rank that failed keeps still. Mostly rank 0 failed with the same, or first: it says so and leaves,
whereupon the launcher stops this process."""
_STOPPED_BY_RANK_ZERO_S = 900.0
"""How long it waits for rank 0 before that, where rank 0 has told that it failed: it ends its trackers, for minutes at
most, before it says why."""

_NO_ROOM_BYTES = 1 << 20


def main() -> int:
    die_with_parent()
    num_processes, path, overrides = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    rank = int(os.environ.get("RANK", "0"))
    try:
        config = load_config(path, parse_overrides(overrides))
        if rank:
            log_of(config, rank).unlink(missing_ok=True)
            write_output_to(log_of(config, rank))
        with loading(), contextlib.nullcontext() if config.adapter == "qlora" else _without_bitsandbytes():
            import torch

            from rlx.learner.main import train
            from rlx.learner.ranks import StoppedByRankZero

        loaded()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        try:
            train(config, num_processes)
        except StoppedByRankZero:
            time.sleep(_STOPPED_BY_RANK_ZERO_S)
            raise
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # the end of the process: whatever came is said, once
        if isinstance(error, RlxError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif isinstance(error, RuntimeError) and _PEER.search(str(error)):
            print(f"learner process {rank} lost the connection to another one", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
            if _is_full(Path(config.output_dir), error):
                print(
                    f"error: the disk that holds {config.output_dir} is full. Free some space, or name another output_dir; "
                    "save_total_limit keeps the newest checkpoints only",
                    file=sys.stderr,
                    flush=True,
                )
        if rank:
            time.sleep(_AFTER_RANK_ZERO_S)
        return error.exit_code if isinstance(error, RlxError) else 1


def _is_full(folder: Path, error: Exception) -> bool:
    """Whether `error` may come of the disk; each library words it in its own way."""
    if "No space left on device" in str(error):
        return True
    return folder.is_dir() and shutil.disk_usage(folder).free < _NO_ROOM_BYTES


@contextlib.contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """PEFT, which is imported meanwhile, takes it for not installed; it would import it, and with it torch's compiler: a
    second of every start."""
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    hidden = "bitsandbytes" not in modules
    if hidden:
        modules["bitsandbytes"] = None
    yield
    if hidden:
        del modules["bitsandbytes"]


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # At the interpreter's end, gloo's groups wait for threads that wait for the interpreter's lock: leave without it.
    os._exit(status)
