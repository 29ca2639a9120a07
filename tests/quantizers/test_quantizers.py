"""Quantizers against brute force, closed forms and hand-computed examples."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vqvae_lightning.errors import InputError
from vqvae_lightning.quantizers import EMAQuantizer, LossQuantizer
from vqvae_lightning.quantizers.lookup import find_nearest_codes
from vqvae_lightning.quantizers.rows import kmeans

BOTH = pytest.mark.parametrize("make", [EMAQuantizer, LossQuantizer])


def ready(make, num_codes=7, code_dim=3, **options):
    """Build a quantizer in training mode whose codebook has the scale of the data."""
    quantizer = make(
        num_codes=num_codes,
        code_dim=code_dim,
        **{"init": "uniform", "warmup_steps": 0, "revive_below": 0, **options},
    )
    rows = torch.randn(num_codes, code_dim)
    with torch.no_grad():
        quantizer.set_rows(rows, torch.ones(num_codes, dtype=torch.bool), torch.ones(()))
    return quantizer.train()


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    num_codes=st.integers(2, 40),
    code_dim=st.integers(1, 9),
    channels_last=st.booleans(),
)
def test_codes_are_the_nearest_codebook_rows(
    batch, height, width, num_codes, code_dim, channels_last
):
    quantizer = ready(EMAQuantizer, num_codes, code_dim)
    z = torch.randn(batch, code_dim, height, width)
    if channels_last:
        z = z.to(memory_format=torch.channels_last)
    rows = z.movedim(1, -1).reshape(-1, code_dim).double()
    distances = torch.cdist(rows, quantizer.codebook.double())
    chosen = distances.gather(1, quantizer.encode(z).view(-1, 1))[:, 0]
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=1e-5, atol=1e-5)


def test_look_up_in_several_blocks_equals_one(monkeypatch):
    vectors, codebook = torch.randn(1000, 5), torch.randn(600, 5)
    whole = find_nearest_codes(vectors, codebook)
    monkeypatch.setattr("vqvae_lightning.quantizers.lookup.COLUMNS", 128)
    monkeypatch.setattr("vqvae_lightning.quantizers.lookup.SCORES", 128 * 7)
    assert torch.equal(find_nearest_codes(vectors, codebook), whole)


def test_ties_go_to_the_lowest_code():
    codebook = torch.tensor([[9.0, 9.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert find_nearest_codes(torch.tensor([[0.5, 0.0], [2.0, 0.0]]), codebook).tolist() == [1, 1]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoder_input_equals_codebook_rows_bit_for_bit(make, dtype):
    # In bfloat16, z + (q - z) equals q in only two thirds of the elements.
    quantizer = ready(make)
    before = quantizer.codebook.detach().clone()
    output = quantizer(torch.randn(2, 3, 4, 5).to(dtype))
    assert torch.equal(output.vectors, F.embedding(output.codes, before).movedim(-1, 1))
    assert torch.equal(output.vectors, quantizer.decode(output.codes))


def test_codes_under_autocast_are_those_of_float32():
    # In bfloat16, 1 to 3 % of the codes change.
    quantizer = ready(EMAQuantizer, num_codes=512, code_dim=64)
    z = torch.randn(4, 64, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer.encode(z)
    assert torch.equal(inside, quantizer.encode(z))


@BOTH
def test_straight_through_gradient_is_the_identity(make):
    quantizer = ready(make)
    z = torch.randn(2, 3, 4, 5, requires_grad=True)
    direction = torch.randn(2, 3, 4, 5)
    (quantizer(z).vectors * direction).sum().backward()
    assert torch.equal(z.grad, direction)


def test_each_loss_term_moves_only_its_own_side():
    # Several public implementations put beta on the codebook term.
    quantizer = ready(LossQuantizer)
    z = torch.randn(2, 3, 4, 5, requires_grad=True)
    terms = quantizer(z).terms
    by_codebook = torch.autograd.grad(
        terms["codebook"], [z, quantizer.codebook], retain_graph=True, allow_unused=True
    )
    assert by_codebook[0] is None
    assert by_codebook[1].abs().sum() > 0
    by_commitment = torch.autograd.grad(
        terms["commitment"], [z, quantizer.codebook], allow_unused=True
    )
    assert by_commitment[0].abs().sum() > 0
    assert by_commitment[1] is None


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_losses_equal_their_formula_in_training_and_evaluation(make, training):
    quantizer = ready(make, commitment=0.7).train(training)
    z = torch.randn(2, 3, 4, 5)
    output = quantizer(z)
    expected = (z - F.embedding(output.codes, quantizer.codebook).movedim(-1, 1)).square().mean()
    torch.testing.assert_close(output.terms["commitment"], expected)
    total = 0.7 * expected + (expected if make is LossQuantizer else 0)
    torch.testing.assert_close(output.loss, total)


@BOTH
def test_losses_do_not_depend_on_the_batch_size(make):
    quantizer = ready(make).eval()
    z = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(quantizer(z).loss, quantizer(torch.cat([z, z, z])).loss)


def test_ema_update_equals_a_hand_computed_example():
    quantizer = ready(EMAQuantizer, num_codes=3, code_dim=1, decay=0.9, epsilon=0.1)
    quantizer.set_rows(
        torch.tensor([[0.0], [1.0], [5.0]]), torch.ones(3, dtype=torch.bool), torch.ones(())
    )
    quantizer(torch.tensor([0.2, -0.4, 1.3, 0.4]).view(1, 1, 2, 2))  # codes 0, 0, 1, 0
    quantizer.update(0.0)
    # Counts are 0.9 * 1 + 0.1 * n, sums 0.9 * row + 0.1 * sum of vectors. Counts are smoothed in
    # the division only.
    counts = [0.9 + 0.3, 0.9 + 0.1, 0.9]
    sums = [0.1 * (0.2 - 0.4 + 0.4), 0.9 + 0.13, 0.9 * 5]
    total = sum(counts)
    rows = [s / ((c + 0.1) / (total + 0.3) * total) for s, c in zip(sums, counts, strict=True)]
    rows[2] = 5  # has no hits
    torch.testing.assert_close(quantizer.counts, torch.tensor(counts))
    torch.testing.assert_close(quantizer.codebook, torch.tensor(rows)[:, None])


def test_look_up_uses_the_codebook_before_the_update():
    quantizer = ready(EMAQuantizer, decay=0.0)
    before = quantizer.codebook.clone()
    output = quantizer(torch.randn(2, 3, 4, 5))
    quantizer.update(0.0)
    assert torch.equal(output.vectors, F.embedding(output.codes, before).movedim(-1, 1))
    assert not torch.equal(quantizer.codebook, before)


def test_codes_without_hits_stay_where_they_are():
    # With counts that start at zero, unused rows reach 1e5 (rosinality, zalando, MONAI).
    quantizer = ready(EMAQuantizer)
    before = quantizer.codebook.clone()
    z = before[2].view(1, 3, 1, 1).expand(4, 3, 2, 2)
    others = [0, 1, 3, 4, 5, 6]
    for _ in range(3000):  # their counts decay to about zero (decay 0.99)
        quantizer(z)
        quantizer.update(0.0)
    assert torch.equal(quantizer.codebook[others], before[others])
    quantizer(before[3].view(1, 3, 1, 1))
    quantizer.update(0.0)
    torch.testing.assert_close(quantizer.codebook[3], before[3], rtol=1e-3, atol=1e-3)


def test_counts_follow_the_closed_form_without_smoothing_written_back():
    quantizer = ready(EMAQuantizer, decay=0.9, epsilon=0.5)
    for _ in range(30):
        quantizer(torch.randn(2, 3, 4, 5))
        quantizer.update(0.0)
    expected = 7 * 0.9**30 + 40 * (1 - 0.9**30)
    torch.testing.assert_close(quantizer.counts.sum(), torch.tensor(expected))


def test_accumulated_batches_count_as_one_step():
    one, two = ready(EMAQuantizer), None
    two = copy.deepcopy(one)
    z = torch.randn(4, 3, 4, 5)
    one(z)
    one.update(0.0)
    two(z[:2])
    two(z[2:])
    two.update(0.0)
    torch.testing.assert_close(one.codebook, two.codebook)
    assert one.steps == two.steps == 1


@BOTH
def test_only_training_calls_change_state(make):
    # MONAI's quantize() calls the training forward, so that encoding in train mode learns.
    quantizer = ready(make)
    before = copy.deepcopy(quantizer.state_dict())
    z = torch.randn(2, 3, 4, 5)
    quantizer.encode(z)
    quantizer.decode(quantizer.encode(z))
    quantizer.eval()(z)
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name
    # Nothing is kept for the next update.
    assert quantizer.update(0.0) == {}
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert quantizer.new_counts.sum() == 0


def test_ema_state_is_buffers_only():
    # If the state is an nn.Parameter (zalando, swasun), weight decay and the optimizer move it.
    quantizer = EMAQuantizer(7, 3)
    assert not list(quantizer.parameters())
    assert {"codebook", "sums", "counts"} <= set(quantizer.state_dict())
    torch.testing.assert_close(quantizer.sums / quantizer.counts[:, None], quantizer.codebook)


@BOTH
@pytest.mark.parametrize("init", ["kmeans", "data"])
def test_first_rows_come_from_training_batches_only(make, init):
    # A look-up in evaluation (Lightning's sanity check) must not initialise the codebook.
    quantizer = make(7, 3, init=init, warmup_steps=0)
    z = 40 + torch.randn(8, 3, 4, 5)
    before = quantizer.codebook.clone()
    quantizer.eval()(z)
    assert not quantizer.initialised
    assert torch.equal(quantizer.codebook, before)
    quantizer.update(0.5)  # the optimizer of another network stepped
    assert not quantizer.initialised
    quantizer.train()(z)
    quantizer.update(0.0)
    assert quantizer.initialised
    assert (quantizer.codebook > 30).all()


def test_kmeans_finds_separate_clusters():
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    vectors = (centres[:, None] + 0.1 * torch.randn(4, 50, 2)).reshape(-1, 2)
    rows = torch.cat([vectors, vectors + 1e-3])
    best = min(
        (
            torch.cdist(rows, kmeans(rows, 4, torch.Generator().manual_seed(seed))).min(1).values
        ).mean()
        for seed in range(5)
    )
    assert best < 0.2


@BOTH
def test_warm_up_passes_vectors_on_in_training_and_quantizes_in_evaluation(make):
    quantizer = make(7, 3, warmup_steps=2).train()
    z = torch.randn(8, 3, 4, 5)
    for _ in range(2):
        output = quantizer(z)
        assert output.codes is None
        assert torch.equal(output.vectors, z)
        assert quantizer.eval()(z).codes is not None
        quantizer.train()
        quantizer.update(0.0)
    assert quantizer(z).codes is not None


@BOTH
def test_dead_codes_are_revived_on_encoder_vectors_and_stay(make):
    # In encodec and audiocraft, the same forward pass overwrites the revived rows.
    quantizer = ready(make, num_codes=7, revive_below=0.1, revive_every=1, decay=0.5)
    far = torch.full((7, 3), 100.0) + torch.arange(7)[:, None]
    where = torch.arange(7) > 1
    with torch.no_grad():
        quantizer.set_rows(far, where, torch.ones(()))
    z = torch.randn(8, 3, 4, 5)
    quantizer(z)
    assert quantizer.update(0.0)["revived_codes"] == 5
    rows = z.movedim(1, -1).reshape(-1, 3)
    revived = quantizer.codebook.detach()[2:].clone()
    assert (revived[:, None] - rows).norm(dim=2).min(1).values.max() < 1e-5
    quantizer(z)
    quantizer.update(0.0)
    assert ((quantizer.codebook[2:] - revived).norm(dim=1) < 3).all()


@BOTH
def test_revival_finds_the_same_codes_in_batches_of_any_size(make):
    first = ready(make, num_codes=20, revive_below=0.5, revive_every=3, decay=0.5)
    steps = torch.randn(3, 1, 3, 5, 5)
    found = []
    for times in (1, 50):
        quantizer = copy.deepcopy(first)
        counts = torch.full((20,), float(times))  # as many hits as a code has on average
        with torch.no_grad():
            quantizer.set_rows(quantizer.codebook, counts > 0, counts[0])
        for z in steps:
            hits = quantizer.encode(z).flatten().bincount(minlength=20) * times
            counts = 0.5 * counts + 0.5 * hits
            quantizer(torch.cat([z] * times))
            revived = quantizer.update(0.0)
        dead = counts < 0.5 * counts.mean()
        assert revived == {"revived_codes": dead.sum()}
        vectors = steps[-1].movedim(1, -1).reshape(-1, 3)
        distances = (quantizer.codebook.detach()[:, None] - vectors).norm(dim=2)
        near = distances.amin(1) < 1e-5
        assert torch.equal(near, dead), "only the dead codes are moved onto vectors"
        found.append(dead)
    assert torch.equal(*found)
    assert 1 < found[0].sum() < 19


def test_revival_stops_for_the_last_share_of_training():
    quantizer = ready(EMAQuantizer, revive_below=1.0, revive_every=1, revive_until=0.8)
    quantizer(torch.randn(2, 3, 4, 5))
    assert quantizer.update(0.79)["revived_codes"] > 0
    quantizer(torch.randn(2, 3, 4, 5))
    assert quantizer.update(0.8)["revived_codes"] == 0


@BOTH
@pytest.mark.parametrize("warmup_steps", [1, 5])
def test_state_survives_a_checkpoint(make, warmup_steps, tmp_path):
    # During the warm-up, the vectors gathered for the first codebook are state too.
    quantizer = make(7, 3, warmup_steps=warmup_steps).train()
    for _ in range(3):
        quantizer(torch.randn(4, 3, 4, 5))
        quantizer.update(0.0)
    torch.save(quantizer.state_dict(), tmp_path / "q.pt")
    other = make(7, 3, warmup_steps=warmup_steps)
    other.load_state_dict(torch.load(tmp_path / "q.pt", weights_only=True))
    assert (other.steps, other.initialised) == (3, warmup_steps == 1)
    for _ in range(3):
        z = torch.randn(4, 3, 4, 5)
        for one in (quantizer, other):
            one.train()(z)
            one.update(0.0)
    assert quantizer.initialised
    assert torch.equal(quantizer.codebook, other.codebook)


def test_warm_up_is_at_most_a_tenth_of_the_training():
    quantizer = EMAQuantizer(7, 3, warmup_steps=200).train()
    for step in range(1, 5):
        quantizer(torch.randn(4, 3, 4, 5))
        quantizer.update(step / 30)
        assert quantizer.initialised == (step >= 3)


@pytest.mark.parametrize("init", ["kmeans", "data"])
def test_more_codes_than_vectors_are_accepted(init):
    quantizer = EMAQuantizer(50, 3, init=init, warmup_steps=0, revive_every=1).train()
    for _ in range(3):
        quantizer(torch.randn(2, 3, 2, 2))
        quantizer.update(0.0)
    assert torch.isfinite(quantizer.codebook).all()


@pytest.mark.parametrize("several", [{}, {"codes_per_position": 3, "arrangement": "product"}])
def test_dead_codes_get_different_vectors_as_long_as_there_are_enough(several):
    quantizer = EMAQuantizer(50, 3, init="data", warmup_steps=0, revive_every=1, **several).train()
    quantizer(torch.randn(2, 3, 4, 5))
    quantizer.update(0.0)
    # All but every other code are dead: 25, for which the next batch has 40 vectors.
    alive = torch.arange(50) % 2 == 0
    quantizer.counts.copy_(torch.where(alive, 1e6, 0.0).expand_as(quantizer.counts))
    quantizer(100 + torch.randn(2, 3, 4, 5))
    assert quantizer.update(0.0)["revived_codes"] == 25 * quantizer.codes_per_position
    for rows in quantizer.codebook.view(quantizer.codes_per_position, 50, -1):
        fresh = rows[~alive]
        assert len(fresh.unique(dim=0)) == 25
        assert (fresh > 50).all()


def test_weight_decay_cannot_move_the_averages_and_no_buffer_is_replaced():
    quantizer = ready(EMAQuantizer)
    before = {name: id(buffer) for name, buffer in quantizer.named_buffers()}
    encoder = torch.nn.Conv2d(1, 3, 1)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *quantizer.parameters()], weight_decay=9)
    output = quantizer(encoder(torch.randn(2, 1, 4, 5)))
    rows = quantizer.codebook.clone()
    (output.vectors.sum() + output.loss).backward()
    optimizer.step()
    assert torch.equal(quantizer.codebook, rows)
    quantizer.update(0.0)
    assert {name: id(buffer) for name, buffer in quantizer.named_buffers()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 1}, "num_codes=1"),
        ({"code_dim": 0}, "code_dim=0"),
        ({"commitment": -1.0}, "commitment=-1.0"),
        ({"decay": 1.0}, "decay=1"),
        ({"init": "zeros"}, "kmeans, data, uniform"),
        ({"revive_every": 0}, "revive_every=0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        EMAQuantizer(**{"num_codes": 7, "code_dim": 3, **options})


def test_wrong_channels_are_named():
    with pytest.raises(InputError, match="code_dim"):
        EMAQuantizer(7, 3)(torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize("num_codes", [2, 63, 65, 4097, 262_144])
@pytest.mark.parametrize("code_dim", [1, 5])
def test_codebooks_of_any_size_send_ties_to_the_lowest_code(num_codes, code_dim):
    # Integers with a mean of 0: float32 distances are exact, so ties are exact.
    half = torch.randint(-3, 4, (num_codes // 2, code_dim)).float()
    codebook = torch.cat([half, -half, torch.zeros(num_codes % 2, code_dim)])
    vectors = torch.randint(-3, 4, (40, code_dim)).float()
    distances = (vectors[:, None].double() - codebook.double()).square().sum(2)
    first = (distances == distances.min(1, keepdim=True).values).int().argmax(1)
    assert torch.equal(find_nearest_codes(vectors, codebook), first)


@pytest.mark.parametrize("times", [2, 100, 1000])
def test_the_first_of_equal_rows_is_chosen(times):
    rows = torch.randn(70, 64)
    codes = find_nearest_codes(torch.randn(3000, 64), rows.repeat(times, 1))
    assert (codes < 70).all()


def test_codes_far_from_the_origin_are_still_the_nearest():
    # |z|^2 - 2 z.e + |e|^2 cancels there, so that the textbook form gets many of them wrong.
    codebook = 1000 + torch.randn(200, 16)
    vectors = 1000 + torch.randn(500, 16)
    exact = torch.cdist(
        vectors.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert (find_nearest_codes(vectors, codebook) == exact.argmin(1)).float().mean() > 0.99
    formula = vectors.square().sum(1, True) - 2 * vectors @ codebook.t() + codebook.square().sum(1)
    assert (formula.argmin(1) == exact.argmin(1)).float().mean() < 0.9


def test_non_finite_vectors_get_codes_of_the_codebook():
    vectors = torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, torch.inf]])
    codes = find_nearest_codes(vectors, torch.randn(70, 2))
    assert ((codes >= 0) & (codes < 70)).all()


@BOTH
@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 4, 5), (2, 3, 4, 5)])
def test_any_number_of_dimensions(make, shape):
    quantizer = ready(make)
    z = torch.randn(shape[0], 3, *shape[1:])
    output = quantizer(z)
    assert output.codes.shape == shape
    assert output.vectors.shape == z.shape
    assert torch.equal(quantizer.decode(output.codes), output.vectors)


@settings(max_examples=60, deadline=None)
@given(
    make=st.sampled_from([EMAQuantizer, LossQuantizer]),
    size=st.tuples(*[st.integers(1, 4)] * 3),
    num_codes=st.integers(2, 130),
    code_dim=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["contiguous", "channels_last", "sliced", "flipped"]),
    estimator=st.sampled_from(["straight_through", "rotation"]),
    normalize=st.booleans(),
)
def test_decoder_input_equals_decoded_codes(
    make, size, num_codes, code_dim, dtype, layout, estimator, normalize
):
    quantizer = ready(make, num_codes, code_dim, estimator=estimator, normalize=normalize)
    batch, height, width = size
    z = torch.randn(batch, code_dim, height, 2 * width).to(dtype)
    if layout == "channels_last":
        z = z.to(memory_format=torch.channels_last)
    z = z.flip(3) if layout == "flipped" else z
    z = z[..., ::2] if layout == "sliced" else z
    z = z.requires_grad_()
    output = quantizer(z)
    assert torch.equal(output.vectors, quantizer.decode(output.codes))
    assert torch.equal(output.codes, quantizer.encode(z))
    rows = z.detach().double().movedim(1, -1)
    table = quantizer.codebook.detach().double()
    if normalize:
        rows, table = F.normalize(rows, dim=-1), F.normalize(table, dim=-1)
    # Squared: the error of |z|^2 - 2 z e + |e|^2 in float32 does not shrink with the distance.
    distances = (rows[..., None, :] - table).square().sum(dim=-1)
    chosen = distances.gather(-1, output.codes[..., None])[..., 0]
    torch.testing.assert_close(chosen, distances.min(-1).values, rtol=1e-5, atol=1e-5)
    output.vectors.sum().backward()
    assert torch.isfinite(z.grad).all()
    if estimator == "straight_through" and not normalize:
        assert (z.grad == 1).all()


@BOTH
def test_the_latent_power_is_the_mean_square_of_the_encoders_output(make):
    quantizer = ready(make).train()
    z = torch.randn(4, 3, 5, 6)
    terms = quantizer(z).terms
    assert terms["latent_power"].item() == pytest.approx(np.mean(z.numpy() ** 2), rel=1e-5)
    assert "latent_power" not in quantizer.weights
    assert not terms["latent_power"].requires_grad


@BOTH
def test_rotation_gradient_matches_the_paper(make):
    quantizer = ready(make, estimator="rotation")
    z = torch.randn(2, 3, 4, 5, requires_grad=True)
    output = quantizer(z)
    direction = torch.randn(2, 3, 4, 5)
    (output.vectors * direction).sum().backward()
    # Equation 3 of arXiv:2410.06424 by autograd in float64, with one matrix per vector.
    rows = z.detach().double().movedim(1, -1).reshape(-1, 3).requires_grad_()
    target = output.vectors.detach().double().movedim(1, -1).reshape(-1, 3)
    source_unit, target_unit = F.normalize(rows.detach(), dim=1), F.normalize(target, dim=1)
    middle = F.normalize(source_unit + target_unit, dim=1)
    rotation = (
        torch.eye(3, dtype=torch.float64)
        - 2 * middle[:, :, None] * middle[:, None]
        + 2 * target_unit[:, :, None] * source_unit[:, None]
    )
    scale = target.norm(dim=1) / rows.detach().norm(dim=1)
    turned = scale[:, None] * torch.einsum("nij,nj->ni", rotation, rows)
    torch.testing.assert_close(turned.detach(), target, rtol=1e-4, atol=1e-5)
    (turned * direction.movedim(1, -1).reshape(-1, 3)).sum().backward()
    torch.testing.assert_close(
        z.grad.movedim(1, -1).reshape(-1, 3).double(), rows.grad, rtol=1e-4, atol=1e-5
    )


@BOTH
def test_unit_length_codes_are_those_at_the_smallest_angle(make):
    quantizer = ready(make, num_codes=40, normalize=True)
    z = 5 * torch.randn(2, 3, 4, 5)
    output = quantizer(z)
    angles = F.cosine_similarity(z.movedim(1, -1)[..., None, :], quantizer.codebook, dim=-1)
    assert torch.equal(output.codes, angles.argmax(-1))
    quantizer.update(0.0)
    vectors = quantizer(z).vectors
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2, 4, 5))
    # The length of z has no effect.
    torch.testing.assert_close(quantizer(3 * z).loss, quantizer(z).loss)


@BOTH
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"estimator": "rotation", "normalize": True}])
def test_the_whole_network_compiles_as_one_graph(make, training, options):
    from vqvae_lightning.networks.autoencoder import VQVAE

    quantizer = ready(make, code_dim=4, **options)
    net = VQVAE(quantizer, channels=1, hidden=8, residual_hidden=4).train(training)
    reference = copy.deepcopy(net)
    # With fullgraph, a break anywhere in encoder, quantizer or decoder is an error.
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for step in range(3):
        images = torch.randn(2, 1, 8, 8)
        outputs = [module(images) for module in (compiled, reference)]
        for output in outputs:
            (output.reconstruction.square().mean() + output.quantized.loss).backward()
        assert torch.equal(outputs[0].quantized.codes, outputs[1].quantized.codes), step
        torch.testing.assert_close(outputs[0].reconstruction, outputs[1].reconstruction)
        for module in (net, reference):
            module.quantizer.update(0.0)
        torch.testing.assert_close(net.quantizer.codebook, reference.quantizer.codebook)
    for one, other in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_second_forward_in_a_step_does_not_move_the_averages_twice():
    # GAN losses and activation checkpointing call forward twice; the decay counts optimizer steps.
    quantizer = ready(EMAQuantizer, num_codes=2, code_dim=1, decay=0.9, epsilon=0.0)
    rows = torch.tensor([[0.0], [10.0]])
    quantizer.set_rows(rows, torch.ones(2, dtype=torch.bool), torch.tensor(4.0))
    z = torch.tensor([1.0, 1.0, 9.0, 9.0]).view(4, 1)
    quantizer(z)
    quantizer(z)
    quantizer.update(0.0)
    assert quantizer.steps == 1
    # Counts are 0.9 * 4 + 0.1 * 4 each, sums 0.1 * 4 * 1 and 0.9 * 40 + 0.1 * 36.
    torch.testing.assert_close(quantizer.counts, torch.tensor([4.0, 4.0]))
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[0.1], [9.9]]))


def test_statistics_of_a_step_are_not_buffers():
    # DistributedDataParallel overwrites the buffers of all ranks with rank 0's.
    quantizer = ready(EMAQuantizer)
    held = {id(tensor) for tensor in [*quantizer.buffers(), *quantizer.parameters()]}
    assert not held & {id(quantizer.new_counts), id(quantizer.new_sums)}
    moved = quantizer.to(torch.float64)
    assert moved.new_counts.dtype == moved.new_sums.dtype == torch.float64
    output = moved(torch.randn(2, 3, 4, 5, dtype=torch.float64))
    moved.update(0.0)
    assert output.vectors.dtype == torch.float64


def test_a_codebook_in_half_precision_is_refused():
    # In bfloat16, an average with a decay of 0.99 does not change.
    with pytest.raises(InputError, match=r"trainer\.precision"):
        ready(EMAQuantizer).to(torch.bfloat16)(torch.randn(2, 3, 4, 5))


@BOTH
def test_warm_up_gives_the_codebook_a_gradient_of_zero(make):
    # Without a gradient, DistributedDataParallel stops with an error.
    quantizer = make(7, 3, warmup_steps=2).train()
    loss = quantizer(torch.randn(2, 3, 4, 5)).loss
    assert loss == 0
    for parameter in quantizer.parameters():
        (gradient,) = torch.autograd.grad(loss, [parameter])
        assert (gradient == 0).all()
