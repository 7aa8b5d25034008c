"""What float32 means: all of its bits in products of matrices too."""

from __future__ import annotations

import jax


def use_full_float32() -> None:
    """Multiply float32 matrices with all their bits from now on.

    Accelerators otherwise round the factors to fewer bits (bfloat16 or TensorFloat-32). Products of
    bfloat16 matrices are not affected.
    """
    jax.config.update("jax_default_matmul_precision", "highest")
