"""Precision of weights and arithmetic."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp


def at_least_float32(dtype: Any) -> Any:
    """The dtype itself, or float32 for floats of less precision.

    Sums over thousands of numbers need more digits than bfloat16 has.
    """
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


@contextlib.contextmanager
def numbers_of(dtype: str) -> Iterator[None]:
    """Within it, JAX has 64-bit numbers if `dtype` is 'float64'; otherwise all stays as it is.

    For the whole process and not, as `jax.enable_x64` does, for this thread alone: Orbax reads
    checkpoints in threads of its own, where it would round float64 to float32.
    """
    before = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    jax.config.update('jax_enable_x64', before or dtype == 'float64')
    try:
        yield
    finally:
        jax.config.update('jax_enable_x64', before)
