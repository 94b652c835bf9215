"""What a service that was killed leaves behind, and for how long."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

KEEPS_WEIGHTS = """
import time
from rlx.cluster import watchdog
from rlx.rollout.vllm_start import prepare_environment
from rlx.rollout.weights_store import WeightFile
from rlx.wire import WeightManifest

watchdog.guard()
file = WeightFile(WeightManifest(1, 4, "", ()))
file.path.write_bytes(b"abcd")
print(file.path, prepare_environment(60), flush=True)
time.sleep(600)
"""


def test_the_weights_and_the_folder_of_an_engine_that_a_killed_process_kept_are_removed():
    process = subprocess.Popen([sys.executable, "-c", KEEPS_WEIGHTS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    path, causes = map(Path, process.stdout.readline().split())
    assert path.read_bytes() == b"abcd"
    assert causes.is_file()
    process.kill()
    process.communicate()
    end = time.monotonic() + 30
    while (path.parent.exists() or causes.parent.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    assert not path.parent.exists()
    assert not causes.parent.exists()
