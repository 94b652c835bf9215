"""One rank of `torch.distributed.run`: trains the runs that the file in argv names, one after the other, so that the
libraries are imported once for all of them."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch

from rlx.config import load_config, parse_overrides
from rlx.learner.main import train
from rlx.processes import die_with_parent


def main() -> int:
    die_with_parent()
    torch.set_num_threads(1)
    for path, *overrides in json.loads(Path(sys.argv[1]).read_text()):
        try:
            train(load_config(path, parse_overrides(overrides)), int(os.environ["WORLD_SIZE"]))
        except Exception:  # the test reads what happened, and torch's agent only the status
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # gloo's threads do not end by themselves
