"""The policy's way to the workers: packed, handed over, versioned, compared."""
