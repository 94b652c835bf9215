"""rlx: GRPO with a Ray cluster of vLLM rollout workers and a separate learner.

Importing this package, its configuration, errors or CLI loads no torch, vllm or ray.
"""

__version__ = "0.1.0"
