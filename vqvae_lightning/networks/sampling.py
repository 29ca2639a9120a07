"""Draw codes from a PixelCNN, one row and one code at a time, and score them."""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae_lightning.devices import measure_available_memory
from vqvae_lightning.errors import InputError, Key, check_positive, check_range
from vqvae_lightning.networks.pixelcnn import CodesHead, GatedLayer, PixelCNN, enlarge, gate

LARGEST_BATCH = 256  # larger batches are no faster
MEMORY_SHARE = 0.25  # of the free memory that the caches of a batch may take


class Drawn(NamedTuple):
    """A batch of samples."""

    codes: Tensor
    """(B, H, W) int64, or (B, H, W, Q) with Q = codes_per_position > 1."""
    nats: Tensor
    """(B,) entropies of the distributions drawn from, summed over the drawn codes.

    Their mean estimates the entropy of the samples. Without options such as a temperature, that is
    the expected -log p of a sample.
    """


def sample(
    prior: PixelCNN, shape: tuple[int, int, int], labels: Tensor | None = None, **options: Any
) -> Tensor:
    """Draw codes (number of images, rows, columns) int64; arguments as for `sample_batches`.

    A prior with several codes per position draws (number of images, rows, columns, Q).
    """
    return torch.cat([batch.codes for batch in sample_batches(prior, shape, labels, **options)])


@torch.no_grad()
def sample_batches(
    prior: PixelCNN,
    shape: tuple[int, int, int],
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    guidance: float = 1.0,
    generator: torch.Generator | None = None,
    context: Tensor | None = None,
    known: Tensor | None = None,
    batch_size: int | None = None,
    only: slice | None = None,
) -> Iterator[Drawn]:
    """Draw codes in raster order, batch by batch, and the codes of a position in their order.

    The vertical stack runs once per row and the horizontal one once per code, so all positions
    together cost about one forward pass (Ramachandran et al. 2017, arXiv:1704.06001). One uniform
    number per code is drawn for all images before the first batch. An image therefore depends on
    the generator and on its index, not on its batch.

    Args:
        prior: Prior in evaluation mode.
        shape: Number of images, rows and columns.
        labels: Labels (number of images,) int64 for a conditional prior.
        temperature: Divisor of the logits. With 0, the likeliest code is chosen.
        top_k: Number of likeliest codes to draw from, None for all.
        top_p: Share of the probability, in (0, 1], that the codes drawn from must hold. They are
            the fewest likeliest codes that reach it, at least one, and are chosen after `top_k`
            (Holtzman et al. 2019, arXiv:1904.09751).
        guidance: Weight g of the logits u + g (c - u), where c are the logits with the class and u
            those without. 1 is the conditional model, 0 the unconditional one, and larger weights
            exaggerate the class (Ho and Salimans 2022, arXiv:2207.12598). Weights other than 1 need
            a prior with `null_label_rate` > 0.
        generator: CPU generator of the uniform numbers, None for torch's default generator.
        context: Context (number of images, context_channels, h, w) for a prior with context.
        known: Codes (number of images, rows, columns) int64 to complete, -1 where a code is drawn.
            In each image the known codes come first in raster order. With several codes per
            position, the shape is (number of images, rows, columns, Q). The first codes of a
            position may then be known without the others.
        batch_size: Images per batch. None for as many as fit into a quarter of the free memory, at
            most 256.
        only: Slice of the images to draw. They are the same as when all images are drawn.

    Yields:
        Batches, on the prior's device.

    Raises:
        InputError: If the prior is in training mode (its dropout would change the samples), a
            condition does not fit, or an option is out of range.
    """
    if prior.training:
        raise InputError("sample() needs prior.eval(): dropout would change the samples.")
    prior.check_conditions(labels, context)
    count, height, width = shape
    check_range("temperature", temperature, 0)
    check_top_p(top_p)
    keep = prior.num_codes if top_k is None else check_positive("top_k", top_k)
    device = prior.embedding.weight.device
    parts = {"labels": labels, "context": enlarge(context, height, width), "known": known}
    for name, part in parts.items():
        if part is not None and len(part) != count:
            raise InputError(f"{len(part)} {name} for {count} images: there must be one per image.")
    if known is not None:
        each = prior.codes_per_position
        check_known(known, (*shape, each) if each > 1 else shape, prior.num_codes)
    check_guidance(guidance, prior.num_classes, prior.null_label_rate)
    if batch_size is None:
        batch_size = fit_batch_size(prior, height, width, device, guidance not in (0, 1))
    check_positive("batch_size", batch_size)
    size = (count, height, width, prior.codes_per_position)
    uniform = torch.rand(size, generator=generator, dtype=torch.float64)
    options = {"temperature": temperature, "top_k": keep, "top_p": top_p}
    first, end, _ = (only or slice(None)).indices(count)
    for start in range(first, end, batch_size):
        rows = slice(start, min(start + batch_size, end))
        own = {name: None if p is None else p[rows].to(device) for name, p in parts.items()}
        yield _draw_batch(
            prior, uniform[rows].to(device), guidance=guidance, options=options, **own
        )


