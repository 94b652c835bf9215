"""What a service that was killed leaves behind, and for how long."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

KEEPS_WEIGHTS = """
import multiprocessing
import multiprocessing.resource_tracker
import os
import time
from rlx.cluster import watchdog
from rlx.rollout.vllm_start import prepare_environment
from rlx.rollout.weights_store import WeightFile
from rlx.rollout.manifest import WeightManifest

watchdog.guard()
file = WeightFile(WeightManifest(1, 4, "", ()))
file.path.write_bytes(b"abcd")
causes = prepare_environment(60)
lock = multiprocessing.get_context("spawn").Lock()
print(file.path, causes, f"/dev/shm/sem.{lock._semlock.name[1:]}", os.environ["VLLM_RPC_BASE_PATH"], flush=True)
os.kill(multiprocessing.resource_tracker._resource_tracker._pid, 9)  # as when all of a node is killed at once
time.sleep(600)
"""


def test_the_weights_and_the_folder_of_an_engine_that_a_killed_process_kept_are_removed():
    process = subprocess.Popen([sys.executable, "-c", KEEPS_WEIGHTS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    path, causes, semaphore, sockets = map(Path, process.stdout.readline().split())
    assert path.read_bytes() == b"abcd"
    assert causes.is_file()
    assert semaphore.is_file()
    assert sockets == causes.parent
    process.kill()
    process.communicate()
    end = time.monotonic() + 120
    left = (path.parent, causes.parent, semaphore)
    while any(each.exists() for each in left) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [each for each in left if each.exists()]
