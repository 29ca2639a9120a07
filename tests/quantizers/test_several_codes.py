"""Several codes per position against independent quantizers and textbook loops."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from vqvae_lightning.callbacks.codebook import CodebookDrift
from vqvae_lightning.errors import InputError
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.quantizers import EMAQuantizer, LossQuantizer
from vqvae_lightning.quantizers.lookup import find_nearest_codes
from vqvae_lightning.quantizers.rows import kmeans

BOTH = pytest.mark.parametrize("make", [EMAQuantizer, LossQuantizer])
ARRANGED = pytest.mark.parametrize("arrangement", ["product", "residual"])
Q, K, D = 3, 10, 6


def several(make, arrangement, **options):
    """Build a quantizer with three codes per position of six channels."""
    options = {"init": "uniform", "warmup_steps": 0, "revive_below": 0, **options}
    return make(K, D, codes_per_position=Q, arrangement=arrangement, **options).train()


def ready(make, arrangement, **options):
    """Build such a quantizer whose rows have the scale of the data."""
    quantizer = several(make, arrangement, **options)
    with torch.no_grad():
        rows = torch.randn(quantizer.codebook.shape)
        quantizer.set_rows(rows, torch.ones(Q, K, dtype=torch.bool), torch.ones(()))
    return quantizer


def step(quantizer, z, optimizer=None):
    """Make a training step, and return the output, the gradient of `z` and what was logged."""
    z = z.clone().requires_grad_()
    output = quantizer(z)
    direction = torch.arange(z.numel()).view(z.shape).sin()
    ((output.vectors * direction).sum() + output.loss).backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return output, z.grad, quantizer.update(0.0)


def make_optimizers(quantizers, rate):
    """Make an optimizer for each quantizer that learns by gradient, None for the others."""
    rows = [[*quantizer.parameters()] for quantizer in quantizers]
    return [torch.optim.SGD(own, rate) if own else None for own in rows]


def find_nearest(vectors, rows):
    """Return the distance of each vector to its nearest row, and the number of that row."""
    return torch.cdist(vectors.double(), rows.double()).min(1)


@BOTH
@pytest.mark.parametrize("init", ["kmeans", "data"])
@pytest.mark.parametrize(
    "options", [{}, {"estimator": "rotation", "normalize": True}], ids=["plain", "rotated"]
)
def test_product_codes_are_independent_quantizers_of_groups_of_channels(make, init, options):
    shared = {"init": init, "warmup_steps": 2, "revive_below": 0.8, "revive_every": 2, **options}
    shared |= {"decay": 0.7}
    together = several(make, "product", **shared)
    alone = [make(K, D // Q, **shared).train() for _ in range(Q)]
    # The mean over all elements gives each of Q codebooks a Q-th of the gradient.
    (optimizer,) = make_optimizers([together], 0.5 * Q)
    optimizers = make_optimizers(alone, 0.5)
    revived = 0.0
    for number in range(9):
        z = torch.randn(6, D, 4, 5)
        output, gradient, logged = step(together, z, optimizer)
        each = []
        directions = torch.arange(z.numel()).view(z.shape).sin().chunk(Q, 1)
        for quantizer, part, direction, own in zip(
            alone, z.chunk(Q, 1), directions, optimizers, strict=True
        ):
            part = part.clone().requires_grad_()
            made = quantizer(part)
            ((made.vectors * direction).sum() + made.loss / Q).backward()
            if own is not None:
                for parameter in quantizer.parameters():
                    parameter.grad *= Q
                own.step()
                own.zero_grad()
            each.append((made, part.grad, quantizer.update(0.0)))
        torch.testing.assert_close(output.vectors, torch.cat([m.vectors for m, _, _ in each], 1))
        torch.testing.assert_close(gradient, torch.cat([grad for _, grad, _ in each], 1))
        if together.initialised:
            for name in ("codebook", "counts"):
                own = torch.stack([getattr(quantizer, name) for quantizer in alone])
                torch.testing.assert_close(getattr(together, name), own)
        assert (output.codes is None) == (number < 2)
        if number < 2:
            continue
        assert torch.equal(output.codes, torch.stack([made.codes for made, _, _ in each], -1))
        for name, value in output.terms.items():
            mean = torch.stack([made.terms[name] for made, _, _ in each]).mean()
            torch.testing.assert_close(value, mean)
        total = sum(logs.get("revived_codes", 0.0) for _, _, logs in each)
        assert logged.get("revived_codes", 0.0) == total
        revived += total
    assert revived > 3


def quantize_stage_by_stage(rows, table):
    """Quantize `rows` (N, D) by the textbook, and return residuals, codes and chosen rows."""
    residuals, codes, chosen = [rows], [], []
    for book in table:
        codes.append(find_nearest(residuals[-1], book).indices)
        chosen.append(book[codes[-1]])
        residuals.append(residuals[-1] - chosen[-1])
    return torch.stack(residuals[:-1]), torch.stack(codes), torch.stack(chosen)


@BOTH
def test_residual_codes_equal_a_textbook_loop(make):
    quantizer = ready(make, "residual", commitment=0.7)
    z = torch.randn(4, D, 4, 5)
    rows = z.movedim(1, -1).reshape(-1, D).requires_grad_()
    table = quantizer.codebook.detach().clone().requires_grad_()
    _, codes, chosen = quantize_stage_by_stage(rows, table)
    sums = chosen.detach().cumsum(0)
    # Lee et al. 2022, equation 6, divided by the number of stages.
    expected = {"commitment": torch.stack([(rows - s).square().mean() for s in sums]).mean()}
    if make is LossQuantizer:
        before = torch.stack([rows.detach() - (sums - chosen.detach())[q] for q in range(Q)])
        expected["codebook"] = (before - chosen).square().mean()
    loss = 0.7 * expected["commitment"] + expected.get("codebook", 0)
    expected["latent_power"] = rows.detach().square().mean()  # logged, not part of the loss
    direction = torch.arange(z.numel()).view(z.shape).sin()
    ((rows * direction.movedim(1, -1).reshape(-1, D)).sum() + loss).backward()
    held = quantizer.codebook.detach().clone()
    z = z.requires_grad_()
    output = quantizer(z)
    ((output.vectors * direction).sum() + output.loss).backward()
    assert torch.equal(output.codes.view(-1, Q), codes.t())
    torch.testing.assert_close(output.vectors.movedim(1, -1).reshape(-1, D), chosen.detach().sum(0))
    assert output.terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(output.terms[name], value)
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(z.grad.movedim(1, -1).reshape(-1, D), rows.grad)
    if make is LossQuantizer:
        torch.testing.assert_close(quantizer.codebook.grad, table.grad)
    assert torch.equal(quantizer.codebook, held), "only `update` and the optimizer move rows"


def test_residual_averages_follow_the_residuals_of_each_stage():
    quantizer = ready(EMAQuantizer, "residual", decay=0.8, epsilon=0.0)
    table = quantizer.codebook.clone()
    z = torch.randn(4, D, 4, 5)
    residuals, codes, _ = quantize_stage_by_stage(z.movedim(1, -1).reshape(-1, D), table)
    quantizer(z)
    quantizer.update(0.0)
    for stage, k in itertools.product(range(Q), range(K)):
        hits = residuals[stage][codes[stage] == k]
        count = 0.8 + 0.2 * len(hits)
        row = (0.8 * table[stage, k] + 0.2 * hits.sum(0)) / count
        torch.testing.assert_close(quantizer.counts[stage, k], torch.tensor(count))
        torch.testing.assert_close(quantizer.codebook[stage, k], row)


@BOTH
@pytest.mark.parametrize("init", ["kmeans", "data"])
def test_first_residual_rows_come_from_the_residuals_of_the_earlier_stages(make, init, monkeypatch):
    clustered = []

    def watch(vectors, *options):
        clustered.append((vectors, kmeans(vectors, *options)))
        return clustered[-1][1]

    monkeypatch.setattr("vqvae_lightning.quantizers.codebook.kmeans", watch)
    quantizer = several(make, "residual", init=init, warmup_steps=1)
    z = torch.randn(9, D, 4, 5)
    quantizer(z)
    quantizer.update(0.0)
    vectors = z.movedim(1, -1).reshape(-1, D)
    for stage, rows in enumerate(quantizer.codebook.detach()):
        residuals = vectors
        for book in quantizer.codebook.detach()[:stage]:
            residuals = residuals - book[find_nearest(residuals, book).indices]
        if init == "data":
            assert (find_nearest(rows, residuals).values < 1e-3).all()
            assert rows.norm(dim=1).min() > 1e-3, "a vector that is a row leaves no residual"
        else:
            seen, made = clustered[stage]
            assert torch.equal(rows, made)
            assert len(seen) == 16 * K
            assert (find_nearest(seen, residuals).values < 1e-3).all()
    error = (quantizer.eval()(z).vectors - z).square().mean()
    first = quantizer.codebook.detach()[0]
    alone = (first[find_nearest(vectors, first).indices] - vectors).square().mean()
    assert error < alone


@BOTH
@ARRANGED
def test_each_codebook_revives_its_own_dead_codes(make, arrangement):
    quantizer = ready(make, arrangement, revive_below=0.1, revive_every=1, decay=0.5)
    dead = torch.zeros(Q, K, dtype=torch.bool)
    dead[0, 3] = dead[2, 5] = dead[2, 6] = True
    with torch.no_grad():
        quantizer.set_rows(torch.full_like(quantizer.codebook, 1e3), dead, torch.zeros(()))
        # Codebook 1 has few hits, but all its codes have equally many.
        quantizer.counts[1] = 1e-6
    before = quantizer.codebook.detach().clone()
    counts = quantizer.counts.clone()
    z = torch.randn(8, D, 4, 5)
    codes = quantizer(z).codes.view(-1, Q)
    logged = quantizer.update(0.0)
    hits = torch.stack([codes[:, q].bincount(minlength=K) for q in range(Q)])
    expected = torch.stack([own < 0.1 * own.mean() for own in 0.5 * counts + 0.5 * hits])
    assert expected[dead].all()
    assert not expected.all(1).any()
    assert logged == {"revived_codes": expected.sum()}
    vectors = z.movedim(1, -1).reshape(-1, D)
    if arrangement == "product":
        parts = vectors.view(-1, Q, D // Q).movedim(1, 0)
    else:
        # With averages, the rows move before the vectors are drawn.
        learnt = torch.where(expected[..., None], before, quantizer.codebook.detach())
        parts, _, _ = quantize_stage_by_stage(vectors, learnt)
    for q in range(Q):
        distance = find_nearest(quantizer.codebook.detach()[q][expected[q]], parts[q]).values
        assert (distance < 1e-3).all()
    assert quantizer.codebook.detach()[dead].norm(dim=1).max() < 100


@BOTH
@ARRANGED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"estimator": "rotation", "normalize": True}])
def test_decoder_input_equals_decoded_codes(make, arrangement, dtype, options):
    quantizer = ready(make, arrangement, **options)
    for shape in ((2, D, 4, 5), (6, D), (2, D, 3)):
        z = torch.randn(shape).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            output = quantizer(z)
            codes = quantizer.encode(z)
        assert output.codes.shape == (shape[0], *shape[2:], Q)
        assert output.vectors.dtype == torch.float32
        assert torch.equal(output.codes, codes)
        assert torch.equal(quantizer.decode(codes), output.vectors)
        wide = quantizer.eval()(z.float())
        assert torch.equal(wide.codes, codes)
        quantizer.train()


@ARRANGED
def test_unit_length_is_that_of_the_groups_or_of_the_whole_vector(arrangement):
    quantizer = ready(EMAQuantizer, arrangement, normalize=True)
    z = torch.randn(2, D, 4, 5)
    output = quantizer(z)
    assert torch.equal(output.codes, quantizer(3 * z).codes)
    if arrangement == "product":
        lengths = output.vectors.unflatten(1, (Q, D // Q)).norm(dim=2)
        torch.testing.assert_close(lengths, torch.ones(2, Q, 4, 5))
    else:
        rows = F.normalize(z, dim=1).movedim(1, -1).reshape(-1, D)
        _, codes, _ = quantize_stage_by_stage(rows, quantizer.codebook)
        assert torch.equal(output.codes.view(-1, Q), codes.t())


@BOTH
@ARRANGED
@pytest.mark.parametrize("warmup_steps", [1, 5])
def test_state_survives_a_checkpoint(make, arrangement, warmup_steps, tmp_path):
    options = {"init": "data", "warmup_steps": warmup_steps, "revive_below": 0.1}
    quantizer, other = (several(make, arrangement, **options) for _ in range(2))
    for _ in range(3):
        step(quantizer, torch.randn(4, D, 4, 5))
    torch.save(quantizer.state_dict(), tmp_path / "q.pt")
    other.load_state_dict(torch.load(tmp_path / "q.pt", weights_only=True))
    for _ in range(3):
        z = torch.randn(4, D, 4, 5)
        for one in (quantizer, other):
            step(one, z)
    assert quantizer.initialised
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@BOTH
@ARRANGED
def test_the_whole_network_compiles_as_one_graph(make, arrangement):
    quantizer = ready(make, arrangement, estimator="rotation")
    net = VQVAE(quantizer, channels=1, hidden=8, residual_hidden=4).train()
    reference = copy.deepcopy(net)
    torch._dynamo.reset()  # the graphs of other tests count towards the limit of recompilations
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        images = torch.randn(2, 1, 8, 8)
        outputs = [module(images) for module in (compiled, reference)]
        for output in outputs:
            (output.reconstruction.square().mean() + output.quantized.loss).backward()
        assert torch.equal(outputs[0].quantized.codes, outputs[1].quantized.codes)
        torch.testing.assert_close(outputs[0].reconstruction, outputs[1].reconstruction)
        for module in (net, reference):
            module.quantizer.update(0.0)
        torch.testing.assert_close(net.quantizer.codebook, reference.quantizer.codebook)
    for one, own in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, own.grad)


def test_codebooks_searched_together_equal_each_alone(monkeypatch):
    vectors, codebooks = torch.randn(5, 300, 4), torch.randn(5, 700, 4)
    alone = torch.stack(
        [find_nearest_codes(*pair) for pair in zip(vectors, codebooks, strict=True)]
    )
    assert torch.equal(find_nearest_codes(vectors, codebooks), alone)
    monkeypatch.setattr("vqvae_lightning.quantizers.lookup.COLUMNS", 128)
    monkeypatch.setattr("vqvae_lightning.quantizers.lookup.SCORES", 5 * 128 * 7)
    assert torch.equal(find_nearest_codes(vectors, codebooks), alone)


def test_clusters_of_a_batch_equal_those_of_each_set():
    vectors = torch.randn(4, 200, 3)
    together = kmeans(vectors, 20, torch.Generator().manual_seed(5))
    for own, centres in zip(vectors, together, strict=True):
        torch.testing.assert_close(centres, kmeans(own, 20, torch.Generator().manual_seed(5)))


@BOTH
def test_one_code_per_position_keeps_its_shapes(make):
    quantizer = make(K, D, codes_per_position=1, arrangement="residual")
    assert quantizer.codebook.shape == (K, D)
    assert quantizer.counts.shape == (K,)
    assert quantizer.encode(torch.randn(2, D, 4, 5)).shape == (2, 4, 5)


@ARRANGED
def test_drift_is_measured_over_the_rows_of_all_codebooks(arrangement):
    quantizer = ready(EMAQuantizer, arrangement)
    logged = {}
    task = type("Task", (), {"log": lambda self, name, value: logged.update({name: value})})()
    task.net = type("Net", (), {"quantizer": quantizer})()
    trainer = type("Trainer", (), {"sanity_checking": False, "global_step": 0})()
    drift = CodebookDrift()
    drift.on_validation_epoch_end(trainer, task)
    before = quantizer.codebook.flatten(0, 1).clone()
    step(quantizer, torch.randn(2, D, 4, 5))
    drift.on_validation_epoch_end(trainer, task)
    after = quantizer.codebook.flatten(0, 1)
    expected = (after - before).norm(dim=1).mean() / after.norm(dim=1).mean()
    torch.testing.assert_close(logged["val/codebook_drift"], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codes_per_position": 0}, "codes_per_position=0 must be an integer"),
        ({"codes_per_position": 4}, "codes_per_position=4 must divide code_dim=6 .* 1, 2, 3, 6"),
        ({"arrangement": "sum"}, "arrangement=sum must be one of product, residual"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        EMAQuantizer(7, D, **options)
