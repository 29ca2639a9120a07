"""A prior starts with large weights, similar ones for codes whose vectors are similar."""

import itertools

import pytest
import torch
from conftest import TINY_VQVAE

from vqvae_lightning import load
from vqvae_lightning.errors import InputError
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.quantizers import EMAQuantizer, LibraryQuantizer
from vqvae_lightning.tasks import PriorTask
from vqvae_lightning.tasks.prior import compute_loss, decode_each_code

TINY_PRIOR = ("trainer=debug", "model.net.channels=8", "model.net.layers=2", "batch_size=8")


def make(num_codes, codes_per_position=1):
    return PixelCNN(
        num_codes, 4, 4, channels=32, layers=2, codes_per_position=codes_per_position
    ).eval()


def last_layer(net):
    return net.head[-1] if net.codes_per_position == 1 else net.head.out


@pytest.mark.parametrize("each", [1, 3])
def test_angles_between_codes_become_those_of_their_vectors(each):
    tables = 5 + 3 * torch.randn(each, 40, 6)
    net = make(40, each)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    scales = [w.detach().std() for w in (net.embedding.weight, last_layer(net).weight)]
    net.start_from(tables, torch.Generator().manual_seed(0))
    centred = tables - tables.mean(1, keepdim=True)
    for weight, scale in zip((net.embedding.weight, last_layer(net).weight), scales, strict=True):
        weight = weight.detach()
        assert float(weight.std() / scale) == pytest.approx(1, rel=0.15)
        for vectors, rows in zip(centred, weight.flatten(1).view(each, 40, 32), strict=True):
            near = torch.corrcoef(torch.stack([torch.pdist(vectors), torch.pdist(rows)]))[0, 1]
            torch.testing.assert_close(rows.mean(0), torch.zeros(32), rtol=0, atol=1e-5)
            assert near > 0.8  # 32 random directions keep distances to about 1/8
    changed = {n for n, value in net.state_dict().items() if not torch.equal(value, before[n])}
    changed = {name for name in changed if not name.startswith("layers.")}
    assert changed == {"embedding.weight", "head.3.weight" if each == 1 else "head.out.weight"}


def compute_last_vertical(net, codes, labels):
    """Vertical stack after the last layer."""
    vertical = horizontal = net.embed(codes).movedim(-1, 1)
    for layer in net.layers:
        vertical, horizontal, _ = layer(vertical, horizontal, labels, None)
    return vertical


@torch.no_grad()
def test_the_codes_reach_the_last_layer_of_the_vertical_stack():
    codes, labels = torch.randint(40, (64, 7, 7)), torch.zeros(64, dtype=torch.long)
    spread = {}
    for start in ("random", "codebook"):
        torch.manual_seed(0)
        net = PixelCNN(40, 7, 7, num_classes=10, channels=32, layers=8).eval()
        if start == "codebook":
            net.start_from(torch.randn(1, 40, 6), torch.Generator().manual_seed(0))
        # Over the grids: what biases and labels add is the same for all of them.
        spread[start] = float(compute_last_vertical(net, codes, labels).std(0)[:, 2:].mean())
    assert spread["codebook"] > 20 * spread["random"]


def test_a_layer_starts_with_twice_the_usual_weights_and_nothing_else():
    net = PixelCNN(40, 4, 4, num_classes=3, context_channels=2, channels=8, layers=3)
    before = {name: value.clone() for name, value in net.layers.state_dict().items()}
    net.start_from(torch.randn(1, 40, 6), torch.Generator().manual_seed(0))
    after = net.layers.state_dict()
    assert {name.split(".", 1)[1] for name in after} >= {"vertical.bias", "residual.weight"}
    for name, value in after.items():
        if ".context." in name or ".label." in name:
            factor = 1
        else:
            factor = 0 if name.endswith(".bias") else 2
        assert torch.equal(value, factor * before[name]), name


def test_codes_of_equal_vectors_start_equal():
    net = make(6)
    vectors = torch.randn(3, 5)
    net.start_from(torch.cat([vectors, vectors])[None], torch.Generator().manual_seed(0))
    with torch.no_grad():
        last_layer(net).bias.zero_()
        codes = torch.randint(3, (2, 4, 4))
        logits = net(codes)
        torch.testing.assert_close(net(codes + 3), logits)
    torch.testing.assert_close(logits[:, :3], logits[:, 3:])


