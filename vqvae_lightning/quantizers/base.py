"""What every quantizer shares: output, look-up, gradient estimators, first codebook, revival."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae_lightning.devices import exact_products
from vqvae_lightning.distributed import all_reduce, rank_and_world
from vqvae_lightning.errors import InputError, Key, check_positive, check_range
from vqvae_lightning.randomness import stream_seed

SCORES = 2**21  # scores held at a time by `nearest_codes`: 8 MiB, which a CPU's caches hold
GPU_SCORES = 2**26  # on a GPU: 256 MiB, as small blocks would be thousands of short kernels
GPU_SHARE = 64  # of a GPU's memory they take at most 1 / GPU_SHARE
COLUMNS = 2**12  # codes compared at a time, so that a block keeps enough rows for a large codebook
CHUNK = 64  # neighbouring scores of which the largest is found first
POOL_STEPS = 16  # last steps of the warm-up that the vectors for the first codebook are drawn from
PER_CODE = {"kmeans": 16, "data": 1, "uniform": 0}  # how many of them per code
KMEANS_STEPS = 10
WARMUP_SHARE = 0.1  # of the training: the longest warm-up


class Posterior(NamedTuple):
    """What a Gaussian bottleneck knows of its latents; both (B, D, H, W)."""

    mean: Tensor
    kl: Tensor
    """KL divergence from the standard normal in nats, per latent value."""


class QuantizerOutput(NamedTuple):
    """What a quantizer returns for encoder vectors `z` of shape (B, encoder_channels, H, W)."""

    vectors: Tensor
    """(B, D, H, W) float32, the decoder's input."""
    codes: Tensor | None
    """(B, H, W) int64 in [0, num_codes), or (B, H, W, Q) with Q = codes_per_position > 1; None from
    a continuous bottleneck, and while the codebook waits for the warm-up to end."""
    loss: Tensor
    """() the weighted sum of `terms`: add it to the reconstruction term."""
    terms: dict[str, Tensor]
    """Unweighted parts of `loss`, each (), for logging; the weights are `Quantizer.weights`."""
    posterior: Posterior | None = None
    """Of a Gaussian bottleneck only."""


