"""The prior is causal, sees everything before, and its sampler is itself."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from vqvae_lightning.errors import InputError
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.networks.sampling import choose, sample, score

CHANNELS = 16  # enough that no position has only dead ReLUs


def make(height, width, *, num_codes=5, num_classes=0, layers=None, first_kernel=3, kernel=3):
    enough = layers or 1 + max(height, width)
    return PixelCNN(
        num_codes,
        height,
        width,
        num_classes,
        channels=CHANNELS,
        layers=enough,
        first_kernel=first_kernel,
        kernel=kernel,
    ).eval()


@pytest.mark.parametrize(("first_kernel", "kernel"), [(3, 3), (7, 3), (5, 5), (3, 7)])
@pytest.mark.parametrize(("height", "width"), [(5, 5), (4, 6), (6, 3)])
def test_every_position_sees_all_earlier_codes_and_no_later_one(
    first_kernel, kernel, height, width
):
    prior = make(height, width, first_kernel=first_kernel, kernel=kernel).double()
    embedded = torch.randn(1, height, width, CHANNELS, dtype=torch.float64, requires_grad=True)
    prior.embedding.forward = lambda codes: embedded
    logits = prior(torch.zeros(1, height, width, dtype=torch.long))
    for row, column in itertools.product(range(height), range(width)):
        (gradient,) = torch.autograd.grad(
            logits[0, :, row, column].sum(), embedded, retain_graph=True, allow_unused=True
        )
        seen = gradient[0].abs().sum(-1).flatten() > 0
        place = row * width + column
        assert not seen[place:].any(), "a later code leaks"
        assert seen[:place].all(), "an earlier code stays unseen"


def test_layers_needed_is_the_smallest_number_without_a_blind_spot():
    for size in (5, 8):
        needed = make(size, size, layers=2, first_kernel=5).layers_needed
        for layers, complete in ((needed, True), (needed - 1, False)):
            prior = make(size, size, layers=layers, first_kernel=5).double()
            embedded = torch.randn(1, size, size, CHANNELS, dtype=torch.float64, requires_grad=True)
            prior.embedding.forward = lambda codes, embedded=embedded: embedded
            last = prior(torch.zeros(1, size, size, dtype=torch.long))[0, :, -1, 0].sum()
            (gradient,) = torch.autograd.grad(last, embedded)
            seen = gradient[0].abs().sum(-1).flatten() > 0
            assert seen[: size * (size - 1)].all() == complete


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 6), (6, 3)])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 3}])
def test_sample_equals_full_reevaluation(num_classes, height, width, kernel, options):
    prior = make(height, width, num_classes=num_classes, first_kernel=kernel, kernel=kernel)
    labels = torch.arange(5) % 3 if num_classes else None
    shape = (5, height, width)
    drawn = sample(
        prior, shape, labels, generator=torch.Generator().manual_seed(3), batch_size=2, **options
    )
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    naive = torch.zeros(shape, dtype=torch.long)
    with torch.no_grad():
        for row, column in itertools.product(range(height), range(width)):
            logits = prior(naive, labels)[:, :, row, column]
            naive[:, row, column] = choose(
                logits,
                uniform[:, row, column],
                options.get("temperature", 1.0),
                options.get("top_k", prior.num_codes),
            )
    assert torch.equal(drawn, naive)


def test_likelihoods_of_all_grids_sum_to_one_and_samples_follow_them():
    prior = make(2, 2, num_codes=3)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(2)  # far from uniform
        grids = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
        mass = score(prior, grids).exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-5)
    drawn = sample(
        prior, (20_000, 2, 2), generator=torch.Generator().manual_seed(0), batch_size=5000
    )
    number = (drawn.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1)
    counts = number.bincount(minlength=81).double()
    expected = mass.double() * 20_000
    # Rare grids are pooled, as the test needs about five hits each.
    rare = expected < 5
    pooled = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp(min=1e-9)
    statistic = ((pooled - wanted) ** 2 / wanted).sum().item()
    degrees = len(wanted) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_a_sample_does_not_depend_on_its_batch():
    prior = make(3, 4, num_classes=2)
    labels = torch.tensor([0, 1, 1, 0, 1])
    draws = [
        sample(
            prior, (5, 3, 4), labels, generator=torch.Generator().manual_seed(1), batch_size=size
        )
        for size in (1, 2, 5)
    ]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


def test_choose_draws_each_code_with_its_probability():
    logits = torch.tensor([[0.0, 1.0, -30.0, 2.0]])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    drawn = choose(logits.expand(10_000, -1), uniform, 1.0, 4)
    share = drawn.bincount(minlength=4) / 10_000
    torch.testing.assert_close(share, logits[0].softmax(0), atol=2e-4, rtol=0)


@pytest.mark.parametrize("keep", [1, 4])
def test_choose_keeps_the_likeliest_codes_only(keep):
    logits = torch.randn(6, 9)
    allowed = logits.topk(keep).indices
    for uniform in (0.0, 0.3, 0.999999999):
        drawn = choose(logits, torch.full((6,), uniform, dtype=torch.float64), 1.0, keep)
        assert (allowed == drawn[:, None]).any(1).all()


def test_labels_change_the_likelihood():
    prior = make(3, 3, num_classes=2)
    codes = torch.randint(0, 5, (4, 3, 3))
    one, other = (score(prior, codes, torch.full((4,), label)) for label in (0, 1))
    assert (one - other).abs().min() > 1e-5


def test_score_is_the_sum_of_log_probabilities():
    prior = make(3, 3)
    codes = torch.randint(0, 5, (4, 3, 3))
    expected = -F.cross_entropy(prior(codes), codes, reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(score(prior, codes), expected)


def test_sampling_in_training_mode_is_refused():
    with pytest.raises(InputError, match="eval"):
        sample(make(2, 2).train(), (1, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"top_k": 0}, "top_k=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"labels": torch.tensor([0])}, "takes no labels"),
    ],
)
def test_bad_sampling_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        sample(make(2, 2), (1, 2, 2), **options)


def test_a_conditional_prior_wants_labels():
    with pytest.raises(InputError, match="needs a label"):
        sample(make(2, 2, num_classes=2), (1, 2, 2))


@pytest.mark.parametrize("kernel", [1, 4])
def test_even_kernels_are_refused(kernel):
    with pytest.raises(InputError, match=f"kernel={kernel}"):
        PixelCNN(4, 3, 3, kernel=kernel)