def check_top_p(top_p: object) -> float:
    """Return `top_p` if it is in (0, 1].

    Raises:
        InputError: If it is not.
    """
    share = check_range("top_p", top_p, 0, 1)
    if share == 0:
        raise InputError(Key("top_p"), "=0 leaves no code: use a value in (0, 1]; 1 keeps all.")
    return share


def allows_guidance(num_classes: int, null_label_rate: float) -> bool:
    """Tell whether a prior has learnt both with and without the class."""
    return num_classes > 0 and null_label_rate > 0


def check_guidance(guidance: float, num_classes: int, null_label_rate: float) -> None:
    """Check that guidance is used only with a prior that has also learnt without the class.

    Raises:
        InputError: If it is used with another prior.
    """
    if guidance != 1 and not allows_guidance(num_classes, null_label_rate):
        raise InputError(
            Key("guidance"),
            f"={guidance} needs a prior that was trained with classes and "
            "model.net.null_label_rate above 0.",
        )


def check_known(known: Tensor, shape: tuple[int, ...], num_codes: int) -> None:
    """Check the codes to complete.

    Raises:
        InputError: If their shape is wrong, a value is not a code, or a known code comes after one
            to draw.
    """
    if known.shape != shape:
        raise InputError(f"known codes of shape {tuple(known.shape)} must have shape {shape}.")
    if int(known.min()) < -1 or int(known.max()) >= num_codes:
        raise InputError(f"known codes must be -1 (to draw) or 0 to {num_codes - 1}.")
    given = (known >= 0).flatten(1).int()
    if bool((given.diff(dim=1) > 0).any()):
        raise InputError(
            "known codes must come before the others in raster order: a code drawn before a known "
            "one could not depend on it."
        )


