"""What every quantizer shares: output, look-up, straight-through estimator, first codebook."""

from abc import abstractmethod
from typing import Literal, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae_lightning.errors import InputError, check_positive, check_range

BLOCK = 2**22  # scores held at a time by `nearest_codes`: 16 MiB; smaller blocks only cost launches
POOL = 16  # encoder vectors per code that k-means sees
POOL_STEPS = 16  # last steps of the warm-up that they are drawn from
KMEANS_STEPS = 10


class QuantizerOutput(NamedTuple):
    """What a quantizer returns for encoder vectors `z` of shape (B, D, H, W)."""

    vectors: Tensor
    """(B, D, H, W) float32, the decoder's input; its gradient passes straight through to `z`."""
    codes: Tensor | None
    """(B, H, W) int64 in [0, num_codes); None while the codebook still waits for the warm-up to
    end."""
    loss: Tensor
    """() the weighted sum of `terms`: add it to the reconstruction term."""
    terms: dict[str, Tensor]
    """Unweighted parts of `loss`, each (), for logging; the weights are `Quantizer.weights`."""


class Quantizer(Protocol):
    """What the networks and tasks need of a quantizer."""

    num_codes: int
    code_dim: int
    weights: dict[str, float]

    def __call__(self, z: Tensor) -> QuantizerOutput:
        """Quantize (B, D, H, W); in training mode gather what `update` needs."""

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
    def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor, vectors: Tensor) -> Tensor:
        """Return `vectors` bit for bit."""
        ctx.dtype = z.dtype  # type: ignore[attr-defined]
        return vectors.view_as(vectors)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor
    ) -> tuple[Tensor, None]:
        """The identity for `z`, nothing for `vectors`."""
        return gradients[0].to(ctx.dtype), None  # type: ignore[attr-defined]


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest codebook row (Euclidean) for each vector.

    The distances are float32 and never held all at once: blocks of rows go through one reused
    buffer, which is several times faster than an N x K matrix of fresh memory. argmin |z - e|^2 =
    argmax z.e - |e|^2 / 2.

    Args:
        vectors: (N, D).
        codebook: (K, D).

    Returns:
        (N,) int64 in [0, K).
    """
    # float32 even under autocast: in bfloat16 near-equal distances tie and 1 to 3 % of the codes
    # change.
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        vectors, codebook = vectors.detach().float(), codebook.detach().float()
        bias = codebook.square().sum(1).mul_(-0.5)
        block = max(1, min(len(vectors), BLOCK // len(codebook)))
        buffer = vectors.new_empty(block, len(codebook))
        best = vectors.new_empty(len(vectors))
        codes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
        for start in range(0, len(vectors), block):
            rows = vectors[start : start + block]
            scores = torch.addmm(bias, rows, codebook.t(), out=buffer[: len(rows)])
            part = slice(start, start + len(rows))
            torch.max(scores, dim=1, out=(best[part], codes[part]))
        return codes


def kmeans(vectors: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Centres (K, D) of `vectors` (N, D) by Lloyd's algorithm from K random vectors.

    A centre without vectors is moved onto a random vector. The same input and generator give the
    same centres.
    """
    centres = vectors[random_rows(len(vectors), num_codes, generator)].clone()
    for _ in range(KMEANS_STEPS):
        codes = nearest_codes(vectors, centres)
        counts = codes.bincount(minlength=num_codes)
        sums = torch.zeros_like(centres).index_add_(0, codes, vectors)
        fresh = vectors[random_rows(len(vectors), num_codes, generator)]
        centres = torch.where((counts > 0)[:, None], sums / counts.clamp(min=1)[:, None], fresh)
    return centres


