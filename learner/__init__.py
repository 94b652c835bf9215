"""The learner: a `transformers.Trainer` whose data is a stream of scored groups from the rollout service."""

import logging

# PEFT imports it where it is installed, and on a CPU it would advise at every start to download kernels from the hub.
logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
