"""Train a small VQ-VAE on fixed batches, on two ranks of `Trainer(strategy="ddp")` as a script.

    python tests/ddp_job.py FOLDER

writes `FOLDER/rank0.pt` and `rank1.pt`. For each of `CASES`, they hold the codebook after every
step, the encoder's final weights and the metrics of a validation on an odd number of images. Tests
import `fit` to get the same results from one process.
"""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader, Dataset

from vqvae_lightning.data import Batch
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.quantizers import EMAQuantizer, LossQuantizer
from vqvae_lightning.tasks import VQVAETask

STEPS = 8
CASES = {
    f"{make.__name__} {init} broadcast_buffers={broadcast} accumulate={accumulate}": (
        make,
        init,
        broadcast,
        accumulate,
    )
    for make, init, broadcast, accumulate in (
        (EMAQuantizer, "kmeans", True, 1),
        (EMAQuantizer, "data", False, 2),
        (EMAQuantizer, "uniform", True, 2),
        (LossQuantizer, "kmeans", False, 1),
        (LossQuantizer, "data", True, 1),
    )
}


class Parts(Dataset):
    """This rank's part of each batch; batches of odd size are divided unevenly."""

    def __init__(self, batches, rank, world):
        self.batches, self.rank, self.world = batches, rank, world

    def __len__(self):
        return self.batches

    def __getitem__(self, number):
        size = 6 + number % 2
        generator = torch.Generator().manual_seed(number)
        images = torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1
        return Batch(images.tensor_split(self.world)[self.rank], None)


class Data(pl.LightningDataModule):
    pixel_variance = 0.05

    def train_dataloader(self):
        trainer = self.trainer
        count = STEPS * trainer.accumulate_grad_batches
        parts = Parts(count, trainer.global_rank, trainer.world_size)
        return DataLoader(parts, batch_size=None)

    def val_dataloader(self):
        parts = Parts(3, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(parts, batch_size=None)


class History(pl.Callback):
    def __init__(self):
        self.codebooks = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if (trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.codebooks.append(pl_module.net.quantizer.codebook.detach().clone())


def fit(case, devices):
    make, init, broadcast, accumulate = CASES[case]
    torch.manual_seed(0)
    # Lightning users too build the network before the process group exists.
    quantizer = make(
        12,
        4,
        init=init,
        warmup_steps=2,
        decay=0.7,
        revive_below=0.8,
        revive_every=2,
        revive_until=1.0,
    )
    net = VQVAE(quantizer, channels=1, hidden=8, residual_hidden=4)
    task = VQVAETask(net, lambda parameters: torch.optim.SGD(parameters, lr=0.05))
    history, revived = History(), []
    update = quantizer.update

    def record(progress):
        logs = update(progress)
        revived.append(logs.get("revived_codes", 0.0))
        return logs

    quantizer.update = record
    strategy = DDPStrategy(broadcast_buffers=broadcast) if devices > 1 else "auto"
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=devices,
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        callbacks=[history],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        check_val_every_n_epoch=100,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, datamodule=Data())
    weights = torch.cat([p.detach().flatten() for p in net.encoder.parameters()])
    assert quantizer.steps == STEPS, "the averages move once per optimizer step"
    metrics = trainer.validate(task, datamodule=Data(), verbose=False)[0]
    return {
        "codebooks": torch.stack(history.codebooks),
        "weights": weights,
        "revived": torch.tensor(sum(revived)),
        **{name: torch.tensor(value) for name, value in metrics.items()},
    }, trainer.global_rank


if __name__ == "__main__":
    torch.set_num_threads(1)
    results, rank = {}, 0
    for name in CASES:
        results[name], rank = fit(name, devices=2)
    torch.save(results, Path(sys.argv[1]) / f"rank{rank}.pt")
