"""The learner: a `transformers.Trainer` whose data is a stream of scored groups from the rollout service."""
