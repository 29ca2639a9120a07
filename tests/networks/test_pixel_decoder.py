"""The PixelCNN decoder is causal over pixels, normalised, and its samples match its definition."""

import itertools
import math
from functools import partial

import pytest
import torch
from conftest import compose

from vqvae_lightning.configs import build
from vqvae_lightning.errors import InputError
from vqvae_lightning.likelihoods import Categorical, LogisticMixture, SquaredError
from vqvae_lightning.networks import sampling
from vqvae_lightning.networks.autoencoder import VQVAE, Decoder
from vqvae_lightning.networks.pixel_decoder import PixelCNNDecoder
from vqvae_lightning.networks.sampling import choose_codes, compute_distribution
from vqvae_lightning.pixels import from_uint8, to_uint8
from vqvae_lightning.quantizers import EMAQuantizer

SMALL = {"channels": 12, "layers": 3, "first_kernel": 3}


def make_upsampler(outputs):
    return Decoder(outputs, 8, code_dim=4, downsamplings=1, residual_blocks=1, residual_hidden=4)


def make(channels, **options):
    """An untrained decoder, with weights large enough for its distributions to differ."""
    decoder = PixelCNNDecoder(make_upsampler, channels, **{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(2)
    return decoder.requires_grad_(False)


def make_net(channels=3, **options):
    quantizer = EMAQuantizer(8, 4, init="uniform", warmup_steps=0)
    decoder = partial(PixelCNNDecoder, **{**SMALL, **options})
    sizes = {"hidden": 8, "residual_blocks": 1, "residual_hidden": 4, "downsamplings": 1}
    return VQVAE(quantizer, channels, likelihood=Categorical, decoder=decoder, **sizes)


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_level_sees_all_earlier_levels_and_latents_and_no_later_level(channels):
    rows = columns = 4
    decoder = make(channels, layers=5).double()
    embedded = torch.randn(1, rows, columns, channels, 12, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(1, 4, rows // 2, columns // 2, dtype=torch.float64, requires_grad=True)
    whole = embedded if channels > 1 else embedded[..., 0, :]
    decoder.pixelcnn.embedding.forward = lambda codes: whole
    output = decoder(vectors, torch.zeros(1, channels, rows, columns, dtype=torch.uint8))
    assert output.shape == (1, 256 * channels, rows, columns)
    logits = output.unflatten(1, (channels, 256))
    places = itertools.product(range(rows), range(columns), range(channels))
    for number, (row, column, channel) in enumerate(places):
        pixel, latent = torch.autograd.grad(
            logits[0, channel, :, row, column].sum(), (embedded, vectors), retain_graph=True
        )
        seen = pixel[0].abs().sum(-1).flatten() > 0
        assert not seen[number:].any(), "a later level has an effect"
        assert seen[:number].all(), "an earlier level has no effect"
        assert (latent.abs().sum(1) > 0).all(), "a latent has no effect"


@pytest.mark.parametrize(("channels", "columns"), [(1, 2), (2, 1)])
def test_the_probabilities_of_all_images_sum_to_one(channels, columns):
    # Two levels per image, so there are 65,536 images.
    decoder = make(channels)
    decoder.upsampler = torch.nn.Identity()
    decoder.pixelcnn.double()
    context = torch.randn(1, 12, 1, columns, dtype=torch.float64)
    total = 0.0
    for first in torch.arange(256).split(32):
        images = torch.cartesian_prod(first, torch.arange(256))
        images = images.view(-1, channels, 1, columns)
        output = decoder(context.expand(len(images), -1, -1, -1), images)
        nats = Categorical(channels).log_prob(output, images)
        total += nats.double().sum((1, 2)).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_equal_full_reevaluation_and_have_the_likelihood_they_were_drawn_with(
    channels, monkeypatch
):
    decoder, vectors = make(channels), torch.randn(5, 4, 2, 3)
    nats = []

    def choose(share, uniform):
        chosen = choose_codes(share, uniform)
        nats.append(share.gather(1, chosen[:, None])[:, 0].log())
        return chosen

    monkeypatch.setattr(sampling, "choose_codes", choose)
    drawn = decoder.sample(vectors, seeded())
    assert drawn.dtype == torch.uint8
    uniform = torch.rand(5, 4, 6, channels, generator=seeded(), dtype=torch.float64)
    expected = torch.zeros(5, channels, 4, 6, dtype=torch.uint8)
    for row, column, channel in itertools.product(range(4), range(6), range(channels)):
        logits = decoder(vectors, expected).unflatten(1, (channels, 256))
        share = compute_distribution(logits[:, channel, :, row, column])
        chosen = choose_codes(share, uniform[:, row, column, channel])
        expected[:, channel, row, column] = chosen.to(torch.uint8)
    assert torch.equal(drawn, expected)
    likelihood = Categorical(channels)
    logs = likelihood.log_prob(decoder(vectors, drawn), drawn).sum((1, 2))
    torch.testing.assert_close(logs.double(), torch.stack(nats).sum(0), rtol=1e-5, atol=1e-3)
    loss = likelihood.compute_loss(decoder(vectors, drawn), drawn)
    assert loss.item() == pytest.approx(-logs.mean().item() / (24 * channels), rel=1e-5)


def test_a_network_scores_given_images_and_draws_new_ones():
    net = make_net().eval()
    images = torch.rand(2, 3, 6, 4) * 2 - 1
    with torch.no_grad():
        output, codes = net(images), net.encode(images)
        assert output.reconstruction is None
        vectors = net.quantizer.decode(codes)
        expected = net.decoder(vectors, to_uint8(images))
        assert torch.equal(output.output, expected)
        assert torch.equal(net.decode_output(codes, to_uint8(images)), expected)
        drawn = net.decode(codes, seeded())
        assert torch.equal(drawn, from_uint8(net.decoder.sample(vectors, seeded())))
        assert torch.equal(drawn, net.decode(codes, seeded()))
        assert not torch.equal(drawn, net.decode(codes, seeded(4)))
    with pytest.raises(InputError, match="pass their levels"):
        net.decode_output(codes)
    with pytest.raises(InputError, match="eval"):
        net.train().decode(codes)


@pytest.mark.parametrize("likelihood", [SquaredError, LogisticMixture])
def test_another_likelihood_is_refused(likelihood):
    quantizer = EMAQuantizer(8, 4)
    with pytest.raises(InputError, match=f"^likelihood={likelihood.__name__} must be Categorical"):
        VQVAE(quantizer, 3, likelihood=likelihood, decoder=PixelCNNDecoder)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["likelihood=mixture"],
            "error: model.net.likelihood=LogisticMixture must be Categorical "
            "(likelihood=categorical)",
        ),
        (["likelihood=mse"], "error: model.net.likelihood=SquaredError must be Categorical"),
        (["model.net.decoder.layers=0"], "error: model.net.decoder.layers=0 must be"),
        (["model.net.decoder.kernel=4"], "error: model.net.decoder.kernel=4 must be odd"),
        (["monitor=val/nmse"], "error: monitor=val/nmse must be one of val/codebook_use (max), "),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(overrides, message, toy, command):
    outcome = command("vqvae-train", *toy, "trainer=debug", "model/decoder=pixelcnn", *overrides)
    assert outcome.status == 1
    assert outcome.err.startswith(message)
    assert len(outcome.err.strip().splitlines()) == 1


def test_the_convolutional_decoder_is_what_it_was_without_the_option(tmp_path):
    cfg = compose("vqvae", "model.net.channels=1", folder=tmp_path)
    assert (cfg.model.net.decoder, cfg.monitor) == (None, "val/nmse")
    torch.manual_seed(0)
    net = build(cfg.model).net
    del cfg.model.net.decoder  # as in configs of older runs
    torch.manual_seed(0)
    older = build(cfg.model).net.state_dict()
    assert list(older) == list(net.state_dict())
    tensors = {name: value for name, value in older.items() if torch.is_tensor(value)}
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in tensors.items())
    assert isinstance(net.decoder, Decoder)
    assert not net.autoregressive
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    output = net.eval()(images)
    assert torch.equal(output.reconstruction, net.decoder(output.quantized.vectors))
    assert output.reconstruction is output.output


def test_the_config_makes_the_likelihood_follow(tmp_path):
    cfg = compose("vqvae", "model/decoder=pixelcnn", "model.net.channels=3", folder=tmp_path)
    assert cfg.monitor == cfg.callbacks.best.monitor == "val/nll_nats_per_dim"
    net = build(cfg.model).net
    assert net.autoregressive
    assert net.likelihood.weight == 0.1
    assert net.decoder.pixelcnn.codes_per_position == 3
    assert math.prod(net.decoder.pixelcnn.embedding.weight.shape) == 3 * 256 * 32
