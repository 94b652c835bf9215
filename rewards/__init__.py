"""Reward functions: loading and calling the user's (`scoring`), reward models and remote scorers (`sources`, `model`,
`remote`), and the built-in ones.

    rlx.rewards.math     accuracy (main)
    rlx.rewards.format   think (main), boxed
    rlx.rewards.length   soft_overlong (main), brevity
    rlx.rewards.code     reward (main), all_or_nothing: model-written Python against tests, in `sandbox`
    rlx.rewards.reasoning_gym

Nothing here knows of Ray or of the learner; where the functions run is the cluster's business.
"""
