"""The codebook of sonnet's example against its published formulas, written out in numpy."""

import numpy as np
import pytest
import torch

from vqvae_lightning.errors import InputError
from vqvae_lightning.quantizers import SonnetEMAQuantizer

DECAY, EPSILON = 0.9, 0.01


def follow_sonnet(rows, batches):
    """Codebook after each batch (N, D), by sonnet's formulas in float64.

    Averages start at zero and are divided by 1 - decay^t. All rows become sums over smooth counts.
    """
    codes = len(rows)
    hidden_counts, hidden_sums = np.zeros(codes), np.zeros_like(rows)
    for step, batch in enumerate(batches, start=1):
        distances = ((batch[:, None] - rows[None]) ** 2).sum(-1)
        one_hot = np.eye(codes)[distances.argmin(1)]
        hidden_counts += (1 - DECAY) * (one_hot.sum(0) - hidden_counts)
        hidden_sums += (1 - DECAY) * (one_hot.T @ batch - hidden_sums)
        counts = hidden_counts / (1 - DECAY**step)
        total = counts.sum()
        smooth = (counts + EPSILON) / (total + codes * EPSILON) * total
        rows = hidden_sums / (1 - DECAY**step) / smooth[:, None]
        yield rows


def test_the_codebook_is_that_of_sonnets_formulas():
    quantizer = SonnetEMAQuantizer(6, 3, decay=DECAY, epsilon=EPSILON).train()
    batches = [torch.randn(2, 3, 2, 2) + 0.3 * step for step in range(8)]
    flat = [batch.movedim(1, -1).reshape(-1, 3).double().numpy() for batch in batches]
    expected = follow_sonnet(quantizer.codebook.double().numpy(), flat)
    for batch, rows in zip(batches, expected, strict=True):
        before = quantizer.codebook.clone()
        output = quantizer(batch)
        assert torch.equal(output.vectors.movedim(1, -1), before[output.codes])
        quantizer.update()
        np.testing.assert_allclose(quantizer.codebook.numpy(), rows, rtol=2e-5, atol=1e-6)


def test_a_code_without_hits_becomes_the_zero_vector():
    quantizer = SonnetEMAQuantizer(4, 2).train()
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[1.0, 1.0], [9.0, 9.0], [-9.0, 9.0], [9.0, -9.0]]))
    quantizer(torch.ones(1, 2, 3, 3))
    assert quantizer.update() == {}
    assert quantizer.codebook[1:].abs().max() == 0
    torch.testing.assert_close(quantizer.codebook[0], torch.ones(2), rtol=1e-3, atol=0)


def test_the_first_rows_are_uniform_with_variance_one_over_the_channels():
    rows = SonnetEMAQuantizer(4096, 16).codebook
    assert float(rows.var()) == pytest.approx(1 / 16, rel=0.02)
    assert float(rows.abs().max()) == pytest.approx((3 / 16) ** 0.5, rel=0.01)  # no normal has this


def test_training_goes_on_from_a_checkpoint_as_without_it():
    batches = [torch.randn(2, 3, 2, 2) for _ in range(4)]
    through, first = (SonnetEMAQuantizer(6, 3, decay=DECAY).train() for _ in range(2))
    first.load_state_dict(through.state_dict())
    second = SonnetEMAQuantizer(6, 3, decay=DECAY).train()
    for number, batch in enumerate(batches):
        if number == 2:
            second.load_state_dict(first.state_dict())
        for quantizer in (through, first if number < 2 else second):
            quantizer(batch)
            quantizer.update()
    assert torch.equal(second.codebook, through.codebook)


def test_a_bad_value_is_refused():
    with pytest.raises(InputError, match=r"decay=1 must be below 1"):
        SonnetEMAQuantizer(6, 3, decay=1)
    with pytest.raises(InputError, match=r"epsilon=0 must be above 0"):
        SonnetEMAQuantizer(6, 3, epsilon=0)
