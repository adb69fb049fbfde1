"""Bits of floats as numbers, so that equality is exact."""

from typing import Any

import jax.numpy as jnp
import numpy as np


def bit_patterns(x: Any) -> Any:
    """The bit patterns as unsigned integers, those of -0.0 as 0.0's; NumPy or JAX as x is.

    Values will not do: XLA's comparison takes subnormal numbers for 0.
    """
    patterns = x.view(f'uint{8 * x.dtype.itemsize}')
    negative_zero = np.asarray(-0.0, x.dtype).view(patterns.dtype)
    where: Any = np.where if isinstance(x, np.ndarray) else jnp.where
    return where(patterns == negative_zero, np.zeros_like(negative_zero), patterns)
