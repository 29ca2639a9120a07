"""Bottlenecks without codes against closed forms and brute force."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vqvae_lightning.errors import InputError
from vqvae_lightning.metrics import LatentUsage
from vqvae_lightning.quantizers import GaussianBottleneck, NoQuantizer


def test_a_plain_autoencoder_passes_vectors_on():
    z = torch.randn(2, 3, 4, 5)
    output = NoQuantizer(3)(z)
    assert torch.equal(output.vectors, z)
    assert output.codes is None
    assert output.loss == 0


def test_kl_is_that_of_the_two_normal_distributions():
    z = torch.randn(2, 6, 4, 5)
    output = GaussianBottleneck(3, beta=0.5)(z)
    posterior = Normal(z[:, :3], (z[:, 3:] / 2).exp())
    exact = kl_divergence(posterior, Normal(0.0, 1.0))
    torch.testing.assert_close(output.posterior.kl, exact)
    torch.testing.assert_close(output.terms["kl"], exact.mean())
    torch.testing.assert_close(output.loss, 0.5 * exact.mean())


def test_samples_have_the_posteriors_mean_and_variance_and_pass_the_gradient():
    mean, log_variance = torch.randn(1, 2, 1, 1), torch.randn(1, 2, 1, 1)
    z = torch.cat([mean, log_variance], 1).expand(100_000, -1, -1, -1)
    drawn = GaussianBottleneck(2).train()(z).vectors
    torch.testing.assert_close(drawn.mean(0, keepdim=True), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.var(0, keepdim=True), log_variance.exp(), rtol=0.03, atol=0)
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    drawn = GaussianBottleneck(2).train()(z).vectors
    drawn.sum().backward()
    torch.testing.assert_close(z.grad[:, :2], torch.ones(2, 2, 3, 3))
    noise = (drawn - z[:, :2]) / (z[:, 2:] / 2).exp()
    torch.testing.assert_close(z.grad[:, 2:], (noise * (z[:, 2:] / 2).exp() / 2).detach())


def test_in_evaluation_the_mean_is_decoded():
    z = torch.randn(2, 4, 3, 3)
    assert torch.equal(GaussianBottleneck(2).eval()(z).vectors, z[:, :2])


def test_free_bits_leave_a_channel_below_them_alone():
    bottleneck = GaussianBottleneck(2, beta=1.0, free_bits=0.5)
    # The first channel has mean 0.1 and variance 1 (0.005 nats), the second 2 and 1 (2 nats).
    z = torch.tensor([0.1, 2.0, 0.0, 0.0]).view(1, 4, 1, 1).repeat(3, 1, 2, 2).requires_grad_()
    output = bottleneck(z)
    assert output.loss.item() == pytest.approx((0.5 * math.log(2) + 2.0) / 2)
    assert output.terms["kl_clamped"].item() == pytest.approx(output.loss.item())
    assert output.terms["kl"].item() == pytest.approx((0.005 + 2.0) / 2)
    output.loss.backward()
    assert (z.grad[:, [0, 2]] == 0).all()
    assert (z.grad[:, 1] > 0).all()


def test_half_precision_does_not_overflow():
    z = torch.full((2, 4, 3, 3), 15.0, dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        output = GaussianBottleneck(2).train()(z)
    assert torch.isfinite(output.loss)
    assert output.vectors.dtype == torch.float32


def test_collapsed_channels_are_distinguished_from_active_ones():
    usage = LatentUsage(4, 4, 5)
    scale = torch.tensor([1.0, 0.09, 0.3, 0.01]).view(4, 1, 1)
    mean = torch.randn(64, 4, 4, 5) * scale + 7
    mean[:, 3] += 5 * torch.randn(4, 5)  # depends on the position only, so carries no information
    kl = torch.rand(64, 4, 4, 5)
    for part in torch.arange(64).split(10):
        usage.update(mean[part], kl[part])
    found = usage.compute()
    variance = mean.double().var(0, correction=0).mean((1, 2))
    assert found["active"].tolist() == (variance > 0.01).tolist() == [True, False, True, False]
    torch.testing.assert_close(found["kl_nats"], kl.mean((0, 2, 3)))


@pytest.mark.parametrize("make", [NoQuantizer, GaussianBottleneck])
def test_codes_are_refused_by_name(make):
    with pytest.raises(InputError, match=make.__name__):
        make(3).encode(torch.randn(1, 3, 2, 2))
    with pytest.raises(InputError, match=make.__name__):
        make(3).decode(torch.zeros(1, 2, 2, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"code_dim": 0}, "code_dim=0"), ({"beta": -1}, "beta=-1"), ({"free_bits": -1}, "free_bits")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        GaussianBottleneck(**{"code_dim": 3, **options})