@pytest.mark.parametrize("arrangement", ["product", "residual"])
def test_each_code_is_decoded_on_its_own(arrangement):
    options = {"init": "uniform", "warmup_steps": 0, "arrangement": arrangement}
    quantizer = EMAQuantizer(5, 6, codes_per_position=3, **options)
    with torch.no_grad():
        quantizer.codebook.normal_()
    tables = decode_each_code(quantizer)
    assert tables.shape == (3, 5, 6)
    width = 2 if arrangement == "product" else 6
    for book, table in enumerate(tables):
        start = book * width if arrangement == "product" else 0
        rows = quantizer.codebook[book]
        differences = table[:, start : start + width] - table[:1, start : start + width]
        torch.testing.assert_close(differences, rows - rows[:1])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FSQ", {"levels": [4, 3]}),
        ("ResidualVQ", {"codebook_size": 12, "num_quantizers": 2, "rotation_trick": False}),
    ],
)
def test_codes_of_the_library_are_decoded_as_the_decoder_gets_them(name, options):
    pytest.importorskip("vector_quantize_pytorch")
    quantizer = LibraryQuantizer(name, 6, options=options).eval()
    z = torch.randn(3, 6, 4, 4)
    output = quantizer(z)  # the first call sets the codebooks of some classes
    tables = decode_each_code(quantizer)
    codes = output.codes if name == "ResidualVQ" else output.codes[..., None]
    chosen = torch.stack([table[codes[..., book]] for book, table in enumerate(tables)]).sum(0)
    others = tables[:, 0].sum(0) * (len(tables) - 1) / len(tables)  # of the codes that were 0
    torch.testing.assert_close(chosen - others, output.vectors.movedim(1, -1), rtol=1e-4, atol=1e-4)


def test_a_config_without_a_start_is_that_of_an_older_run():
    """Older runs started at random, and repeat so."""
    assert PriorTask(make(4), torch.optim.Adam).start == "random"


def test_one_codebook_is_decoded_as_its_rows():
    quantizer = EMAQuantizer(7, 3)
    assert torch.equal(decode_each_code(quantizer)[0], quantizer.codebook)


def test_similar_codes_are_learnt_together():
    """Codes on a circle: a grid repeats one place on it, each time by one of 8 near codes."""
    places = torch.arange(64) / 64 * 2 * torch.pi
    vectors = torch.stack([places.cos(), places.sin()], dim=1)
    centre = torch.randint(64, (256, 1, 1))
    codes = (centre + torch.randint(8, (256, 4, 4))) % 64
    losses = {}
    for start in ("codebook", "random"):
        torch.manual_seed(0)
        net = PixelCNN(64, 4, 4, channels=16, layers=2, dropout=0)
        if start == "codebook":
            net.start_from(vectors[None], torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for batch in itertools.chain.from_iterable([codes[:128].split(32)] * 15):
            loss = compute_loss(net(batch), batch, 0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            losses[start] = float(compute_loss(net(codes[128:]), codes[128:], 0.0))
    assert losses["codebook"] < losses["random"] - 0.2


def test_a_training_starts_as_its_config_says(toy, command, monkeypatch):
    trained = command("vqvae-train", *toy, *TINY_VQVAE)
    path = trained.folder / "checkpoints/best.ckpt"
    first = {}

    def remember(self, *_):
        first[self.start] = self.net.embedding.weight.detach().clone()
        raise KeyboardInterrupt

    monkeypatch.setattr(PriorTask, "training_step", remember)
    for start in ("codebook", "random"):
        outcome = command(
            "vqvae-train", "--config-name", "prior", *toy, *TINY_PRIOR,
            f"vqvae_checkpoint={path}", f"model.start={start}",
            folder=trained.folder.parent / start,
        )  # fmt: skip
        assert outcome.status == 130, outcome.err
    codebook = load(path).net.quantizer.codebook
    distances = [torch.pdist(rows - rows.mean(0)) for rows in (codebook, *first.values())]
    likeness = torch.corrcoef(torch.stack(distances))[0]
    assert likeness[1] > 0.6 > abs(float(likeness[2]))


def test_a_bad_start_is_refused():
    with pytest.raises(InputError, match="start=rows must be one of codebook, random"):
        PriorTask(make(4), torch.optim.Adam, start="rows")
