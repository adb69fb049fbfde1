"""Initializers of the paper's networks, with the signature of `jax.nn.initializers`.

Kernels are laid out as Flax has them: [k, k, c_in, c_out].
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, variance_scaling


def averaging() -> Initializer:
    """Every output channel is the mean of the input channels (the paper's constant "1" layer).

    The centre tap is 1/c_in for each pair of channels and all other taps are 0, so all c_out
    features are identical. The kernel's sides must be odd; ValueError otherwise.
    """

    def init(
        key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> jax.Array:
        del key
        height, width, c_in, _ = shape
        if height % 2 == 0 or width % 2 == 0:
            raise ValueError(f'averaging needs a kernel with a centre tap, not {height}x{width}')
        kernel = jnp.zeros(shape, dtype, out_sharding=out_sharding)
        return kernel.at[height // 2, width // 2].set(1 / c_in)

    return init


def random_control(gain: float) -> Initializer:
    """N(0, gain / (k² c_out)), second argument the variance: the paper's random control.

    `gain` is 2 for the convolutions of blocks, 1 for stem and shortcuts. The normal distribution is
    not truncated.
    """
    return variance_scaling(gain, 'fan_out', 'normal')
