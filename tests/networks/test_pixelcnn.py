"""The prior is causal without a blind spot, and its sampler matches its definition."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from vqvae_lightning.errors import InputError
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.networks.sampling import (
    choose_codes,
    compute_distribution,
    fit_batch_size,
    sample,
    sample_batches,
    score,
)

CHANNELS = 16  # enough for every position to have an active ReLU


def make(
    height, width, *, num_codes=5, num_classes=0, layers=None, first_kernel=3, kernel=3, **options
):
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
        **options,
    ).eval()


@pytest.mark.parametrize(("first_kernel", "kernel"), [(3, 3), (7, 3), (5, 5), (3, 7)])
@pytest.mark.parametrize(("height", "width"), [(5, 5), (4, 6), (6, 3)])
@pytest.mark.parametrize("conditional", [False, True])
def test_every_position_sees_all_earlier_codes_and_no_later_one(
    first_kernel, kernel, height, width, conditional
):
    kernels = {"first_kernel": first_kernel, "kernel": kernel}
    labels = torch.zeros(1, dtype=torch.long) if conditional else None
    prior = make(height, width, num_classes=2 * conditional, **kernels)
    if conditional:  # training must not change which positions have an effect
        prior = trained(prior, 10, labels=torch.tensor([0, 1]))
    prior = prior.double()
    embedded = torch.randn(1, height, width, CHANNELS, dtype=torch.float64, requires_grad=True)
    prior.embedding.forward = lambda codes: embedded
    logits = prior(torch.zeros(1, height, width, dtype=torch.long), labels)
    for row, column in itertools.product(range(height), range(width)):
        (gradient,) = torch.autograd.grad(
            logits[0, :, row, column].sum(), embedded, retain_graph=True, allow_unused=True
        )
        seen = gradient[0].abs().sum(-1).flatten() > 0
        place = row * width + column
        assert not seen[place:].any(), "a later code has an effect"
        assert seen[:place].all(), "an earlier code has no effect"


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


def naive(prior, shape, labels=None, context=None, known=None, guidance=1.0, **options):
    """Sample by definition, running the whole network for every code."""
    several = (prior.codes_per_position,) if prior.codes_per_position > 1 else ()
    uniform = torch.rand(*shape, *several, generator=seeded(), dtype=torch.float64)
    codes = torch.zeros(*shape, *several, dtype=torch.long)
    given = torch.zeros_like(codes, dtype=torch.bool) if known is None else known >= 0
    codes[given] = known[given] if known is not None else 0
    with torch.no_grad():
        for place in itertools.product(*map(range, codes.shape[1:])):
            one, scores = (slice(None), *place), (slice(None), slice(None), *place)
            logits = prior(codes, labels, context)[scores]
            if guidance != 1:
                nulls = torch.full_like(labels, prior.num_classes)
                without = prior(codes, nulls, context)[scores]
                logits = without + guidance * (logits - without)
            drawn = choose_codes(compute_distribution(logits, **options), uniform[one])
            codes[one] = torch.where(given[one], codes[one], drawn)
    return codes


def seeded():
    return torch.Generator().manual_seed(3)


def trained(prior, steps=30, **conditions):
    """Train a prior for some steps on grids with structure, far from its initial state."""
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2)
    prior.train()
    several = (prior.codes_per_position,) if prior.codes_per_position > 1 else ()
    size = (16, prior.height, prior.width, *several)
    for _ in range(steps):
        codes = (torch.randint(0, 2, size).cumsum(2) + torch.randint(0, 2, size)) % prior.num_codes
        given = {name: value[torch.arange(16) % len(value)] for name, value in conditions.items()}
        optimizer.zero_grad()
        F.cross_entropy(prior(codes, **given), codes).backward()
        optimizer.step()
    return prior.eval()


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 6), (6, 3)])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 3}, {"top_p": 0.6}]
)
def test_sample_equals_full_reevaluation(num_classes, height, width, kernel, options):
    prior = make(height, width, num_classes=num_classes, first_kernel=kernel, kernel=kernel)
    labels = torch.arange(5) % 3 if num_classes else None
    shape = (5, height, width)
    drawn = sample(prior, shape, labels, generator=seeded(), batch_size=2, **options)
    assert torch.equal(drawn, naive(prior, shape, labels, **options))


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("completing", [False, True])
def test_sample_equals_full_reevaluation_with_every_option_together(learnt, guidance, completing):
    prior = make(4, 5, num_classes=3, context_channels=2, null_label_rate=0.3, first_kernel=5)
    labels, context = torch.arange(5) % 3, torch.randn(5, 2, 2, 3)
    if learnt:
        prior = trained(prior, labels=labels, context=context)
    known = None
    if completing:  # a different number in each image, and a whole row in all
        known = torch.randint(0, 5, (5, 4, 5))
        known.view(5, 20)[torch.arange(20) >= torch.tensor([5, 7, 10, 19, 20])[:, None]] = -1
    options = {"temperature": 0.8, "top_k": 4, "top_p": 0.9}
    given = {"labels": labels, "context": context, "known": known, "guidance": guidance, **options}
    drawn = sample(prior, (5, 4, 5), generator=seeded(), batch_size=3, **given)
    assert torch.equal(drawn, naive(prior, (5, 4, 5), **given))
    if completing:
        assert torch.equal(drawn[known >= 0], known[known >= 0])


@pytest.mark.parametrize("each", [2, 3])
@pytest.mark.parametrize(("height", "width", "kernel"), [(3, 4, 3), (4, 3, 5)])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 3}, {"top_p": 0.6}]
)
def test_several_codes_equal_full_reevaluation(each, height, width, kernel, options):
    kernels = {"first_kernel": kernel, "kernel": kernel}
    prior = trained(make(height, width, codes_per_position=each, **kernels))
    shape = (5, height, width)
    drawn = sample(prior, shape, generator=seeded(), batch_size=2, **options)
    assert drawn.shape == (*shape, each)
    assert torch.equal(drawn, naive(prior, shape, **options))


@pytest.mark.parametrize("each", [2, 3])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("completing", [False, True])
def test_several_codes_equal_full_reevaluation_with_every_option_together(
    each, guidance, completing
):
    conditions = {"num_classes": 3, "context_channels": 2, "null_label_rate": 0.3}
    prior = make(3, 4, codes_per_position=each, first_kernel=5, **conditions)
    labels, context = torch.arange(5) % 3, torch.randn(5, 2, 2, 3)
    prior = trained(prior, labels=labels, context=context)
    known = None
    if completing:  # whole positions, a part of a position, and everything
        total = 12 * each
        known = torch.randint(0, 5, (5, 3, 4, each))
        count = torch.tensor([4 * each, 4 * each + 1, 6 * each - 1, 8 * each, total])
        known.view(5, total)[torch.arange(total) >= count[:, None]] = -1
    options = {"temperature": 0.8, "top_k": 4, "top_p": 0.9}
    given = {"labels": labels, "context": context, "known": known, "guidance": guidance, **options}
    expected = naive(prior, (5, 3, 4), **given)
    batches = list(sample_batches(prior, (5, 3, 4), generator=seeded(), batch_size=3, **given))
    drawn = torch.cat([batch.codes for batch in batches])
    assert torch.equal(drawn, expected)
    (part,) = sample_batches(prior, (5, 3, 4), generator=seeded(), only=slice(1, 4), **given)
    assert torch.equal(part.codes, expected[1:4])
    if completing:
        assert torch.equal(drawn[known >= 0], known[known >= 0])
        assert torch.cat([batch.nats for batch in batches])[4] == 0


@pytest.mark.parametrize("each", [2, 3])
@pytest.mark.parametrize(("height", "width"), [(3, 4), (4, 2)])
def test_every_code_sees_all_earlier_codes_and_no_later_one(each, height, width):
    prior = make(height, width, codes_per_position=each).double()
    size = (1, height, width, each)
    embedded = torch.randn(*size, CHANNELS, dtype=torch.float64, requires_grad=True)
    prior.embedding.forward = lambda codes: embedded
    logits = prior(torch.zeros(size, dtype=torch.long))
    assert logits.shape == (1, 5, height, width, each)
    for place, score_of in enumerate(logits[0].sum(0).flatten()):
        (gradient,) = torch.autograd.grad(score_of, embedded, retain_graph=True)
        seen = gradient[0].abs().sum(-1).flatten() > 0
        assert not seen[place:].any(), "a later code has an effect"
        assert seen[:place].all(), "an earlier code has no effect"


def test_each_code_of_a_position_has_a_network_on_its_earlier_codes():
    each, codes = 3, torch.randint(0, 5, (2, 3, 4, 3))
    prior = make(3, 4, codes_per_position=each)
    features = []
    prior.head.register_forward_pre_hook(lambda head, inputs: features.append(inputs[0]))
    with torch.no_grad():
        logits = prior(codes)
        state = prior.state_dict()
        tables = state["embedding.weight"].view(each, 5, CHANNELS)
        position = features[0].relu().movedim(1, -1)
        for number in range(each):
            rows = slice(number * CHANNELS, (number + 1) * CHANNELS)
            hidden = position @ state["head.from_features.weight"][rows, :, 0, 0].T
            hidden += state["head.from_features.bias"][rows]
            earlier = sum(tables[q][codes[..., q]] for q in range(number))
            if number:
                before = slice(rows.start - CHANNELS, rows.stop - CHANNELS)
                hidden += earlier @ state["head.from_earlier.weight"][before, :, 0, 0].T
            outputs = slice(number * 5, (number + 1) * 5)
            expected = hidden.relu() @ state["head.out.weight"][outputs, :, 0, 0].T
            expected += state["head.out.bias"][outputs]
            torch.testing.assert_close(logits[..., number].movedim(1, -1), expected)


def test_one_code_per_position_keeps_the_weights_of_older_checkpoints():
    shapes = {name: tuple(value.shape) for name, value in make(2, 2).state_dict().items()}
    others = {name: shape for name, shape in shapes.items() if not name.startswith("layers.")}
    assert others == {
        "embedding.weight": (5, CHANNELS),
        "head.1.weight": (CHANNELS, CHANNELS, 1, 1),
        "head.1.bias": (CHANNELS,),
        "head.3.weight": (5, CHANNELS, 1, 1),
        "head.3.bias": (5,),
    }
    assert make(2, 2, codes_per_position=1)(torch.zeros(1, 2, 2, dtype=torch.long)).ndim == 4


def test_codes_of_another_number_per_position_are_refused():
    for each, size in ((1, (1, 2, 2, 2)), (2, (1, 2, 2)), (2, (1, 2, 2, 3))):
        with pytest.raises(InputError, match=f"codes_per_position={each}"):
            make(2, 2, codes_per_position=each)(torch.zeros(size, dtype=torch.long))


def test_guidance_zero_and_one_are_the_two_models():
    prior = trained(make(3, 4, num_classes=2, null_label_rate=0.5), labels=torch.tensor([0, 1]))
    labels = torch.tensor([0, 1, 1, 0])
    drawn = {
        guidance: sample(prior, (4, 3, 4), labels, generator=seeded(), guidance=guidance)
        for guidance in (0, 1)
    }
    unconditional = sample(prior, (4, 3, 4), torch.full((4,), 2), generator=seeded())
    assert torch.equal(drawn[0], unconditional)
    assert torch.equal(drawn[1], sample(prior, (4, 3, 4), labels, generator=seeded()))


def test_null_labels_are_what_training_sees_at_their_rate():
    prior = make(2, 2, num_classes=2, null_label_rate=0.25)
    seen = []
    prior.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[2]))
    prior.train()(torch.zeros(4000, 2, 2, dtype=torch.long), torch.arange(4000) % 2)
    assert (seen[0] == 2).float().mean() == pytest.approx(0.25, abs=0.03)
    prior.eval()(torch.zeros(4000, 2, 2, dtype=torch.long), torch.arange(4000) % 2)
    assert torch.equal(seen[1], torch.arange(4000) % 2)


def test_context_reaches_every_position_by_its_own_place():
    prior = make(4, 6, context_channels=3).double()
    context = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    logits = prior(torch.zeros(1, 4, 6, dtype=torch.long), context=context)
    for row, column in itertools.product(range(4), range(6)):
        (gradient,) = torch.autograd.grad(
            logits[0, :, row, column].sum(), context, retain_graph=True
        )
        seen = gradient[0].abs().sum(0) > 0
        assert seen[row // 2, column // 2], "its own place"
        assert not seen[row // 2 + 1 :].any(), "a later row"


def test_the_reported_entropy_is_the_mean_likelihood_of_the_samples():
    prior = trained(make(3, 3, num_codes=4))
    batches = list(sample_batches(prior, (6000, 3, 3), generator=seeded()))
    codes = torch.cat([batch.codes for batch in batches])
    with torch.no_grad():
        nats = -score(prior, codes)
    entropy = torch.cat([batch.nats for batch in batches])
    error = (nats - entropy).std() / 6000**0.5
    assert abs(float(nats.mean() - entropy.mean())) < 4 * float(error)
    assert 0.1 < entropy.mean() < 9 * 1.386


def test_numbering_of_the_codes_means_nothing_to_the_model():
    # A prior that treated codes as quantities would learn the permuted ones less well.
    results = []
    for permutation in (torch.arange(6), torch.tensor([3, 5, 0, 4, 1, 2])):
        torch.manual_seed(0)
        prior = make(4, 4, num_codes=6, layers=3)
        optimizer = torch.optim.AdamW(prior.train().parameters(), lr=5e-3)
        generator = torch.Generator().manual_seed(1)
        for step in range(150):
            codes = (torch.randint(0, 2, (64, 4, 4), generator=generator).cumsum(2)) % 6
            nats = F.cross_entropy(prior(permutation[codes]), permutation[codes])
            optimizer.zero_grad()
            nats.backward()
            optimizer.step()
            if step >= 130:
                results.append(nats.item())
    first, second = sum(results[:20]) / 20, sum(results[20:]) / 20
    assert first == pytest.approx(second, abs=0.03)
    assert first < 0.9  # the entropy of the data is log 2 per code


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 1}, [3]),
        ({"top_k": 2}, [3, 0]),
        ({"top_k": 99}, [0, 1, 2, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_p": 0.3}, [3]),
        ({"top_p": 0.41}, [3, 0]),
        ({"top_p": 0.71}, [3, 0, 1]),
        ({"top_p": 1e-9}, [3]),
        ({"top_k": 2, "top_p": 0.57}, [3]),  # top_k keeps 0.7, of which 0.4 is 0.571
        ({"temperature": 0}, [3]),
    ],
)
def test_options_leave_the_likeliest_codes_in_proportion(options, allowed):
    share = torch.tensor([[0.3, 0.2, 0.1, 0.4]], dtype=torch.float64)
    left = compute_distribution(share.log(), **options)
    assert sorted(allowed) == left[0].nonzero()[:, 0].tolist()
    torch.testing.assert_close(left[0, allowed], share[0, allowed] / share[0, allowed].sum())
    assert left.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_a_power_of_the_probabilities(temperature):
    share = torch.tensor([[0.3, 0.2, 0.1, 0.4]], dtype=torch.float64)
    expected = share ** (1 / temperature)
    left = compute_distribution(share.log(), temperature=temperature)
    torch.testing.assert_close(left, expected / expected.sum())


def test_equal_codes_at_the_edge_go_by_their_number():
    left = compute_distribution(torch.zeros(1, 5), top_k=2)
    assert left[0].tolist() == [0.5, 0.5, 0, 0, 0]
    # Two of four codes hold exactly half, so a third is not needed.
    assert compute_distribution(torch.zeros(1, 4), top_p=0.5)[0].tolist() == [0.5, 0.5, 0, 0]


def test_a_batch_takes_no_more_than_its_share_of_memory(monkeypatch):
    prior = make(8, 8)
    assert fit_batch_size(prior, 8, 8, torch.device("cpu")) == 256
    monkeypatch.setattr(
        "vqvae_lightning.networks.sampling.measure_available_memory", lambda: 4_000_000
    )
    alone = fit_batch_size(prior, 8, 8, torch.device("cpu"))
    assert 1 < alone < 256
    assert fit_batch_size(prior, 8, 8, torch.device("cpu"), guided=True) <= alone // 2 + 1
    assert fit_batch_size(prior, 8, 8, torch.device("cpu"), processes=2) <= alone // 2 + 1
    assert fit_batch_size(prior, 200, 200, torch.device("cpu")) == 1
    several = make(8, 8, codes_per_position=100)
    assert 1 < fit_batch_size(several, 8, 8, torch.device("cpu")) < alone


@pytest.mark.parametrize("size", [(2, 2), (1, 2, 2)])
def test_likelihoods_of_all_grids_sum_to_one_and_samples_follow_them(size):
    height, width, *each = size
    prior = make(height, width, num_codes=3, codes_per_position=each[0] if each else 1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(2)  # far from uniform
        grids = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, *size)
        mass = score(prior, grids).exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-5)
    drawn = sample(
        prior,
        (20_000, height, width),
        generator=torch.Generator().manual_seed(0),
        batch_size=5000,
    )
    number = (drawn.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1)
    counts = number.bincount(minlength=81).double()
    expected = mass.double() * 20_000
    # Rare grids are pooled, because the test needs about five hits in each cell.
    rare = expected < 5
    pooled = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp(min=1e-9)
    statistic = ((pooled - wanted) ** 2 / wanted).sum().item()
    degrees = len(wanted) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("label", [None, 0, 1])
def test_likelihoods_of_all_grids_of_several_codes_sum_to_one(label):
    prior = make(2, 2, num_codes=3, codes_per_position=2, num_classes=0 if label is None else 2)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(2)
        grids = torch.tensor(list(itertools.product(range(3), repeat=8))).view(-1, 2, 2, 2)
        labels = None if label is None else torch.full((len(grids),), label)
        mass = score(prior, grids, labels).double().exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-5)
    assert mass.max() > 10 / len(grids)


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
    share = torch.tensor([[0.1, 0.3, 0.0, 0.6, 0.0]], dtype=torch.float64)
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = choose_codes(share.expand(10_000, -1), uniform)
    found = drawn.bincount(minlength=5).double() / 10_000
    torch.testing.assert_close(found, share[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize(("uniform", "code"), [(0.0, 1), (1 - 2**-53, 2)])
def test_choose_never_draws_a_code_of_probability_zero(uniform, code):
    share = torch.tensor([[0.0, 0.7, 0.3, 0.0]] * 3, dtype=torch.float64) / 3
    assert (
        choose_codes(share, torch.full((3,), uniform, dtype=torch.float64)).tolist() == [code] * 3
    )


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
        ({"top_p": 0}, "top_p=0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"guidance": 2.0}, "null_label_rate"),
        ({"context": torch.zeros(1, 3, 2, 2)}, "context_channels=0"),
        ({"known": torch.full((1, 2, 2), 5)}, "0 to 4"),
        ({"known": torch.zeros(1, 2, 3, dtype=torch.long)}, r"shape \(1, 2, 3\)"),
        ({"known": torch.tensor([[[0, -1], [1, -1]]])}, "raster order"),
        ({"labels": torch.tensor([0])}, "takes no labels"),
    ],
)
def test_bad_sampling_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        sample(make(2, 2), (1, 2, 2), **options)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ([[[[0, 1], [-1, 2]]]], "raster order"),
        ([[[[-1, 1], [-1, -1]]]], "raster order"),
        ([[[0, -1]]], r"shape \(1, 1, 2\) must have shape \(1, 1, 2, 2\)"),
    ],
)
def test_known_codes_come_first_also_within_a_position(known, message):
    with pytest.raises(InputError, match=message):
        sample(make(1, 2, codes_per_position=2), (1, 1, 2), known=torch.tensor(known))


def test_a_conditional_prior_needs_labels():
    with pytest.raises(InputError, match="needs a label"):
        sample(make(2, 2, num_classes=2), (1, 2, 2))


@pytest.mark.parametrize("kernel", [1, 4])
def test_even_kernels_are_refused(kernel):
    with pytest.raises(InputError, match=f"kernel={kernel}"):
        PixelCNN(4, 3, 3, kernel=kernel)
