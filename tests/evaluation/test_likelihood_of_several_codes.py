"""Rates of several codes per position, recomputed with numpy from the stored codes."""

import math

import evaluated
import numpy as np
import pytest
import torch
from evaluated import CPU, SIZES

from vqvae_lightning.data import CodesDataModule
from vqvae_lightning.evaluation.likelihood import measure_likelihood
from vqvae_lightning.evaluation.reconstruction import measure_reconstruction
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.quantizers import EMAQuantizer

Q, K = 3, 5


@pytest.fixture(scope="module", params=["product", "residual"])
def measured(request, tmp_path_factory):
    torch.manual_seed(4)
    quantizer = EMAQuantizer(
        K, 6, init="uniform", warmup_steps=0, codes_per_position=Q, arrangement=request.param
    )
    quantizer.codebook.normal_()
    net = VQVAE(quantizer, 3, hidden=8, residual_blocks=1, residual_hidden=4).eval()
    for parameter in net.encoder.parameters():
        parameter.data.mul_(3)
    folder = tmp_path_factory.mktemp("codes")
    codes = CodesDataModule(evaluated.make_image_data(), net, "hash", str(folder), 12)
    codes.encode(CPU)
    codes.setup()
    prior = PixelCNN(K, *codes.grid, 3, channels=8, layers=3, dropout=0.0, codes_per_position=Q)
    prior.eval()
    found = {
        **measure_reconstruction(codes, "test", CPU),
        **measure_likelihood(codes, prior, "test", CPU),
    }
    return codes, prior, found


def read_codes(codes, split):
    return np.array(codes.datasets[split].data).astype(np.int64)


def test_histograms_are_counted_per_codebook_and_per_position(measured):
    codes, _, found = measured
    train, test = read_codes(codes, "train"), read_codes(codes, "test")
    assert test.shape == (SIZES["test"], 4, 5, Q)
    unigram, position = np.zeros(test.shape), np.zeros(test.shape)
    for q in range(Q):
        counts = np.bincount(train[..., q].ravel(), minlength=K) + 1
        unigram[..., q] = -np.log(counts / counts.sum())[test[..., q]]
        for row in range(4):
            for column in range(5):
                counts = np.bincount(train[:, row, column, q], minlength=K) + 1
                nats = -np.log(counts / counts.sum())
                position[:, row, column, q] = nats[test[:, row, column, q]]
    assert found["unigram_nats_per_code"] == pytest.approx(unigram.mean(), rel=1e-5)
    assert found["position_nats_per_code"] == pytest.approx(position.mean(), rel=1e-5)
    codes_per_dim = 4 * 5 * Q / (3 * 16 * 20)
    bits = unigram.mean() / math.log(2) * codes_per_dim
    assert found["histogram_bits_per_dim"] == pytest.approx(bits, rel=1e-5)
    assert found["uniform_bits_per_dim"] == pytest.approx(math.log2(K) * codes_per_dim)


def test_the_prior_is_charged_for_every_code(measured):
    codes, prior, found = measured
    test = torch.from_numpy(read_codes(codes, "test"))
    labels = codes.datasets["test"].labels
    nats = []
    with torch.no_grad():
        # Each code is scored with itself and all later ones set to 0.
        for place in range(test[0].numel()):
            seen = test.flatten(1).clone()
            seen[:, place:] = 0
            logits = prior(seen.view(test.shape), labels).log_softmax(1).flatten(2)
            own = test.flatten(1)[:, place, None]
            nats.append(-logits[:, :, place].gather(1, own))
    expected = torch.stack(nats).double().mean().item()
    assert found["nats_per_code"] == pytest.approx(expected, rel=1e-5)
    rate = expected / math.log(2) * 4 * 5 * Q / (3 * 16 * 20)
    assert found["prior_bits_per_dim"] == pytest.approx(rate, rel=1e-5)
    total = found["reconstruction_bits_per_dim"] + found["prior_bits_per_dim"]
    assert found["total_bits_per_dim"] == pytest.approx(total)


def test_the_use_of_each_codebook_is_counted(measured):
    codes, _, found = measured
    test, train = read_codes(codes, "test"), read_codes(codes, "train")
    perplexities, used, dead = [], 0, 0
    for q in range(Q):
        share = np.bincount(test[..., q].ravel(), minlength=K) / test[..., q].size
        used += (share > 0).sum()
        share = share[share > 0]
        perplexities.append(np.exp(-(share * np.log(share)).sum()))
        dead += (np.bincount(train[..., q].ravel(), minlength=K) == 0).sum()
    assert found["perplexity"] == pytest.approx(np.mean(perplexities), rel=1e-5)
    assert found["codebook_use"] == pytest.approx(used / (Q * K))
    assert found["dead_codes"] == dead
