"""From the data set to the batch of a step: prompts, tickets, groups in flight, evaluations, recordings."""
