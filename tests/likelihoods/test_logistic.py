"""Likelihoods of pixels sum to one, and the fitted scale is the best."""

import math

import pytest
import torch

from vqvae_lightning.evaluation import likelihood
from vqvae_lightning.evaluation.likelihood import build_pixel_score
from vqvae_lightning.likelihoods import SquaredError
from vqvae_lightning.likelihoods.logistic import discretised_logistic, fit_log_scale
from vqvae_lightning.likelihoods.protocol import to_levels

LEVELS = torch.arange(256)


@pytest.mark.parametrize("log_scale", [-9.0, -7.0, -2.0, 0.0, 3.0, 9.0])
def test_mass_of_all_levels_is_one(log_scale):
    means = torch.tensor([-300.0, -0.2, 0.0, 2.0, 100.3, 254.9, 600.0])
    mass = discretised_logistic(LEVELS, means[:, None], torch.tensor(log_scale)).double().exp()
    torch.testing.assert_close(mass.sum(1), torch.ones(7, dtype=torch.float64), rtol=1e-5, atol=0)


def test_mass_equals_the_difference_of_the_distribution_function():
    x, mean, scale = LEVELS.double(), 100.0, 5.0
    upper = torch.where(x == 255, 1.0, torch.sigmoid((x + 0.5 - mean) / scale))
    lower = torch.where(x == 0, 0.0, torch.sigmoid((x - 0.5 - mean) / scale))
    mass = discretised_logistic(LEVELS, torch.tensor(mean), torch.tensor(math.log(scale))).exp()
    torch.testing.assert_close(mass, (upper - lower).float(), rtol=1e-4, atol=1e-12)


def test_values_and_gradients_are_finite_far_from_the_mean():
    mean = torch.tensor([5.0, 250.0], requires_grad=True)
    log_scale = torch.tensor(-6.0, requires_grad=True)
    value = discretised_logistic(torch.tensor([255, 0]), mean, log_scale).sum()
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(mean.grad).all()
    assert torch.isfinite(log_scale.grad)


def test_gradients_equal_those_of_the_formula_in_float64():
    torch.manual_seed(0)
    levels = torch.tensor([0.0, 1, 100, 254, 255])[:, None, None]
    mean = torch.linspace(-20, 280, 31)[:, None].requires_grad_()
    log_scale = torch.linspace(-1, 4, 6).requires_grad_()
    weights = torch.randn(5, 31, 6)
    (discretised_logistic(levels, mean, log_scale) * weights).sum().backward()
    found = mean.grad.clone(), log_scale.grad.clone()
    x, m, s = (t.detach().double().requires_grad_() for t in (levels, mean, log_scale))
    upper = torch.where(x == 255, 1, torch.sigmoid((x + 0.5 - m) * (-s).exp()))
    lower = torch.where(x == 0, 0, torch.sigmoid((x - 0.5 - m) * (-s).exp()))
    kept = upper - lower > 1e-9  # below, even float64 loses the difference
    naive = torch.where(kept, upper - lower, 1).log()
    (naive * weights).sum().backward()
    mean.grad = log_scale.grad = None
    (discretised_logistic(levels, mean, log_scale) * weights * kept).sum().backward()
    assert kept.float().mean() > 0.5
    torch.testing.assert_close(mean.grad, m.grad.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_scale.grad, s.grad.float(), rtol=1e-4, atol=1e-3)
    assert all(grad.isfinite().all() for grad in found)


def test_a_scale_below_the_least_gets_no_gradient():
    log_scale = torch.tensor([-8.0, -6.0]).requires_grad_()
    near_an_edge = torch.tensor(10.499)  # elsewhere such a scale has no gradient anyway
    discretised_logistic(torch.tensor(10), near_an_edge, log_scale).sum().backward()
    assert log_scale.grad[0] == 0
    assert log_scale.grad[1] != 0


def test_fitted_scale_is_the_best_of_a_fine_search():
    mean = torch.rand(64, 2, 4, 4) * 255
    noise = torch.tensor([3.0, 12.0]).view(1, 2, 1, 1) * torch.logit(torch.rand(64, 2, 4, 4))
    levels = (mean + noise).round().clamp(0, 255).to(torch.uint8)
    fitted = fit_log_scale(levels, mean)
    candidates = torch.linspace(-1, 5, 601)
    for channel in range(2):
        one, other = levels[:, channel, None], mean[:, channel, None]
        values = torch.stack([discretised_logistic(one, other, c).mean() for c in candidates])
        assert fitted[channel].item() == pytest.approx(
            candidates[values.argmax()].item(), abs=0.011
        )


def test_a_rank_without_validation_images_has_the_scale_of_the_others(monkeypatch):
    output = torch.rand(8, 1, 4, 4) * 2 - 1
    levels = torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8)
    shape, device = (1, 4, 4), torch.device("cpu")
    alone = build_pixel_score(SquaredError(1), shape, lambda _: [(levels, output)], device)
    of_others = [([levels], [to_levels(output)])]
    monkeypatch.setattr(likelihood, "gather", lambda own: [*of_others, own])
    idle = build_pixel_score(SquaredError(1), shape, lambda _: [], device)
    assert torch.equal(idle(output, levels), alone(output, levels))


def test_a_perfect_decoder_costs_nothing_per_pixel():
    levels = torch.randint(0, 256, (4, 1, 3, 3))
    log_scale = fit_log_scale(levels, levels.float())
    assert -discretised_logistic(levels, levels.float(), log_scale).mean() < 1e-6
