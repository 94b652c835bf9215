"""Everything that uses Ray: its start and placement, the actors of engines and rewards, and the commands
`rlx vllm-serve` (`serve`), `rlx run` (`run`) and `rlx check` (`check`)."""

import os

# Ray reads it when it is imported. Who died, of what, and what happens then is told by the service in a line of its own.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed while executing a task")
