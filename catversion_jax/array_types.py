"""Axis letters and array aliases used in every signature.

| letter | axis                              |
|--------|-----------------------------------|
| C      | concepts trained together         |
| B      | images (or prompts) in a batch    |
| M      | cached images of one concept      |
| K      | prompts of one concept            |
| T      | prompt tokens                     |
| P      | concatenated (residual) positions |
| L      | adapted layers                    |
| N      | attention heads                   |
| H      | head dimension                    |
| D      | model width (D = N * H)           |

Images and latents are ``[B height width channels]`` inside; ``[B channels height width]`` exists
only where weights or files are converted. Einsum strings use the same letters:
``'BTNH,BSNH->BNTS'``.
"""

from jaxtyping import Array, Bool, Float, Int, Key

__all__ = ["Array", "Bool", "Float", "Int", "Key"]
