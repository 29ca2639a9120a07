"""Codebook usage equals that of the whole histogram."""

import numpy as np
import pytest
import torch

from vqvae_lightning.metrics import CodebookUsage, look_up_codes, unigram_log_probabilities
from vqvae_lightning.units import get_unit


def test_perplexity_is_that_of_all_batches_together():
    # The mean of the perplexities of the batches would be 289 instead of 512.
    codes = torch.randperm(512 * 40) % 512
    usage = CodebookUsage(512)
    for part in codes.split(8 * 64):
        usage.update(part.view(-1, 8, 8))
    assert usage.compute()["perplexity"] == pytest.approx(512)
    assert usage.compute()["entropy_bits"] == pytest.approx(9)


def test_any_batching_gives_the_entropy_of_the_histogram():
    codes = (torch.rand(1000) ** 3 * 20).long()
    share = codes.bincount(minlength=20) / 1000
    expected = torch.exp(-torch.special.xlogy(share, share).sum())
    for size in (1, 7, 999, 1000):
        usage = CodebookUsage(20)
        for part in codes.split(size):
            usage.update(part)
        torch.testing.assert_close(usage.compute()["perplexity"], expected)


def test_use_counts_codes_of_every_batch():
    # Other implementations count only the last batch.
    usage = CodebookUsage(10)
    usage.update(torch.tensor([0, 1]))
    usage.update(torch.tensor([2, 2]))
    result = usage.compute()
    assert result["use"] == pytest.approx(0.3)
    assert result["dead_codes"] == 7


def test_an_empty_histogram_is_zero_and_not_nan():
    usage = CodebookUsage(10)
    usage.update(torch.empty(0, dtype=torch.long))
    assert all(torch.isfinite(value).all() for value in usage.compute().values())
    assert usage.compute()["perplexity"] == 0


def test_each_codebook_has_its_own_perplexity():
    # One histogram of all rows would give 2 codebooks of 8 equally used codes a perplexity of 16.
    usage = CodebookUsage(8, codes_per_position=2)
    codes = torch.stack([torch.arange(40) % 8, torch.arange(40) % 2], -1)
    for part in codes.split(8):
        usage.update(part.view(2, 2, 2, 2))
    result = usage.compute()
    assert result["perplexity"] == pytest.approx((8 + 2) / 2)
    assert result["entropy_bits"] == pytest.approx((3 + 1) / 2)
    assert result["use"] == pytest.approx(10 / 16)
    assert result["dead_codes"] == 6
    assert result["counts"].tolist() == [5] * 8 + [20] * 2 + [0] * 6


def test_each_codebook_has_its_own_unigram_model():
    counts = np.array([[7, 0, 3], [0, 0, 11]])
    shares = np.array([[8, 1, 4], [1, 1, 12]]) / np.array([[13], [14]])
    found = unigram_log_probabilities(torch.tensor(counts))
    torch.testing.assert_close(found, torch.tensor(np.log(shares)).float())
    torch.testing.assert_close(unigram_log_probabilities(torch.tensor(counts[0])), found[0])
    codes = np.random.default_rng(0).integers(0, 3, (4, 2, 5, 2))
    expected = np.stack([shares[q][codes[..., q]] for q in range(2)], -1)
    np.testing.assert_allclose(look_up_codes(found, torch.tensor(codes)).exp(), expected, rtol=1e-6)
    alone = look_up_codes(found[0], torch.tensor(codes[..., 0])).exp()
    np.testing.assert_allclose(alone, expected[..., 0], rtol=1e-6)


def test_a_metric_of_the_users_own_code_has_an_unknown_unit():
    assert get_unit("test/kl_nats_dim12") == "nats per latent value"
    assert get_unit("test/my_term") == "unknown"
