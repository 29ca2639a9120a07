"""Gated PixelCNN over grids of codes."""

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae_lightning.errors import InputError, Key, check_positive, check_range
from vqvae_lightning.networks.dropout import BatchDropout
from vqvae_lightning.randomness import draw_for_batch


def gate(x: Tensor) -> Tensor:
    """Compute tanh(a) * sigmoid(b), where a and b are the halves of the channels (equation 2)."""
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


class GatedLayer(nn.Module):
    """One layer of vertical and horizontal stack (van den Oord et al. 2016, figure 2).

    The shapes of the kernels make the layer causal, without masks. `vertical` covers the rows up to
    the current one, and `horizontal` the columns up to the current one. The first layer excludes
    the current row and column (mask A). Every later layer may include them, because the features
    there depend only on earlier codes. The stacks therefore have no blind spot.

    Args:
        channels: Channels of both stacks.
        kernel: Width of the full (unmasked) kernel, odd.
        first: Whether this is the layer that sees the codes themselves.
        last: Whether this is the last layer, whose horizontal stack has only the skip output.
        num_labels: Number of labels that shift the gates, 0 for an unconditional model.
        context_channels: Channels of the map that shifts the gates at each position, 0 for none.
        dropout: Share of the horizontal stack's gate outputs dropped in training.
    """

    def __init__(
        self,
        channels: int,
        kernel: int,
        first: bool,
        last: bool,
        num_labels: int,
        context_channels: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.reach = kernel // 2
        self.extent = self.reach + (0 if first else 1)  # rows above, and columns to the left, seen
        self.first = first
        self.vertical = nn.Conv2d(channels, 2 * channels, (self.extent, kernel))
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, self.extent))
        self.vertical_to_horizontal = nn.Conv2d(channels, 2 * channels, 1)
        self.residual = None if last else nn.Conv2d(channels, channels, 1)
        self.skip = nn.Conv2d(channels, channels, 1)
        self.label = nn.Embedding(num_labels, 4 * channels) if num_labels else None
        self.context = nn.Conv2d(context_channels, 4 * channels, 1) if context_channels else None
        self.dropout = BatchDropout(dropout)

    @torch.no_grad()
    def start_larger(self) -> None:
        """Start with twice the usual weights and without biases.

        The gate halves a small signal, because tanh(a) * sigmoid(b) is a / 2 near 0, and the usual
        weights of torch shrink it as well. The vertical stack has no residual connections, so a
        fifth of the signal would be left after each layer; with twice the weights, it is a half.

        The embedding of the labels keeps its usual start, N(0, 1). Zeros lowered the loss, but in
        short runs fewer samples then belonged to their class (experiments/reference_settings).
        """
        convolutions = (
            self.vertical,
            self.horizontal,
            self.vertical_to_horizontal,
            self.residual,
            self.skip,
        )
        for convolution in convolutions:
            if convolution is not None:
                convolution.weight.mul_(2)
                cast(Tensor, convolution.bias).zero_()

    def forward(
        self,
        vertical: Tensor,
        horizontal: Tensor,
        labels: Tensor | None,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next vertical and horizontal stack and the skip output (B, channels, H, W)."""
        height, width = vertical.shape[-2:]
        for_vertical, for_horizontal = self.compute_shifts(labels, context)
        # The first layer's window ends before the current row (column), so its output has one row
        # (column) too many, which is cut off.
        above = F.pad(vertical, (self.reach, self.reach, self.reach, 0))
        left = F.pad(horizontal, (self.reach, 0))
        vertical = gate(self.vertical(above)[:, :, :height] + for_vertical)
        mixed = self.horizontal(left)[..., :width] + self.vertical_to_horizontal(vertical)
        gated = self.dropout(gate(mixed + for_horizontal))
        if self.residual is not None:
            residual = self.residual(gated)
            horizontal = residual if self.first else horizontal + residual
        return vertical, horizontal, self.skip(gated)

    def compute_shifts(self, labels: Tensor | None, context: Tensor | None) -> tuple[Any, Any]:
        """Compute what label and context add to the vertical and the horizontal gate.

        Returns:
            Two tensors (B, 2 * channels, 1 or H, 1 or W), or 0.0 twice without either condition.
        """
        total: Tensor | float = 0.0
        if self.label is not None:
            total = self.label(labels)[..., None, None]
        if self.context is not None:
            total = total + self.context(context)
        if isinstance(total, float):
            return 0.0, 0.0
        for_vertical, for_horizontal = total.chunk(2, dim=1)
        return for_vertical, for_horizontal


class CodesHead(nn.Module):
    """Scores the codes of a position in order: p(c_q | earlier positions, c_1, ..., c_(q-1)).

    The factorisation is that of RQ-Transformer (Lee et al. 2022, arXiv:2203.01941, section 3.2).
    Each code has a network with one hidden layer, whose inputs are the features of the position and
    the sum of the embeddings of the position's earlier codes. Grouped 1x1 convolutions run these
    networks for all codes at once, so training is a single pass.

    Args:
        channels: Channels of the features, of the embeddings and of each hidden layer (C).
        num_codes: Number of codes (K).
        codes_per_position: Number of codes of a position (Q), at least 2.
    """

    def __init__(self, channels: int, num_codes: int, codes_per_position: int) -> None:
        super().__init__()
        self.codes_per_position = codes_per_position
        total, later = codes_per_position * channels, (codes_per_position - 1) * channels
        self.from_features = nn.Conv2d(channels, total, 1)
        # The first code has no earlier one, and the features' convolution has the bias.
        self.from_earlier = nn.Conv2d(later, later, 1, groups=codes_per_position - 1, bias=False)
        self.out = nn.Conv2d(total, codes_per_position * num_codes, 1, groups=codes_per_position)

    def forward(self, features: Tensor, embedded: Tensor) -> Tensor:
        """Compute logits (B, K, H, W, Q).

        Args:
            features: Features (B, C, H, W) of each position, which depend on earlier ones only.
            embedded: Embeddings (B, H, W, Q, C) of all codes.
        """
        earlier = embedded[..., :-1, :].cumsum(-2).flatten(-2).movedim(-1, 1)
        first, others = self.from_features(F.relu(features)).tensor_split(
            [features.shape[1]], dim=1
        )
        hidden = torch.cat([first, others + self.from_earlier(earlier)], dim=1)
        logits: Tensor = self.out(F.relu(hidden)).unflatten(1, (self.codes_per_position, -1))
        return logits.movedim(1, -1)


class PixelCNN(nn.Module):
    """Gated PixelCNN (arXiv:1606.05328): p(codes | label, context) as a product over positions.

    Codes enter through an embedding, so their numbering has no meaning to the model. With several
    codes per position (Q), each codebook has its own embedding table, and the input at a position
    is the sum of its Q embeddings. The sum loses nothing against a concatenation, because a linear
    map of concatenated embeddings is a sum of embeddings with other tables. `CodesHead` then scores
    the codes of a position one after the other.

    Args:
        num_codes: Number of codes (K).
        height: Rows of the grid that the model is built for. It runs on any size.
        width: Columns of that grid.
        num_classes: Number of classes to condition on, 0 for an unconditional model.
        context_channels: Channels of a map to condition on, such as the embedded codes of a coarser
            level, 0 for none.
        null_label_rate: Share of the labels that training replaces by the label `num_classes`,
            which means "no class". The model then learns both the conditional and the unconditional
            distribution, as `guidance` needs (Ho and Salimans 2022, arXiv:2207.12598).
        channels: Channels of the stacks.
        layers: Number of gated layers, including the first.
        first_kernel: Kernel of the first layer, odd.
        kernel: Kernel of the other layers, odd.
        dropout: Share of gate outputs dropped in training.
        codes_per_position: Number of codes at each position (Q), each from a codebook of K rows.

    Raises:
        InputError: If a value is outside its range.
    """

    def __init__(
        self,
        num_codes: int,
        height: int,
        width: int,
        num_classes: int = 0,
        context_channels: int = 0,
        null_label_rate: float = 0.0,
        channels: int = 64,
        layers: int = 8,
        first_kernel: int = 7,
        kernel: int = 3,
        dropout: float = 0.1,
        codes_per_position: int = 1,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_codes", num_codes),
            ("height", height),
            ("width", width),
            ("channels", channels),
            ("layers", layers),
            ("codes_per_position", codes_per_position),
        ):
            check_positive(name, value)
        for name, value in (("first_kernel", first_kernel), ("kernel", kernel)):
            if check_positive(name, value) % 2 == 0 or value == 1:
                raise InputError(Key(name), f"={value} must be odd and at least 3.")
        check_range("num_classes", num_classes, 0)
        check_range("context_channels", context_channels, 0)
        check_range("null_label_rate", null_label_rate, 0, 1)
        check_range("dropout", dropout, 0, 1)
        self.num_codes = num_codes
        self.codes_per_position = codes_per_position
        self.height, self.width = height, width
        self.num_classes = num_classes
        self.context_channels = context_channels
        self.null_label_rate = null_label_rate
        labels = num_classes + 1 if num_classes and null_label_rate else num_classes
        # The tables of the codebooks follow each other.
        self.embedding = nn.Embedding(codes_per_position * num_codes, channels)
        self.layers = nn.ModuleList(
            GatedLayer(
                channels,
                kernel if i else first_kernel,
                i == 0,
                i == layers - 1,
                labels,
                context_channels,
                dropout,
            )
            for i in range(layers)
        )
        self.head: nn.Module = (
            nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(channels, channels, 1),
                nn.ReLU(),
                nn.Conv2d(channels, num_codes, 1),
            )
            if codes_per_position == 1
            else CodesHead(channels, num_codes, codes_per_position)
        )

    @torch.no_grad()
    def start_from(self, tables: Tensor, generator: torch.Generator) -> None:
        """Start with similar embeddings, and similar scores, for codes of similar vectors.

        With random weights, the model must find out for each code alone when it occurs. Here the
        embedding and the weights of the last layer start as random projections of the vectors of
        the codes, so that from the first step a code learns from the codes near it. Both have the
        scale of their usual start. The layers start as in
        `GatedLayer.start_larger`. All weights are trained as usual.

        Args:
            tables: Vectors (Q, K, D) of each code of each codebook.
            generator: CPU generator of the projections.
        """
        centred = tables.float().cpu() - tables.float().cpu().mean(1, keepdim=True)
        # Codes of equal vectors, as in a collapsed codebook, say nothing about each other.
        scaled = centred / centred.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)
        last = self.head[-1] if isinstance(self.head, nn.Sequential) else self.head.out
        for weight in (self.embedding.weight, cast(nn.Conv2d, last).weight):
            shape = (*scaled.shape[::2], weight.shape[1])
            projected = scaled @ torch.randn(shape, generator=generator) / scaled.shape[2] ** 0.5
            weight.copy_(projected.view(weight.shape) * weight.std())
        for layer in self.layers:
            cast(GatedLayer, layer).start_larger()

    @property
    def layers_needed(self) -> int:
        """Smallest number of layers with which every position depends on all earlier ones."""
        first, *others = self._list_reaches()
        missing = max(self.height, self.width) - 1 - first
        return 1 + max(0, -(-missing // (others[0] if others else 1)))

    def _list_reaches(self) -> list[int]:
        return [cast(GatedLayer, layer).reach for layer in self.layers]

    def forward(
        self, codes: Tensor, labels: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Compute logits (B, K, H, W) of each code given the earlier ones.

        Several codes per position have logits (B, K, H, W, Q), given the codes of all earlier
        positions and the earlier codes of the same position.

        Args:
            codes: Codes (B, H, W) int64, or (B, H, W, Q).
            labels: Labels (B,) int64 for a conditional model, `num_classes` for "no class".
            context: Context (B, context_channels, h, w) for a model that takes one. It is enlarged
                to (H, W).

        Raises:
            InputError: If a condition does not fit, or the codes have another number of axes.
        """
        self.check_conditions(labels, context)
        each = self.codes_per_position
        if codes.shape[3:] != ((each,) if each > 1 else ()):
            raise InputError(
                f"codes of shape {tuple(codes.shape)} do not fit this prior, which has "
                f"codes_per_position={each}."
            )
        if self.training and labels is not None and self.null_label_rate:
            drawn = draw_for_batch(partial(torch.rand, device=labels.device), len(labels))
            nulls = drawn < self.null_label_rate
            labels = labels.masked_fill(nulls, self.num_classes)
        context = enlarge(context, codes.shape[1], codes.shape[2])
        embedded = self.embed(codes)
        whole = embedded if each == 1 else embedded.sum(-2)
        vertical = horizontal = whole.movedim(-1, 1)
        total: Tensor | float = 0.0
        for layer in self.layers:
            vertical, horizontal, skip = layer(vertical, horizontal, labels, context)
            total = total + skip
        logits: Tensor = self.head(total) if each == 1 else self.head(total, embedded)
        return logits

    def embed(self, codes: Tensor) -> Tensor:
        """Embed codes (..., Q), each with the table of its codebook, as (..., Q, channels).

        With one code per position, the codes have no last axis Q.
        """
        if self.codes_per_position > 1:
            total = self.codes_per_position * self.num_codes
            codes = codes + torch.arange(0, total, self.num_codes, device=codes.device)
        return self.embedding(codes)  # type: ignore[no-any-return]

    def check_conditions(self, labels: Tensor | None, context: Tensor | None) -> None:
        """Check that labels and context are given exactly if the model takes them.

        Raises:
            InputError: If one is missing, superfluous or of the wrong number of channels.
        """
        if (labels is None) != (self.num_classes == 0):
            says = "needs a label per image" if self.num_classes else "takes no labels"
            raise InputError(f"this prior has num_classes={self.num_classes} and {says}.")
        found = 0 if context is None else context.shape[1]
        if found != self.context_channels:
            raise InputError(
                f"this prior has context_channels={self.context_channels}, "
                f"but the context has {found}."
            )


def enlarge(context: Tensor | None, height: int, width: int) -> Tensor | None:
    """Enlarge `context` (B, C, h, w) to the size of the grid by repeating each value."""
    if context is None or context.shape[2:] == (height, width):
        return context
    return F.interpolate(context, (height, width), mode="nearest-exact")
