"""Everything that uses Ray, and the commands that do.

commands    serve (`rlx vllm-serve`), run, check, reward_test with reward_cases and reward_report, rollout_test, workers,
            dashboard
Ray itself  ray_runtime, layout (which devices), reservation, watchdog, calls, killable, progress
workers     ray_worker → rollout_actor → engines; packed (completions on their way); direct (`service.direct`)
episodes    ray_episodes → episode_actor
rewards     ray_scorer → reward_pool → reward_actor
to be seen  ray_metrics, ray_routes, panels (Grafana's dashboards)
"""

import os

# Ray reads it when it is imported. Who died, of what, and what happens then is told by the service in a line of its own.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed while executing a task")
