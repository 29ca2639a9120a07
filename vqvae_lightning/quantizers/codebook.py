"""The base class of the EMA and loss codebooks: warm-up, look-up, revival of dead codes."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae_lightning.distributed import all_reduce, get_rank_and_world
from vqvae_lightning.errors import InputError, Key, check_positive, check_range
from vqvae_lightning.quantizers.arrangements import ARRANGEMENTS
from vqvae_lightning.quantizers.gradients import ESTIMATORS
from vqvae_lightning.quantizers.protocol import QuantizerOutput
from vqvae_lightning.quantizers.rows import (
    count_rows_before,
    draw_over_ranks,
    gather_rows,
    kmeans,
    repeat_rows,
)
from vqvae_lightning.randomness import derive_seed

POOL_STEPS = 16  # warm-up steps, counted from its end, whose vectors can enter the first codebook
PER_CODE = {"kmeans": 16, "data": 1, "uniform": 0}  # vectors drawn per code
WARMUP_SHARE = 0.1  # longest warm-up, as a share of the training


class VectorQuantizer(nn.Module):
    """Codebook with warm-up, nearest-row look-up, gradient estimator and revival of dead codes.

    Subclasses define how the rows learn. A training run starts as a plain autoencoder: `z` passes
    unchanged for `warmup_steps` optimizer steps. The last of these steps initialises the codebook
    from encoder vectors. Later, codes that are hardly ever chosen are moved onto random encoder
    vectors. Without both measures, most of K=512 codes are never used (Dhariwal et al. 2020,
    arXiv:2005.00341, section 3.1).

    A position has one code, or Q codes from Q codebooks, each of K rows with D' channels. Each
    codebook has its own counts, dead codes and revival. The vectors that become rows are drawn
    once, and each codebook takes its own part of them.

    `forward` only collects statistics. All collectives and random draws happen in `update`, once
    per optimizer step, so that `forward` compiles as one graph.

    Args:
        num_codes: Rows of the codebook, or of each codebook (K), at least 2.
        code_dim: Channels of `z` (D).
        commitment: Weight of the commitment term (beta in van den Oord et al. 2017, equation 3).
        estimator: Gradient estimator for `z`, `straight_through` or `rotation` (arXiv:2410.06424).
        normalize: Whether `z` and the rows are scaled to unit length, so that the nearest row is
            the one at the smallest angle (Yu et al. 2021, arXiv:2110.04627, section 3.2).
        decay: Share of the old average kept per optimizer step, in [0, 1).
        init: Source of the first rows: `kmeans` of encoder vectors, random encoder vectors
            (`data`), or `uniform` noise in [-1/K, 1/K]. If the last steps of the warm-up have no
            more than K vectors, `kmeans` takes them as they are and repeats them.
        warmup_steps: Optimizer steps as a plain autoencoder, at most a tenth of the training.
            `kmeans` and `data` take at least one step even at 0, because they need vectors.
        revive_below: Share of the mean count below which a code is dead; 0 disables revival. The
            share depends neither on the batch size nor on the number of ranks.
        revive_every: Optimizer steps between two revivals.
        revive_until: Share of the training after which no code is revived, so that the decoder
            learns all rows.
        codes_per_position: Codes per position and number of codebooks (Q).
        arrangement: What each of several codebooks quantizes: its group of the channels
            (`product`, `ProductCodes`) or the residual of the earlier ones (`residual`,
            `ResidualCodes`). It has no effect on one codebook.

    Raises:
        InputError: If a value is outside its range.
    """

    codebook: Tensor
    counts: Tensor

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
        codes_per_position: int = 1,
        arrangement: Literal["product", "residual"] = "product",
    ) -> None:
        super().__init__()
        if check_positive("num_codes", num_codes) < 2:
            raise InputError(Key("num_codes"), f"={num_codes} must be at least 2.")
        check_positive("code_dim", code_dim)
        check_range("decay", decay, 0, 1)
        if decay == 1:
            raise InputError(Key("decay"), "=1 must be below 1: at 1 the codebook never moves.")
        if init not in list(PER_CODE):
            raise InputError(Key("init"), f"={init} must be one of {', '.join(PER_CODE)}.")
        if estimator not in ESTIMATORS:
            raise InputError(
                Key("estimator"), f"={estimator} must be one of {', '.join(ESTIMATORS)}."
            )
        if arrangement not in ARRANGEMENTS:
            raise InputError(
                Key("arrangement"), f"={arrangement} must be one of {', '.join(ARRANGEMENTS)}."
            )
        self.codes_per_position = check_positive("codes_per_position", codes_per_position)
        self.arrangement = ARRANGEMENTS[arrangement](codes_per_position, code_dim)
        # One codebook has no dimension for Q, so that its checkpoints stay those of a plain VQ-VAE.
        self.sizes = (codes_per_position, num_codes) if codes_per_position > 1 else (num_codes,)
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
        self.register_buffer("counts", torch.ones(self.sizes))
        # Python numbers, because reading them from a GPU tensor would wait for the GPU.
        # `get_extra_state` saves them.
        self.steps = 0
        self.initialised = init == "uniform" and warmup_steps == 0
        # Hits since the last update. Not a buffer, because DistributedDataParallel would overwrite
        # it with rank 0's. No checkpoint is saved between a batch and its update.
        self.new_counts = torch.zeros(self.sizes)
        self._newest: Tensor | None = None
        # Vectors for the first codebook and the random key of each, equal on all ranks. They are
        # not buffers, because their size changes and checkpoints after the warm-up omit them.
        self._pool, self._pool_keys = self._make_empty_pool()

    @property
    def pool_rows(self) -> int:
        """Largest number of encoder vectors kept for the first codebook."""
        rows = PER_CODE[self.init] * self.num_codes
        # Each residual stage needs other vectors: those that are rows of the first stage have a
        # residual of zero. K-means leaves residuals.
        return rows * self.arrangement.stages if self.init == "data" else rows

    def draw_first_rows(self) -> Tensor:
        """Draw random rows ([Q,] K, D') in [-1/K, 1/K]."""
        rows = torch.empty(*self.sizes, self.arrangement.row_dim).uniform_(-1, 1) / self.num_codes
        return self.scale(rows)

    def scale(self, rows: Tensor) -> Tensor:
        """Scale codebook rows (..., D') to unit length if `normalize` asks for it."""
        unit = self.normalize and self.arrangement.rows_have_unit_length
        return F.normalize(rows, dim=-1) if unit else rows

    def table(self) -> Tensor:
        """Return the rows ([Q,] K, D') that the look-up compares with and the decoder receives."""
        return self.codebook

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize `z` (B, D, H, W); during the warm-up of a training run, return it unchanged."""
        with torch.autocast(z.device.type, enabled=False):
            rows = self._to_rows(z)
            if self.training:
                self._newest = rows.detach().reshape(-1, self.code_dim)
            if self.training and not self.initialised:
                # A zero that depends on the codebook: without a gradient for every parameter,
                # DistributedDataParallel stops with an error.
                return QuantizerOutput(rows.movedim(-1, 1), None, self.codebook.sum() * 0, {})
            table = self._stack(self.table())
            parts, codes = self.arrangement.assign(rows, table.detach())
            places = self._number(codes)
            chosen = F.embedding(places, table.flatten(0, 1))
            terms = self.compute_losses(parts, chosen)
            flat = parts.detach().reshape(-1, self.arrangement.row_dim)
            if self.training:
                self.observe(flat, places.flatten())
            loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
            # Only logged: the commitment term may rise with it while the relative error falls.
            terms["latent_power"] = rows.detach().square().mean()
            estimator = ESTIMATORS[self.estimator]
            vectors = self.arrangement.estimate(estimator, rows, parts, chosen.detach())
        return QuantizerOutput(vectors.movedim(-1, 1), self._unstack(codes), loss, terms)

    @abstractmethod
    def compute_losses(self, parts: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        """Compute unweighted terms from parts and their rows, both (B, H, W, Q, D') float32.

        Each term is the mean over all elements, so that its weight does not depend on Q.
        """

    def observe(self, parts: Tensor, places: Tensor) -> None:
        """Add one training batch to the statistics.

        Args:
            parts: (N, D') from all codebooks.
            places: (N,) row of each part, counted over all codebooks, below Q K.
        """
        ones = torch.ones_like(places, dtype=self.new_counts.dtype)
        self.new_counts.view(-1).scatter_add_(0, places, ones)

    @abstractmethod
    def learn(self) -> None:
        """Apply the statistics since the last call, summed over all ranks, to the codebook."""

    @abstractmethod
    def set_rows(self, rows: Tensor, where: Tensor, count: Tensor) -> None:
        """Replace rows in the mask `where` ([Q,] K) by those of `rows` ([Q,] K, D').

        Their number of hits becomes `count`, () or one number per codebook ([Q,] 1).
        """

    def encode(self, z: Tensor) -> Tensor:
        """Return the codes (B, H, W[, Q]) of `z` (B, D, H, W); never learns, even in training."""
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            _, codes = self.arrangement.assign(self._to_rows(z), self._stack(self.table()))
        return self._unstack(codes)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the vectors (B, D, H, W) of `codes` (B, H, W), or (B, H, W, Q) with Q > 1."""
        stacked = codes[..., None] if self.codes_per_position == 1 else codes
        chosen = F.embedding(self._number(stacked), self._stack(self.table()).flatten(0, 1))
        return self.arrangement.join(chosen).movedim(-1, 1)

    @torch.no_grad()
    def update(self, progress: float = 0.0) -> dict[str, float]:
        """Learn from the batches since the last call; call this once after each optimizer step.

        Only the last steps of the warm-up and steps with a revival wait for a GPU, because their
        random rows and the number of revived codes pass through the CPU.

        Args:
            progress: Completed share of the training, in [0, 1].

        Returns:
            `revived_codes` in the steps that check for dead codes; otherwise nothing.
        """
        newest, self._newest = self._newest, None
        if newest is None:  # no batch was seen: the optimizer of another network stepped
            return {}
        self.steps += 1
        generator = self._make_generator()
        if not self.initialised:
            left: float = self.warmup_steps - self.steps
            if progress > 0:
                left = min(left, (WARMUP_SHARE / progress - 1) * self.steps)
            if left < POOL_STEPS - 0.5:  # half a step, because the division is not exact
                self._gather(newest, generator)
            if left <= 0:
                self._initialise(generator)
            return {}
        self.learn()
        if self.revive_below == 0 or self.steps % self.revive_every:
            return {}
        if progress >= self.revive_until:
            return {"revived_codes": 0.0}
        share = self.counts.mean(-1, keepdim=True)
        dead = self.counts < self.revive_below * share
        drawn = draw_over_ranks(newest, self.num_codes, generator)
        order = torch.arange(self.num_codes, device=dead.device).expand(dead.shape)
        if len(drawn) < self.num_codes:  # number the dead codes only, so that they share no vector
            order = (dead.cumsum(-1) - 1) % len(drawn)
        parts = self.arrangement.split(drawn, self._stack(self.table())).movedim(-2, 0)
        order = order.reshape(self.codes_per_position, -1, 1).expand(-1, -1, parts.shape[-1])
        self.set_rows(parts.gather(1, order).view(self.codebook.shape), dead, share)
        return {"revived_codes": float(dead.sum())}

    def get_extra_state(self) -> Tensor:
        """Return the number of steps and whether the codebook is initialised, as one tensor."""
        return torch.tensor([self.steps, int(self.initialised)], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the state that `get_extra_state` returned."""
        self.steps, self.initialised = int(state[0]), bool(state[1])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Add the vectors gathered for the first codebook, if there are any."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if len(self._pool):
            destination[f"{prefix}pool"] = self._pool
            destination[f"{prefix}pool_keys"] = self._pool_keys

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *options: Any) -> None:
        """Restore the gathered vectors; a checkpoint without them leaves the pool empty."""
        pool, keys = self._make_empty_pool()
        pool = state_dict.pop(f"{prefix}pool", pool)
        keys = state_dict.pop(f"{prefix}pool_keys", keys)
        super()._load_from_state_dict(state_dict, prefix, *options)
        self._pool, self._pool_keys = pool.to(self.codebook), keys.cpu()

    def _make_empty_pool(self) -> tuple[Tensor, Tensor]:
        rows = self.counts.new_empty(0, self.code_dim)
        return rows, torch.empty(0, dtype=torch.float64, device="cpu")

    def extra_repr(self) -> str:
        """Describe the size and the initialisation for `print(net)`."""
        several = f"codes_per_position={self.codes_per_position}, "
        return (
            f"num_codes={self.num_codes}, code_dim={self.code_dim}, "
            f"{several if self.codes_per_position > 1 else ''}init={self.init}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply `to`, `cuda` and `double` to the tensors that are not buffers too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.new_counts = fn(self.new_counts)
        self._pool = fn(self._pool)
        return self

    def _to_rows(self, z: Tensor) -> Tensor:
        """Rearrange `z` (B, D, ...) into the vectors (B, ..., D) that are looked up.

        Raises:
            InputError: If `z` does not have `code_dim` channels, or if the codebook was cast to
                half precision.
        """
        if z.ndim < 2 or z.shape[1] != self.code_dim:
            raise InputError(
                f"the quantizer expects (batch, {self.code_dim}, ...) but got {tuple(z.shape)}: "
                "code_dim must equal the encoder's output channels."
            )
        if self.codebook.dtype in (torch.bfloat16, torch.float16):
            raise InputError(
                f"the codebook is {self.codebook.dtype}, too coarse for moving averages and for "
                "exact codes; set trainer.precision to 32-true, bf16-mixed or 16-mixed."
            )
        rows = z.to(self.codebook.dtype).movedim(1, -1)
        return self.arrangement.normalize(rows) if self.normalize else rows

    def _stack(self, table: Tensor) -> Tensor:
        """View rows ([Q,] K, D') as (Q, K, D'), also for one codebook."""
        return table.view(self.codes_per_position, *table.shape[-2:])

    def _unstack(self, codes: Tensor) -> Tensor:
        """Remove the last dimension of codes (..., Q) if there is one codebook."""
        return codes.squeeze(-1) if self.codes_per_position == 1 else codes

    def _number(self, codes: Tensor) -> Tensor:
        """Return the row of each code (..., Q), counted over all codebooks."""
        if self.codes_per_position == 1:
            return codes
        books = torch.arange(self.codes_per_position, device=codes.device)
        return codes + books * self.num_codes

    def _make_generator(self) -> torch.Generator:
        # The seed depends on the step only, because a quantizer does not know the run's seed. Every
        # rank draws the same numbers, and so does a resumed run.
        return torch.Generator().manual_seed(derive_seed(0, "codebook", self.steps))

    def _gather(self, newest: Tensor, generator: torch.Generator) -> None:
        """Enter this step's vectors (N, D) into the draw for the first codebook.

        Each vector on any rank gets a random key, and the vectors with the largest keys are kept.
        This draws uniformly from the vectors of all steps, whose number need not be known (Vitter
        1985, Random sampling with a reservoir). All ranks keep the same vectors, so that rank 0's
        checkpoint holds everything needed to resume.
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
        pool = self._pool
        self._pool, self._pool_keys = self._make_empty_pool()
        if self.init != "uniform":
            clustered = self.init == "kmeans" and len(pool) > self.num_codes

            def choose(vectors: Tensor, own: slice) -> Tensor:
                if clustered:
                    return kmeans(vectors, self.num_codes, generator)
                repeated = repeat_rows(vectors, self.arrangement.stages * self.num_codes)
                return repeated[..., own, :]

            rows = self.arrangement.choose_rows(pool, choose).view(self.codebook.shape)
            if clustered:
                if get_rank_and_world()[0] > 0:
                    rows.zero_()
                all_reduce(rows)  # takes rank 0's: on a GPU sums differ in their last bits
            everywhere = torch.ones(self.sizes, dtype=torch.bool, device=rows.device)
            self.set_rows(rows, everywhere, rows.new_ones(()))
        self.initialised = True
