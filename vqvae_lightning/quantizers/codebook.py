"""What EMA and loss codebooks share: first rows, look-up, revival of dead codes."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae_lightning.distributed import all_reduce, get_rank_and_world
from vqvae_lightning.errors import InputError, Key, check_positive, check_range
from vqvae_lightning.quantizers.gradients import ESTIMATORS
from vqvae_lightning.quantizers.lookup import _nearest_codes, _operators, find_nearest_codes
from vqvae_lightning.quantizers.protocol import QuantizerOutput
from vqvae_lightning.quantizers.rows import (
    count_rows_before,
    draw_over_ranks,
    gather_rows,
    kmeans,
    repeat_rows,
)
from vqvae_lightning.randomness import derive_seed

POOL_STEPS = 16  # last steps of the warm-up that the vectors for the first codebook are drawn from
PER_CODE = {"kmeans": 16, "data": 1, "uniform": 0}  # how many of them per code
WARMUP_SHARE = 0.1  # of the training: the longest warm-up
_operators.define("nearest_codes(Tensor vectors, Tensor codebook) -> Tensor")
_operators.impl("nearest_codes", _nearest_codes, "CompositeExplicitAutograd")


torch.library.register_fake(
    "vqvae_lightning::nearest_codes",
    lambda vectors, codebook: vectors.new_empty(vectors.shape[0], dtype=torch.int64),
    lib=_operators,
)


class VectorQuantizer(nn.Module):
    """A codebook: look-up, gradient estimator, first rows out of data, revival of dead codes.

    Subclasses say how the rows learn. A training run starts as a plain autoencoder: for
    `warmup_steps` optimizer steps `z` is passed on as it is, and the last of them sets the
    codebook, so that it starts where the encoder's vectors are. Codes that hardly any vector
    chooses are moved onto random encoder vectors: without the two, most of K=512 codes stay unused
    for ever (Dhariwal et al. 2020, arXiv:2005.00341, section 3.1).

    `forward` gathers, `update` learns: all collectives and everything random are in `update`, once
    per optimizer step, so that `forward` compiles as one graph.

    Args:
        num_codes: Rows of the codebook (K), at least 2.
        code_dim: Channels of `z` (D).
        commitment: Weight of the commitment term (beta in van den Oord et al. 2017, equation 3).
        estimator: The gradient of `z`: `straight_through`, or `rotation` (arXiv:2410.06424).
        normalize: Whether `z` and the rows have unit length, so that the nearest row is the one at
            the smallest angle (Yu et al. 2021, arXiv:2110.04627, section 3.2).
        decay: Share of the old average kept per optimizer step, in [0, 1).
        init: First rows: `kmeans` or `data` (random encoder vectors), or `uniform` in [-1/K, 1/K].
        warmup_steps: Optimizer steps as a plain autoencoder, at most a tenth of the training;
            `kmeans` and `data` need one at least, to see vectors, and take it even at 0.
        revive_below: A code is dead when its average count is below this share of the mean count; 0
            switches revival off. Free of units: neither batch size nor number of ranks changes it.
        revive_every: Optimizer steps between two revivals.
        revive_until: Share of training after which no code is revived, so that the codes settle for
            a prior.

    Raises:
        InputError: If a value is outside its range.
    """

    codebook: Tensor
    counts: Tensor
    codes_per_position = 1

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        commitment: float = 0.25,
        estimator: Literal["straight_through", "rotation"] = "straight_through",
        normalize: bool = False,
        decay: float = 0.99,
        init: Literal["kmeans", "data", "uniform"] = "kmeans",
        warmup_steps: int = 200,
        revive_below: float = 0.03,
        revive_every: int = 20,
        revive_until: float = 0.9,
    ) -> None:
        super().__init__()
        if check_positive("num_codes", num_codes) < 2:
            raise InputError(Key("num_codes"), f"={num_codes} must be at least 2.")
        check_positive("code_dim", code_dim)
        check_range("decay", decay, 0, 1)
        if decay == 1:
            raise InputError(Key("decay"), "=1 must be below 1, or the codebook would never move.")
        if init not in list(PER_CODE):
            raise InputError(Key("init"), f"={init} must be one of {', '.join(PER_CODE)}.")
        if estimator not in ESTIMATORS:
            raise InputError(
                Key("estimator"), f"={estimator} must be one of {', '.join(ESTIMATORS)}."
            )
        self.num_codes = num_codes
        self.code_dim = self.encoder_channels = code_dim
        self.estimator = estimator
        self.normalize = normalize
        self.decay = decay
        self.init = init
        self.warmup_steps = int(check_range("warmup_steps", warmup_steps, 0))
        self.revive_below = check_range("revive_below", revive_below, 0, 1)
        self.revive_every = check_positive("revive_every", revive_every)
        self.revive_until = check_range("revive_until", revive_until, 0, 1)
        self.weights = {"commitment": check_range("commitment", commitment, 0)}
        self.register_buffer("counts", torch.ones(num_codes))
        # Both are kept as Python numbers too cheap to wait for on a GPU; `get_extra_state` saves
        # them.
        self.steps = 0
        self.initialised = init == "uniform" and warmup_steps == 0
        # Hits of the batches since the last update. Not a buffer: DistributedDataParallel would put
        # rank 0's in the place of this rank's. A checkpoint never falls between batch and update.
        self.new_counts = torch.zeros(num_codes)
        self._newest: Tensor | None = None
        # Vectors for the first codebook, equal on all ranks, and the random number of each. No
        # buffers: their size changes, and a checkpoint after the warm-up has none.
        self._pool, self._pool_keys = self._empty_pool()

    @property
    def pool_rows(self) -> int:
        """Encoder vectors that the first codebook is made from, at most."""
        return PER_CODE[self.init] * self.num_codes

    def draw_first_rows(self) -> Tensor:
        """Random rows (K, D) in [-1/K, 1/K]: van den Oord's own initialisation (sonnet v1)."""
        rows = torch.empty(self.num_codes, self.code_dim).uniform_(-1, 1) / self.num_codes
        return self.scale(rows)

    def scale(self, rows: Tensor) -> Tensor:
        """Rows (..., D) at unit length if `normalize`, else as they are."""
        return F.normalize(rows, dim=-1) if self.normalize else rows

    def table(self) -> Tensor:
        """The rows (K, D) as look-up and decoder see them."""
        return self.codebook

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize `z` (B, D, H, W), or pass it on during the warm-up of a training run."""
        with torch.autocast(z.device.type, enabled=False):
            rows = self._rows(z)
            flat = rows.detach().reshape(-1, self.code_dim)
            if self.training:
                self._newest = flat
            if self.training and not self.initialised:
                # The codebook's zero: or a distributed run would wait for a gradient of it.
                return QuantizerOutput(rows.movedim(-1, 1), None, self.codebook.sum() * 0, {})
            table = self.table()
            codes = find_nearest_codes(flat, table.detach())
            chosen = F.embedding(codes, table).view_as(rows)
            terms = self.compute_losses(rows, chosen)
            if self.training:
                self.observe(flat, codes)
            loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
            passed = ESTIMATORS[self.estimator].apply(rows, chosen.detach())
        vectors = cast(Tensor, passed).movedim(-1, 1)
        return QuantizerOutput(vectors, codes.view(rows.shape[:-1]), loss, terms)

    @abstractmethod
    def compute_losses(self, rows: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        """Unweighted terms for vectors and their codebook rows, both (B, H, W, D) float32."""

    def observe(self, flat: Tensor, codes: Tensor) -> None:
        """Take in the vectors (N, D) and codes (N,) of one training batch."""
        self.new_counts.scatter_add_(0, codes, torch.ones_like(codes, dtype=self.new_counts.dtype))

    @abstractmethod
    def learn(self) -> None:
        """Apply what was observed since the last call, summed over all ranks."""

    @abstractmethod
    def set_rows(self, rows: Tensor, where: Tensor, count: Tensor) -> None:
        """Set the rows `where` (K,) bool to those of `rows` (K, D), each with `count` hits."""

    def encode(self, z: Tensor) -> Tensor:
        """Codes (B, H, W) of `z` (B, D, H, W); never learns, even in training mode."""
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            rows = self._rows(z)
            flat = rows.reshape(-1, self.code_dim)
            return find_nearest_codes(flat, self.table()).view(rows.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        """Codebook rows (B, D, H, W) of `codes` (B, H, W)."""
        return F.embedding(codes, self.table()).movedim(-1, 1)

    @torch.no_grad()
    def update(self, progress: float = 0.0) -> dict[str, float]:
        """Learn from the batches since the last call; call it once after each optimizer step.

        No step waits for a GPU, except the last ones of the warm-up and those with a revival: their
        random rows, and the number of revived codes, pass through the CPU.

        Args:
            progress: Share of training that is done, in [0, 1].

        Returns:
            `revived_codes`, in the steps in which dead codes are looked for.
        """
        newest, self._newest = self._newest, None
        if newest is None:  # no batch was seen: somebody else's network stepped
            return {}
        self.steps += 1
        generator = self._generator()
        if not self.initialised:
            over = self.steps >= self.warmup_steps or progress >= WARMUP_SHARE
            if over or self.steps > self.warmup_steps - POOL_STEPS:
                self._gather(newest, generator)
            if over:
                self._initialise(generator)
            return {}
        self.learn()
        if self.revive_below == 0 or self.steps % self.revive_every:
            return {}
        if progress >= self.revive_until:
            return {"revived_codes": 0.0}
        fresh = repeat_rows(draw_over_ranks(newest, self.num_codes, generator), self.num_codes)
        share = self.counts.mean()
        dead = self.counts < self.revive_below * share
        self.set_rows(fresh, dead, share)
        return {"revived_codes": float(dead.sum())}

    def get_extra_state(self) -> Tensor:
        """Steps taken, and whether the codebook is set; one tensor."""
        return torch.tensor([self.steps, int(self.initialised)], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore `get_extra_state`."""
        self.steps, self.initialised = int(state[0]), bool(state[1])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the gathered vectors too, as long as there are any."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if len(self._pool):
            destination[f"{prefix}pool"] = self._pool
            destination[f"{prefix}pool_keys"] = self._pool_keys

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *options: Any) -> None:
        """Restore what `_save_to_state_dict` saved; without it, nothing was gathered."""
        pool, keys = self._empty_pool()
        pool = state_dict.pop(f"{prefix}pool", pool)
        keys = state_dict.pop(f"{prefix}pool_keys", keys)
        super()._load_from_state_dict(state_dict, prefix, *options)
        self._pool, self._pool_keys = pool.to(self.codebook), keys.cpu()

    def _empty_pool(self) -> tuple[Tensor, Tensor]:
        rows = self.counts.new_empty(0, self.code_dim)
        return rows, torch.empty(0, dtype=torch.float64, device="cpu")

    def extra_repr(self) -> str:
        """Size and way of starting, for `print(net)`."""
        return f"num_codes={self.num_codes}, code_dim={self.code_dim}, init={self.init}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move what is no buffer along with the rest: `to`, `cuda`, `double`."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.new_counts = fn(self.new_counts)
        self._pool = fn(self._pool)
        return self

    def _rows(self, z: Tensor) -> Tensor:
        """`z` (B, D, ...) as the vectors (B, ..., D) that are looked up."""
        if z.ndim < 2 or z.shape[1] != self.code_dim:
            raise InputError(
                f"the quantizer expects (batch, {self.code_dim}, ...) but got {tuple(z.shape)}: "
                "code_dim must equal the encoder's output channels."
            )
        if self.codebook.dtype in (torch.bfloat16, torch.float16):
            raise InputError(
                f"the codebook is {self.codebook.dtype}, in which averages stand still and codes "
                "change; set trainer.precision to 32-true, bf16-mixed or 16-mixed."
            )
        return self.scale(z.to(self.codebook.dtype).movedim(1, -1))

    def _generator(self) -> torch.Generator:
        # Seeded by the step alone, as a quantizer does not know the run's seed: every rank draws
        # the same, and a resumed run draws what an uninterrupted one would have drawn.
        return torch.Generator().manual_seed(derive_seed(0, "codebook", self.steps))

    def _gather(self, newest: Tensor, generator: torch.Generator) -> None:
        """Let the vectors (N, D) of this step take part in the draw for the first codebook.

        Each vector of all ranks gets a random number, and those with the largest are kept. This is
        a uniform draw out of the vectors of all steps, whatever their number (Vitter 1985, Random
        sampling with a reservoir). Every rank keeps the same, so rank 0's checkpoint holds
        everything needed to resume.
        """
        if not self.pool_rows:
            return
        first, total = count_rows_before(newest)
        fresh = torch.rand(total, generator=generator, dtype=torch.float64)
        keys = torch.cat([self._pool_keys, fresh])
        kept = keys.topk(min(self.pool_rows, len(keys))).indices.sort().values
        old = kept[kept < len(self._pool)]
        new = kept[len(old) :] - len(self._pool)
        self._pool = torch.cat([self._pool[old.to(newest.device)], gather_rows(newest, first, new)])
        self._pool_keys = keys[kept]

    def _initialise(self, generator: torch.Generator) -> None:
        rows = self._pool
        self._pool, self._pool_keys = self._empty_pool()
        if self.init != "uniform":
            if self.init == "kmeans" and len(rows) > self.num_codes:
                rows = kmeans(rows, self.num_codes, generator)
                if get_rank_and_world()[0] > 0:
                    rows.zero_()
                all_reduce(rows)  # the first rank's: on a GPU sums differ in their last bits
            rows = repeat_rows(rows, self.num_codes)
            everywhere = torch.ones(self.num_codes, dtype=torch.bool, device=rows.device)
            self.set_rows(rows, everywhere, rows.new_ones(()))
        self.initialised = True
