"""Reward functions: loading and calling the user's (`scoring`), and the built-in ones.

    rlx.rewards.math     accuracy (main)
    rlx.rewards.format   think (main), boxed
    rlx.rewards.length   soft_overlong (main), brevity

Nothing here knows of Ray or of the learner; where the functions run is the cluster's business.
"""