def fit_batch_size(
    prior: PixelCNN,
    height: int,
    width: int,
    device: torch.device,
    guided: bool = False,
    processes: int = 1,
) -> int:
    """Compute the largest batch whose caches fit into `MEMORY_SHARE` of the free memory.

    The result is between 1 and `LARGEST_BATCH`. Guidance needs twice the memory. On a CPU,
    `processes` share the memory.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = measure_available_memory() // processes
    channels, layers = prior.embedding.embedding_dim, len(prior.layers)
    reach = cast(GatedLayer, prior.layers[0]).reach
    cells = (height + reach) * (width + 2 * reach)
    # Per layer: the vertical stack's input, and its contribution to the horizontal stack, which is
    # twice as wide.
    floats = layers * channels * (cells + 4 * width)
    if prior.context_channels:
        floats += layers * 4 * channels * height * width
    floats = floats * (2 if guided else 1) + 16 * prior.num_codes  # for sorting in float64
    floats += 4 * height * width * prior.codes_per_position  # a code and its uniform number
    return max(1, min(LARGEST_BATCH, int(MEMORY_SHARE * free) // (4 * floats)))


def compute_distribution(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> Tensor:
    """Compute the probabilities (B, K) float64 to draw from, given `logits` (B, K).

    The options are those of `sample_batches`. Among equally probable codes at the limit of `top_k`
    or `top_p`, the lower numbers are kept.
    """
    if temperature == 0:
        return F.one_hot(logits.argmax(1), logits.shape[1]).double()
    share = (logits.double() / temperature).softmax(1)
    keep = share.shape[1] if top_k is None else top_k
    if keep >= share.shape[1] and top_p == 1:
        return share
    best, order = share.sort(dim=1, descending=True, stable=True)
    best[:, keep:] = 0
    # A code is kept if the likelier ones hold less than `top_p`, so the first always is.
    before = best.cumsum(1) - best
    best = torch.where(before < top_p * best.sum(1, keepdim=True), best, 0)
    best /= best.sum(1, keepdim=True)
    return torch.zeros_like(share).scatter_(1, order, best)


def choose_codes(share: Tensor, uniform: Tensor) -> Tensor:
    """Choose one code per row by inverting the cumulative distribution at `uniform`.

    Args:
        share: Probabilities (B, K) float64.
        uniform: Uniform numbers (B,) float64 in [0, 1).

    Returns:
        Codes (B,) int64, never one of probability 0.
    """
    cumulative = share.cumsum(1)
    # The rounded sum may differ from 1. Scaling by it, and staying below it, always finds a code.
    total = cumulative[:, -1:]
    wanted = torch.minimum(uniform[:, None] * total, torch.nextafter(total, total - 1))
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0]


def _draw_batch(
    prior: PixelCNN,
    uniform: Tensor,
    *,
    labels: Tensor | None,
    context: Tensor | None,
    known: Tensor | None,
    guidance: float,
    options: dict[str, Any],
) -> Drawn:
    """Draw one batch with the uniform numbers `uniform` (B, H, W, Q)."""
    batch, height, width, each = uniform.shape
    guided = guidance not in (0, 1)
    if guidance != 1:
        assert labels is not None
        nulls = torch.full_like(labels, prior.num_classes)
        # One batch holds both models, first with the class and then without.
        labels = torch.cat([labels, nulls]) if guided else nulls
    times = 2 if guided else 1
    if context is not None:
        context = context.repeat(times, 1, 1, 1)
    run = _Incremental(prior, times * batch, height, width, labels, context)
    codes = torch.empty(uniform.shape, dtype=torch.int64, device=uniform.device)
    nats = torch.zeros(batch, dtype=torch.float64, device=uniform.device)
    if known is not None:
        known = known.reshape(codes.shape)
    given = torch.zeros_like(codes, dtype=torch.bool) if known is None else known >= 0
    finished = given.flatten(2).all(2).all(0).tolist()  # rows in which nothing is drawn
    for row in range(height):
        run.start_row(row)
        for column in range(width):
            if finished[row]:
                assert known is not None
                codes[:, row, column] = known[:, row, column]
            else:
                run.start_position(column)
            for number in range(0 if finished[row] else each):
                place = (slice(None), row, column, number)
                logits = run.compute_logits(number)
                if guided:
                    conditional, unconditional = logits.chunk(2)
                    logits = unconditional + guidance * (conditional - unconditional)
                share = compute_distribution(logits, **options)
                chosen = choose_codes(share, uniform[place])
                entropy = torch.special.entr(share).sum(1)
                if known is not None:
                    chosen = torch.where(given[place], known[place], chosen)
                    entropy = entropy.masked_fill(given[place], 0)
                nats += entropy
                codes[place] = chosen
                if number + 1 < each:
                    run.store_code(number, chosen.repeat(times))
            run.store(row, column, codes[:, row, column].repeat(times, 1))
    return Drawn(codes[..., 0] if each == 1 else codes, nats.float())


class _CodeHead(NamedTuple):
    """Weights that turn the features of a position into logits of one of its codes."""

    bias: Tensor
    from_features: Tensor
    from_earlier: Tensor | None
    """Weight of the sum of the embeddings of the position's earlier codes, if there are any."""
    out_bias: Tensor
    out: Tensor

    def compute_logits(self, features: Tensor, earlier: Tensor | None) -> Tensor:
        """Compute logits (B, K) from features (B, C), after their ReLU, and that sum (B, C)."""
        hidden = torch.addmm(self.bias, features, self.from_features)
        if self.from_earlier is not None:
            assert earlier is not None
            hidden.addmm_(earlier, self.from_earlier)
        return torch.addmm(self.out_bias, hidden.relu_(), self.out)


