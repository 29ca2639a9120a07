"""Quantizers of the package vector-quantize-pytorch, with this package's interface."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from vqvae_lightning.devices import exact_products
from vqvae_lightning.distributed import get_rank_and_world
from vqvae_lightning.errors import InputError, Key, check_positive, check_range
from vqvae_lightning.quantizers.protocol import QuantizerOutput


class LibraryQuantizer(nn.Module):
    """Wrapper for any quantizer of vector-quantize-pytorch (extra `library`) that takes vectors.

    The wrapped class learns in its own forward pass. It gets no warm-up, no revival over ranks and
    nothing else of `VectorQuantizer`.

    Args:
        name: Class in the library, such as FSQ (arXiv:2309.15505), LFQ (arXiv:2310.05737), SimVQ
            (arXiv:2411.02038), ResidualVQ (arXiv:2107.03312) or VectorQuantize.
        code_dim: Channels of `z` (D), passed to the class as `dim`.
        weight: Weight of the loss that the class returns, if it returns one.
        options: Further arguments of the class.

    Raises:
        InputError: If the package is missing, has no such class, or refuses the options.
    """

    def __init__(
        self, name: str, code_dim: int, weight: float = 1.0, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        try:
            import vector_quantize_pytorch as library
        except ImportError as error:
            raise InputError(
                "quantizer=library needs the package vector-quantize-pytorch: install the extra "
                "`library`."
            ) from error
        made = getattr(library, name, None)
        own = getattr(made, "__module__", "").partition(".")[0] == library.__name__
        if not (own and isinstance(made, type) and issubclass(made, nn.Module)):
            raise InputError(
                Key("name"),
                f"={name} must be a class of vector-quantize-pytorch, such as FSQ, LFQ, SimVQ, "
                "ResidualVQ, VectorQuantize.",
            )
        self.name = name
        self.code_dim = self.encoder_channels = check_positive("code_dim", code_dim)
        self.weights = {"auxiliary": check_range("weight", weight, 0)}
        try:
            quantizer: Any = made(dim=code_dim, **(options or {}))
            self.num_codes = int(quantizer.codebook_size)
        except (TypeError, ValueError, AssertionError, AttributeError) as error:
            raise InputError(
                Key("options"), f"={options or {}} cannot build a {name} with codes: {error}"
            ) from error
        self.quantizer = quantizer
        counts = [
            getattr(quantizer, key, 1) for key in ("num_quantizers", "num_codebooks", "heads")
        ]
        if hasattr(quantizer, "groups"):
            raise InputError(Key("name"), f"={name}: grouped quantizers are not supported.")
        self.codes_per_position = int(torch.tensor(counts).prod())

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize `z` (B, D, H, W)."""
        # The library computes distances as matrix products, which must be exact (see `lookup`).
        with torch.autocast(z.device.type, enabled=False), exact_products():
            vectors, codes, *losses = self.quantizer(self._to_rows(z))
        # A class returns one loss, one per codebook or none. In evaluation most return a
        # meaningless zero.
        auxiliary = losses[0].float().sum() if losses and self.training else None
        terms = {} if auxiliary is None else {"auxiliary": auxiliary}
        grid = codes.long().unflatten(1, z.shape[2:])
        return QuantizerOutput(
            vectors.unflatten(1, z.shape[2:]).movedim(-1, 1),
            grid,
            self.weights["auxiliary"] * terms.get("auxiliary", vectors.new_zeros(())),
            terms,
        )

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Return codes (B, H, W) or (B, H, W, Q) of `z`; never learns, even in training mode."""
        training = self.training
        self.eval()
        try:
            codes = self.forward(z).codes
        finally:
            self.train(training)
        assert codes is not None
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Return the vectors (B, D, H, W) of `codes`."""
        rows = codes.flatten(1, 2)
        decode = getattr(self.quantizer, "get_output_from_indices", None)
        vectors = cast(Tensor, (decode or self.quantizer.indices_to_codes)(rows))
        grid: Tensor = vectors.unflatten(1, codes.shape[1:3])
        return grid.movedim(-1, 1)

    def update(self, progress: float = 0.0) -> dict[str, float]:
        """Check that the ranks stay in step. The class has already learnt in its forward pass.

        Raises:
            InputError: If the codebooks would drift apart between ranks. The class looks for other
                ranks only when it is built, which is before the process group exists.
        """
        alone = any(getattr(part, "use_ddp", True) is False for part in self.modules())
        if alone and get_rank_and_world()[1] > 1:
            raise InputError(
                f"quantizer {self.name} would learn a different codebook on each rank: set "
                "model.net.quantizer.options.sync_codebook=true."
            )
        return {}

    def _to_rows(self, z: Tensor) -> Tensor:
        """Rearrange `z` into (B, H * W, D), the one layout that all classes accept."""
        return z.float().flatten(2).transpose(1, 2)
