"""The layout of a run's folder."""

STAGES = ("vqvae", "prior", "evaluation", "samples")
"""Stages of a pipeline, in order; each has a folder of this name in the pipeline's."""
