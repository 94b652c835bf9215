"""From the data set to the batch of a step.

    data, reasoning_gym → requests → ledger, feed, courier → the service → scored_groups, tally → stream

Beside it: evaluation, best (its weights), recording (and replay); rollouts puts rank 0's parts together.
"""