def _split_head(prior: PixelCNN) -> list[_CodeHead]:
    """Split a prior's head into the parts for each code of a position."""
    head, each = prior.head, prior.codes_per_position
    earlier: tuple[Tensor, ...] = ()
    if isinstance(head, CodesHead):
        hidden, out = head.from_features, head.out
        earlier = head.from_earlier.weight[:, :, 0, 0].chunk(each - 1)
    else:
        hidden, out = (cast(list[torch.nn.Conv2d], head)[number] for number in (1, 3))
    parts = (
        cast(Tensor, hidden.bias).chunk(each),
        _to_matrix(hidden).chunk(each, 1),
        [None, *(weight.t() for weight in earlier)],
        cast(Tensor, out.bias).chunk(each),
        _to_matrix(out).chunk(each, 1),
    )
    return [_CodeHead(*weights) for weights in zip(*parts, strict=True)]


class _Incremental:
    """Runs a prior's layers incrementally, one row of the vertical stack and one code at a time.

    Computes the same sums as `PixelCNN.forward` with the same weights. A convolution over the grid
    becomes a matrix product at one position. Only the sum of the layers' skip outputs is needed, so
    it is one product for all layers. These products are so small that creating views and buffers
    would cost as much, so all of them are created in advance.
    """

    def __init__(
        self,
        prior: PixelCNN,
        batch: int,
        height: int,
        width: int,
        labels: Tensor | None,
        context: Tensor | None,
    ) -> None:
        layers = [cast(GatedLayer, layer) for layer in prior.layers]
        self.prior, self.width = prior, width
        self.stacks = [_Stack(layer, batch, height, width, labels, context) for layer in layers]
        # Negated, because `gated` holds the negative of the gate's output (see `_Stack`).
        self.skip = -torch.cat([_to_matrix(layer.skip) for layer in layers])
        self.skip_bias = torch.stack([cast(Tensor, layer.skip.bias) for layer in layers]).sum(0)
        gated = self.skip.new_empty(batch, len(layers), len(self.skip_bias))
        self.gated, self.all_gated = gated.unbind(1), gated.flatten(1)
        self.heads = _split_head(prior)
        self.earlier: Tensor | None = None

    def start_row(self, row: int) -> None:
        """Run the vertical stack over a row, once all codes above it are known."""
        for number, stack in enumerate(self.stacks):
            above = stack.run_vertical(row)
            if number + 1 < len(self.stacks):
                self.stacks[number + 1].store_row(row, above)

    def start_position(self, column: int) -> None:
        """Run the horizontal stack at this column, once all codes to its left are known."""
        entering: Tensor | None = None
        for number, (stack, gated) in enumerate(zip(self.stacks, self.gated, strict=True)):
            stack.compute_gate(column, gated)
            if number + 1 < len(self.stacks):
                after = self.stacks[number + 1].places[column]
                stack.add_residual(gated, entering, after)
                entering = after
        self.features = torch.addmm(self.skip_bias, self.all_gated, self.skip).relu_()
        self.earlier = None

    def compute_logits(self, number: int) -> Tensor:
        """Compute logits (B, K) of code `number` of the position, once the earlier ones are known.

        Those are stored with `store_code`.
        """
        return self.heads[number].compute_logits(self.features, self.earlier)

    def store_code(self, number: int, codes: Tensor) -> None:
        """Store code `number` (B,) of the position, on which its later codes depend."""
        embedded = self.prior.embedding(codes + number * self.prior.num_codes)
        self.earlier = embedded if self.earlier is None else self.earlier + embedded

    def store(self, row: int, column: int, codes: Tensor) -> None:
        """Store the codes (B, Q) of a position, and at the end of a row the whole row."""
        first, embed = self.stacks[0], self.prior.embed
        several = self.prior.codes_per_position > 1
        first.places[column].copy_(embed(codes).sum(1) if several else embed(codes[:, 0]))
        if column + 1 == self.width:
            first.store_row(row, first.left[:, first.reach :])