class Quantizer(Protocol):
    """What the networks and tasks need of a bottleneck."""

    num_codes: int
    """Rows of (each) codebook; 0 for a continuous bottleneck."""
    codes_per_position: int
    """1, or more for residual quantizers, or 0 for a continuous bottleneck."""
    code_dim: int
    """Channels that the decoder gets."""
    encoder_channels: int
    """Channels that the encoder delivers."""
    weights: dict[str, float]

    def __call__(self, z: Tensor) -> QuantizerOutput:
        """Quantize (B, encoder_channels, H, W); in training mode gather what `update` needs."""

    def encode(self, z: Tensor) -> Tensor:
        """Codes (B, H, W) of `z`; never learns, even in training mode."""

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (B, D, H, W) of `codes`."""

    def update(self, progress: float) -> dict[str, float]:
        """Learn from the batches since the last call; call it once after each optimizer step.

        `progress` is the share of training that is done, in [0, 1]. Returns figures to log.
        """


class StraightThrough(torch.autograd.Function):
    """Replace `z` by `vectors` in the forward pass and pass the gradient on to `z` unchanged.

    `z + (vectors - z).detach()` is the textbook form; in bfloat16 a third of its elements differ
    from `vectors` by a rounding, so the decoder would train on vectors that decoding codes never
    produces.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, vectors: Tensor) -> Tensor:
        """Return `vectors` bit for bit."""
        return vectors.view_as(vectors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The identity for `z`, nothing for `vectors`."""
        return gradients[0], None


class Rotation(torch.autograd.Function):
    """Replace `z` by `vectors` and turn and scale the gradient as `z` was turned and scaled.

    Each vector e is written as (|e| / |z|) R z with the rotation R = 1 - 2 r r' + 2 e^ z^' that
    takes the direction z^ to e^ within their plane, r = (z^ + e^) / |z^ + e^|; factor and rotation
    count as constants. Source: Fifty et al. 2024 (arXiv:2410.06424), section 4.2. Rows are the last
    dimension.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, vectors: Tensor) -> Tensor:
        """Return `vectors` bit for bit."""
        ctx.save_for_backward(z, vectors)
        return vectors.view_as(vectors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """(|e| / |z|) R' gradient for `z`, nothing for `vectors`."""
        z, vectors = ctx.saved_tensors
        gradient = gradients[0]
        source, target = F.normalize(z, dim=-1), F.normalize(vectors, dim=-1)
        middle = F.normalize(source + target, dim=-1)
        turned = (
            gradient
            - 2 * middle * (middle * gradient).sum(-1, keepdim=True)
            + 2 * source * (target * gradient).sum(-1, keepdim=True)
        )
        length = z.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return turned * (vectors.norm(dim=-1, keepdim=True) / length), None


ESTIMATORS = {"straight_through": StraightThrough, "rotation": Rotation}


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest codebook row (Euclidean) for each vector.

    The distances are float32 and never held all at once: blocks go through one reused buffer, which
    is several times faster than an N x K matrix of fresh memory. argmin |z - e|^2 = argmax z.e -
    |e|^2 / 2, with both moved by the mean row: far from the origin the terms would cancel to noise.
    The products are exact, whatever precision is set for float32 matrices.

    Args:
        vectors: (N, D).
        codebook: (K, D).

    Returns:
        (N,) int64 in [0, K); the lowest of codes at the same distance.
    """
    return torch.ops.vqvae_lightning.nearest_codes(vectors.detach(), codebook.detach())  # type: ignore[no-any-return]


def scores_at_a_time(device: torch.device) -> int:
    """Scores (float32) that `nearest_codes` holds at a time on `device`."""
    if device.type != "cuda":
        return SCORES
    # Of the whole memory, not of the free one: it never changes, and asking for it is free.
    total = torch.cuda.get_device_properties(device).total_memory
    return min(GPU_SCORES, total // (4 * GPU_SHARE))


def _nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    # float32 even under autocast: in bfloat16 near-equal distances tie and 1 to 3 % of the codes
    # change. TF32 and oneDNN's bfloat16 products do the same, to 0.4 % of them.
    with torch.autocast(vectors.device.type, enabled=False), exact_products():
        centre = codebook.float().mean(0)
        table = codebook.float() - centre
        bias = table.square().sum(1).mul_(-0.5)
        padding = -len(table) % CHUNK  # never chosen
        table = F.pad(table, (0, 0, 0, padding))
        bias = F.pad(bias, (0, padding), value=-torch.inf)
        budget = scores_at_a_time(vectors.device)
        # Where few vectors leave room, more columns than that.
        columns = max(COLUMNS, budget // max(1, len(vectors)) // CHUNK * CHUNK)
        tiles = list(zip(table.split(columns), bias.split(columns), strict=True))
        width = min(len(table), columns)
        height = max(1, min(len(vectors), budget // width))
        buffer = table.new_empty(height * width)
        numbers = torch.arange(height, device=vectors.device)
        codes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
        for rows, out in zip(vectors.split(height), codes.split(height), strict=True):
            centred = rows.float() - centre
            each = numbers[: len(rows)]
            best: Tensor | None = None
            for number, (tile, offset) in enumerate(tiles):
                scores = buffer[: len(rows) * len(tile)].view(len(rows), len(tile))
                torch.addmm(offset, centred, tile.t(), out=scores)
                # The largest of each chunk, then the place within the best chunk: a maximum alone
                # is vectorised, one with its index is not.
                chunks = scores.view(len(rows), len(tile) // CHUNK, CHUNK)
                tops = chunks.amax(2)
                which = tops.argmax(1)
                found = which * CHUNK + chunks[each, which].argmax(1)
                top = tops[each, which]
                if best is None:
                    best = top
                    out.copy_(found)
                else:
                    better = top > best
                    best = torch.where(better, top, best)
                    out.copy_(torch.where(better, found + number * columns, out))
        # Vectors that are not finite find the padding; what stops such a run is its loss.
        return codes.clamp_(max=len(codebook) - 1)


# An operator of its own, so that `torch.compile` takes it as it is. Not `torch.library.custom_op`,
# whose first call imports the compiler: 160 MB and seconds that an uncompiled run has no use for.
_operators = torch.library.Library("vqvae_lightning", "DEF")
_operators.define("nearest_codes(Tensor vectors, Tensor codebook) -> Tensor")
_operators.impl("nearest_codes", _nearest_codes, "CompositeExplicitAutograd")


torch.library.register_fake(
    "vqvae_lightning::nearest_codes",
    lambda vectors, codebook: vectors.new_empty(vectors.shape[0], dtype=torch.int64),
    lib=_operators,
)


def kmeans(vectors: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Centres (K, D) of `vectors` (N, D) by Lloyd's algorithm from K random vectors.

    A centre without vectors is moved onto a random vector. The same input and generator give the
    same centres.
    """
    centres = vectors[random_rows(len(vectors), num_codes, generator)].clone()
    for _ in range(KMEANS_STEPS):
        codes = nearest_codes(vectors, centres)
        counts = torch.zeros(num_codes, dtype=torch.int64, device=codes.device)
        counts.scatter_add_(0, codes, torch.ones_like(codes))
        sums = torch.zeros_like(centres).index_add_(0, codes, vectors)
        fresh = vectors[random_rows(len(vectors), num_codes, generator)]
        centres = torch.where((counts > 0)[:, None], sums / counts.clamp(min=1)[:, None], fresh)
    return centres


def random_rows(total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` row numbers below `total` (int64, CPU), repeated only where `count` > `total`."""
    rounds = -(-count // total)
    order = [torch.randperm(total, generator=generator) for _ in range(rounds)]
    return torch.cat(order)[:count]


def draw_over_ranks(part: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` random rows out of the vectors of all ranks, equal on every rank.

    Rows are numbered rank by rank, so that N ranks draw the rows that one process with the
    concatenated batch draws. Two collectives of fixed size, whatever the data; each rank's
    `generator` must be in the same state.

    Args:
        part: Vectors (n, D) of this rank; n may differ between ranks.
        count: Rows to draw; all there are if they are fewer.
        generator: A CPU generator.

    Returns:
        (min(count, number of vectors), D).
    """
    first, total = place_among_ranks(part)
    return rows_over_ranks(part, first, random_rows(total, min(count, total), generator))


def rows_over_ranks(part: Tensor, first: int, numbers: Tensor) -> Tensor:
    """Chosen rows out of the vectors of all ranks, equal on every rank.

    Args:
        part: Vectors (n, D) of this rank.
        first: Number of its first row among those of all ranks.
        numbers: Rows to take (m,) int64 on the CPU, the same on every rank.

    Returns:
        (m, D).
    """
    own = numbers - first
    places = ((own >= 0) & (own < len(part))).nonzero()[:, 0]
    chosen = part.new_zeros(len(numbers), part.shape[1])
    chosen[places.to(part.device)] = part[own[places].to(part.device)]
    return all_reduce(chosen)


def place_among_ranks(part: Tensor) -> tuple[int, int]:
    """Where the rows of `part` begin among those of all ranks, and how many there are of all."""
    rank, world = rank_and_world()
    if world == 1:
        return 0, len(part)
    sizes = torch.zeros(world, dtype=torch.int64, device=part.device)
    sizes[rank] = len(part)
    ends = all_reduce(sizes).cumsum(0).tolist()
    return ends[rank] - len(part), ends[-1]


def cycled(rows: Tensor, count: int) -> Tensor:
    """`count` rows: those of `rows` (n, D), over again where they are fewer."""
    return rows[torch.arange(count, device=rows.device) % len(rows)]


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

    def first_rows(self) -> Tensor:
        """Random rows (K, D) in [-1/K, 1/K]: van den Oord's own initialisation (sonnet v1)."""
        rows = torch.empty(self.num_codes, self.code_dim).uniform_(-1, 1) / self.num_codes
        return self.scaled(rows)

    def scaled(self, rows: Tensor) -> Tensor:
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
            codes = nearest_codes(flat, table.detach())
            chosen = F.embedding(codes, table).view_as(rows)
            terms = self.losses(rows, chosen)
            if self.training:
                self.observe(flat, codes)
            loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
            passed = ESTIMATORS[self.estimator].apply(rows, chosen.detach())
        vectors = cast(Tensor, passed).movedim(-1, 1)
        return QuantizerOutput(vectors, codes.view(rows.shape[:-1]), loss, terms)

    @abstractmethod
    def losses(self, rows: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        """Unweighted terms for vectors and their codebook rows, both (B, H, W, D) float32."""

    def observe(self, flat: Tensor, codes: Tensor) -> None:
        """Take in the vectors (N, D) and codes (N,) of one training batch."""
        self.new_counts.scatter_add_(0, codes, torch.ones_like(codes, dtype=self.new_counts.dtype))

    @abstractmethod
    def learn(self) -> None:
        """Apply what was observed since the last call, summed over all ranks."""

    @abstractmethod
    def place(self, rows: Tensor, where: Tensor, count: Tensor) -> None:
        """Set the rows `where` (K,) bool to those of `rows` (K, D), each with `count` hits."""

    def encode(self, z: Tensor) -> Tensor:
        """Codes (B, H, W) of `z` (B, D, H, W); never learns, even in training mode."""
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            rows = self._rows(z)
            flat = rows.reshape(-1, self.code_dim)
            return nearest_codes(flat, self.table()).view(rows.shape[:-1])

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
        fresh = cycled(draw_over_ranks(newest, self.num_codes, generator), self.num_codes)
        share = self.counts.mean()
        dead = self.counts < self.revive_below * share
        self.place(fresh, dead, share)
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
        return self.scaled(z.to(self.codebook.dtype).movedim(1, -1))

    def _generator(self) -> torch.Generator:
        # Seeded by the step alone, as a quantizer does not know the run's seed: every rank draws
        # the same, and a resumed run draws what an uninterrupted one would have drawn.
        return torch.Generator().manual_seed(stream_seed(0, "codebook", self.steps))

    def _gather(self, newest: Tensor, generator: torch.Generator) -> None:
        """Let the vectors (N, D) of this step take part in the draw for the first codebook.

        Each vector of all ranks gets a random number, and those with the largest are kept. This is
        a uniform draw out of the vectors of all steps, whatever their number (Vitter 1985, Random
        sampling with a reservoir). Every rank keeps the same, so rank 0's checkpoint holds
        everything needed to resume.
        """
        if not self.pool_rows:
            return
        first, total = place_among_ranks(newest)
        fresh = torch.rand(total, generator=generator, dtype=torch.float64)
        keys = torch.cat([self._pool_keys, fresh])
        kept = keys.topk(min(self.pool_rows, len(keys))).indices.sort().values
        old = kept[kept < len(self._pool)]
        new = kept[len(old) :] - len(self._pool)
        self._pool = torch.cat(
            [self._pool[old.to(newest.device)], rows_over_ranks(newest, first, new)]
        )
        self._pool_keys = keys[kept]

    def _initialise(self, generator: torch.Generator) -> None:
        rows = self._pool
        self._pool, self._pool_keys = self._empty_pool()
        if self.init != "uniform":
            if self.init == "kmeans" and len(rows) > self.num_codes:
                rows = kmeans(rows, self.num_codes, generator)
                if rank_and_world()[0] > 0:
                    rows.zero_()
                all_reduce(rows)  # the first rank's: on a GPU sums differ in their last bits
            rows = cycled(rows, self.num_codes)
            everywhere = torch.ones(self.num_codes, dtype=torch.bool, device=rows.device)
            self.place(rows, everywhere, rows.new_ones(()))
        self.initialised = True
