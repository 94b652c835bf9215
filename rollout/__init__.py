"""The rollout service without Ray: engines (`vllm_*`, `fake_engine`), the service that drives a fleet of workers
(`service`, `fleet`, `groups`, `weight_updates`), its HTTP face (`app`, `gateway`), and the learner's client."""
