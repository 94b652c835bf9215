"""The model that is trained: loaded, adapted, quantised, cut over processes, kept in checkpoints."""