def random_rows(total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` row numbers below `total` (int64, CPU), repeated only where `count` > `total`."""
    rounds = -(-count // total)
    order = [torch.randperm(total, generator=generator) for _ in range(rounds)]
    return torch.cat(order)[:count]


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks in place; nothing to do in a single process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def draw_over_ranks(parts: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """`count` random rows out of the vectors of all ranks, equal on every rank.

    Rows are numbered part by part, and within a part rank by rank, so that N ranks draw the rows
    that one process with the concatenated batches draws. Two collectives of fixed size, whatever
    the data; each rank's `generator` must be in the same state.

    Args:
        parts: Vectors (n, D) of this rank, a part per batch; n may differ between ranks.
        count: Rows to draw.
        generator: A CPU generator.

    Returns:
        (count, D).
    """
    ranked = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if ranked else (0, 1)
    device = parts[0].device
    sizes = torch.zeros(len(parts), world, dtype=torch.int64, device=device)
    sizes[:, rank] = torch.tensor([len(part) for part in parts], device=device)
    sizes = all_reduce(sizes).cpu()
    firsts = sizes.flatten().cumsum(0).view_as(sizes) - sizes
    rows = random_rows(int(sizes.sum()), count, generator)
    drawn = parts[0].new_zeros(count, parts[0].shape[1])
    for part, first in zip(parts, firsts[:, rank].tolist(), strict=True):
        own = rows - first
        here = (own >= 0) & (own < len(part))
        drawn[here.to(device)] = part[own[here].to(device)]
    return all_reduce(drawn)


class VectorQuantizer(nn.Module):
    """A codebook: look-up, straight-through, first rows out of data, revival of dead codes.

    Subclasses say how the rows learn. The codebook is set by the first training batch after
    `warmup_steps` optimizer steps, in which the quantizer passes `z` on as it is, so that it starts
    where the encoder's vectors are. Codes that hardly any vector chooses are moved onto random
    encoder vectors: without the two, most of K=512 codes stay unused for ever (Dhariwal et al.
    2020, arXiv:2005.00341, section 3.1).

    Args:
        num_codes: Rows of the codebook (K), at least 2.
        code_dim: Channels of `z` (D).
        commitment: Weight of the commitment term (beta in van den Oord et al. 2017, equation 3).
        decay: Share of the old average kept per optimizer step, in [0, 1).
        init: First rows: `kmeans` or `data` (random encoder vectors), or `uniform` in [-1/K, 1/K]
            at once.
        warmup_steps: Optimizer steps as a plain autoencoder before the codebook is set.
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

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        commitment: float = 0.25,
        decay: float = 0.99,
        init: Literal["kmeans", "data", "uniform"] = "kmeans",
        warmup_steps: int = 200,
        revive_below: float = 0.03,
        revive_every: int = 20,
        revive_until: float = 0.9,
    ) -> None:
        super().__init__()
        if check_positive("num_codes", num_codes) < 2:
            raise InputError(f"num_codes={num_codes} must be at least 2: one code says nothing.")
        check_positive("code_dim", code_dim)
        check_range("decay", decay, 0, 1)
        if decay == 1:
            raise InputError("decay=1 would never let the codebook move; it must be below 1.")
        if init not in ("kmeans", "data", "uniform"):
            raise InputError(f"init={init} must be one of kmeans, data, uniform.")
        self.num_codes = num_codes
        self.code_dim = code_dim
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
        self.initialised = init == "uniform"
        self._pool: list[Tensor] = []
        self._recent: list[Tensor] = []

    def first_rows(self) -> Tensor:
        """Random rows (K, D) in [-1/K, 1/K]: van den Oord's own initialisation (sonnet v1)."""
        return torch.empty(self.num_codes, self.code_dim).uniform_(-1, 1) / self.num_codes

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize `z` (B, D, H, W), or pass it on during the warm-up of a training run."""
        if z.ndim < 2 or z.shape[1] != self.code_dim:
            raise InputError(
                f"the quantizer expects (batch, {self.code_dim}, ...) but got {tuple(z.shape)}: "
                "code_dim must equal the encoder's output channels."
            )
        with torch.autocast(z.device.type, enabled=False):
            rows = z.float().movedim(1, -1)
            flat = rows.reshape(-1, self.code_dim)
            if self.training and self.steps < self.warmup_steps:
                self._remember(flat)
                return QuantizerOutput(z.float(), None, flat.new_zeros(()), {})
            if self.training and not self.initialised:
                self._initialise(flat)
            codes = nearest_codes(flat, self.codebook)
            chosen = F.embedding(codes, self.codebook).view_as(rows)
            terms = self.losses(rows, chosen)
            if self.training:
                self.observe(flat.detach(), codes)
                if self._revives(self.steps + 1):
                    self._recent.append(flat.detach())
            loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
            vectors = cast(Tensor, StraightThrough.apply(z, chosen.detach().movedim(-1, 1)))
        return QuantizerOutput(vectors, codes.view(rows.shape[:-1]), loss, terms)

    @abstractmethod
    def losses(self, rows: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        """Unweighted terms for vectors and their codebook rows, both (B, H, W, D) float32."""

    @abstractmethod
    def observe(self, flat: Tensor, codes: Tensor) -> None:
        """Take in the vectors (N, D) and codes (N,) of one training batch."""

    @abstractmethod
    def learn(self) -> None:
        """Apply what was observed since the last call, summed over all ranks."""

    @abstractmethod
    def place(self, rows: Tensor, where: Tensor, count: Tensor) -> None:
        """Set the rows `where` (K,) bool to those of `rows` (K, D), each with `count` hits."""

    def encode(self, z: Tensor) -> Tensor:
        """Codes (B, H, W) of `z` (B, D, H, W); never learns, even in training mode."""
        rows = z.movedim(1, -1)
        return nearest_codes(rows.reshape(-1, self.code_dim), self.codebook).view(rows.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        """Codebook rows (B, D, H, W) of `codes` (B, H, W)."""
        return F.embedding(codes, self.codebook).movedim(-1, 1)

    @torch.no_grad()
    def update(self, progress: float = 0.0) -> dict[str, float]:
        """Learn from the batches since the last call; call it once after each optimizer step.

        Args:
            progress: Share of training that is done, in [0, 1].

        Returns:
            `revived_codes`, in the steps in which dead codes are looked for.
        """
        self.steps += 1
        if not self.initialised or self.steps <= self.warmup_steps:
            return {}
        self.learn()
        if not self._revives(self.steps) or not self._recent:
            return {}
        recent, self._recent = self._recent, []
        if progress >= self.revive_until:
            return {"revived_codes": 0.0}
        fresh = draw_over_ranks(recent, self.num_codes, self._generator())
        share = self.counts.mean()
        dead = self.counts < self.revive_below * share
        self.place(fresh, dead, share)
        return {"revived_codes": float(dead.sum())}

    def get_extra_state(self) -> Tensor:
        """Steps taken and whether the codebook is set; a tensor, for `weights_only` loading."""
        return torch.tensor([self.steps, int(self.initialised)])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore `get_extra_state`."""
        self.steps, self.initialised = int(state[0]), bool(state[1])

    def extra_repr(self) -> str:
        """Size and way of starting, for `print(net)`."""
        return f"num_codes={self.num_codes}, code_dim={self.code_dim}, init={self.init}"

    def _revives(self, step: int) -> bool:
        return self.revive_below > 0 and step % self.revive_every == 0

    def _generator(self) -> torch.Generator:
        # Seeded by the step: every rank draws the same, and a resumed run draws what the first
        # would have.
        return torch.Generator().manual_seed(self.steps)

    def _remember(self, flat: Tensor) -> None:
        """Keep the encoder vectors of the last steps of the warm-up, to set the codebook with."""
        if self.init != "uniform" and self.steps >= self.warmup_steps - POOL_STEPS:
            self._pool.append(flat.detach())

    @torch.no_grad()
    def _initialise(self, flat: Tensor) -> None:
        pool, self._pool = [*self._pool, flat.detach()], []
        per_code = POOL if self.init == "kmeans" else 1
        generator = self._generator()
        rows = draw_over_ranks(pool, per_code * self.num_codes, generator)
        if self.init == "kmeans":
            rows = kmeans(rows, self.num_codes, generator)
        everywhere = torch.ones(self.num_codes, dtype=torch.bool, device=rows.device)
        self.place(rows, everywhere, rows.new_ones(()))
        self.initialised = True
