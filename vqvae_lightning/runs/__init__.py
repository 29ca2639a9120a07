"""Runs on disk: the files in a run's folder, their claim, and resuming."""
