"""What each command does: train, evaluate, sample, reconstruct, or all in turn."""
