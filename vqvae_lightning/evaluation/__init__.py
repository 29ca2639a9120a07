"""Measure a VQ-VAE and a prior on a held-out split."""