class _Stack:
    """Cache of one layer while a batch is drawn: its inputs so far, padded as in `forward`.

    The gate tanh(a) sigmoid(b) is computed as (2 sigmoid(2a) - 1) sigmoid(b), which needs a single
    sigmoid over both halves. The doubling is part of the weights. `compute_gate` yields the
    negative of the gate's output, so the weights applied to it are negated too.

    Attributes:
        above: Inputs (B, reach + H, W + 2 * reach, C) of the vertical stack.
        left: Inputs (B, reach + W, C) of the horizontal stack in the current row.
        places: View of `left` at the input of each column.
    """

    def __init__(
        self,
        layer: GatedLayer,
        batch: int,
        height: int,
        width: int,
        labels: Tensor | None,
        context: Tensor | None,
    ) -> None:
        self.layer, self.reach = layer, layer.reach
        channels = layer.skip.out_channels
        if layer.residual is not None:
            self.residual, self.bias = (
                -_to_matrix(layer.residual),
                cast(Tensor, layer.residual.bias),
            )
        new = layer.skip.weight.new_zeros
        self.double = torch.cat([new(channels) + 2, new(channels) + 1])
        # (2C, C, 1, extent) to (extent * C, 2C), the order of a flattened window of `left`.
        rows = layer.horizontal.weight[:, :, 0].permute(2, 1, 0).flatten(0, 1)
        self.horizontal = rows * self.double
        self.above = new(batch, layer.reach + height, width + 2 * layer.reach, channels)
        self.left = new(batch, layer.reach + width, channels)
        self.places = self.left[:, layer.reach :].unbind(1)
        self.windows = [self.left[:, c : c + layer.extent].flatten(1) for c in range(width)]
        self.from_above = new(batch, width, 2 * channels)
        self.offsets = self.from_above.unbind(1)
        self.both = new(batch, 2 * channels)
        self.halves = self.both.chunk(2, dim=1)
        # `expand` to the size of the grid takes no memory where all positions share a value.
        size = (batch, 2 * channels, height, width)
        self.for_vertical, self.for_horizontal = (
            torch.as_tensor(shift, device=self.left.device, dtype=self.left.dtype).expand(size)
            for shift in layer.compute_shifts(labels, context)
        )

    def store_row(self, row: int, values: Tensor) -> None:
        """Store the vertical stack's input (B, W, C) of a finished row."""
        self.above[:, self.reach + row, self.reach : self.reach + values.shape[1]] = values

    def run_vertical(self, row: int) -> Tensor:
        """Compute the vertical stack's output (B, W, C) and its input to the horizontal stack."""
        layer, rows = self.layer, slice(row, row + 1)
        window = self.above[:, row : row + layer.extent].movedim(-1, 1)
        vertical = gate(layer.vertical(window) + self.for_vertical[:, :, rows])
        handed = layer.vertical_to_horizontal(vertical) + self.for_horizontal[:, :, rows]
        bias = cast(Tensor, layer.horizontal.bias)
        torch.mul(handed[:, :, 0].movedim(1, -1) + bias, self.double, out=self.from_above)
        return vertical[:, :, 0].movedim(1, -1)

    def compute_gate(self, column: int, gated: Tensor) -> None:
        """Write the negative of the gate's output at this column to `gated` (B, C)."""
        offset, window = self.offsets[column], self.windows[column]
        torch.addmm(offset, window, self.horizontal, out=self.both).sigmoid_()
        a, b = self.halves
        torch.addcmul(b, a, b, value=-2, out=gated)

    def add_residual(self, gated: Tensor, entering: Tensor | None, after: Tensor) -> None:
        """Write the next layer's input to `after` (B, C).

        Args:
            gated: Result of `compute_gate`.
            entering: This layer's input at the same column. None for the first layer, whose window
                ends before it.
            after: Tensor (B, C) to write to.
        """
        torch.addmm(self.bias, gated, self.residual, out=after)
        if entering is not None:
            after.add_(entering)


def _to_matrix(convolution: torch.nn.Conv2d) -> Tensor:
    """Return the weight of a 1x1 convolution as a matrix (channels in of a group, channels out)."""
    return convolution.weight[:, :, 0, 0].t()


def score(
    prior: PixelCNN, codes: Tensor, labels: Tensor | None = None, context: Tensor | None = None
) -> Tensor:
    """Compute log p(codes | label, context) in nats for each image, in one forward pass.

    Args:
        prior: Prior in evaluation mode.
        codes: Codes (B, H, W) int64, or (B, H, W, Q).
        labels: Labels (B,) int64 for a conditional prior.
        context: Context (B, context_channels, h, w) for a prior with context.

    Returns:
        Log-likelihoods (B,) float32.
    """
    logits = prior(codes, labels, context)
    nats = F.cross_entropy(logits.float(), codes, reduction="none")
    return -nats.sum(tuple(range(1, codes.ndim)))
