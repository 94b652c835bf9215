"""Episodes: how a group request becomes completions. `single_turn` samples one reply for each generation."""
