"""How object masks are made from the model's own attention: names and defaults.

The defaults were chosen by intersection over union with true masks; `catversion masks CONCEPTS
--compare` prints it for any choice.
"""

from __future__ import annotations

import dataclasses

from catversion_jax.errors import CatVersionError


@dataclasses.dataclass(frozen=True)
class MaskSettings:
    """Options of :func:`~.cross_attention_masks.class_word_masks`.

    Attributes:
      noise_levels: how far the image is noised before the UNet looks, in shares of the training
        timesteps.
      num_draws: noises per level, averaged; fixed seeds.
      min_map_side: cross-attention maps with fewer positions than this along their shorter side
        are left out, or all but the finest where none has as many.
      edge_window: side of the window in which the map is fitted to the image's colours, in shares
        of the image's shorter side; 0 leaves that out.
    """

    noise_levels: tuple[float, ...] = (0.2, 0.4)
    num_draws: int = 3
    min_map_side: int = 8
    edge_window: float = 0.4

    def __post_init__(self) -> None:
        if not self.noise_levels or not all(0 <= level < 1 for level in self.noise_levels):
            raise CatVersionError(
                f"noise_levels={self.noise_levels}: must be numbers from 0 to below 1, at least "
                "one, such as 0.2 0.4."
            )
        for name in ("num_draws", "min_map_side"):
            if getattr(self, name) < 1:
                raise CatVersionError(f"{name}={getattr(self, name)}: must be at least 1.")
        if not 0 <= self.edge_window <= 1:
            raise CatVersionError(
                f"edge_window={self.edge_window}: must be within 0..1, a share of the image's "
                "shorter side."
            )
