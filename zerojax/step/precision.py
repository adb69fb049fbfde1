"""Precision of weights and arithmetic."""

import concurrent.futures
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp


def at_least_float32(dtype: Any) -> Any:
    """The dtype itself, or float32 for floats of less precision.

    Sums over thousands of numbers need more digits than bfloat16 has.
    """
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


_one_thread = threading.RLock()  # which suits Orbax, whose saves of several threads get mixed up


@contextlib.contextmanager
def numbers_of(dtype: str) -> Iterator[None]:
    """Within it, JAX has 64-bit numbers if and only if `dtype` is 'float64'.

    For the whole process, because Orbax reads checkpoints in threads of its own, where it would
    round float64 to float32; and for this thread, in which `jax.enable_x64` may say otherwise.
    Afterwards both are as they were. So one thread at a time is within; others wait.
    """
    with _one_thread:
        wanted, before = dtype == 'float64', _process_wide()
        jax.config.update('jax_enable_x64', wanted)
        try:
            with jax.enable_x64(wanted):
                yield
        finally:
            jax.config.update('jax_enable_x64', before)


def _process_wide() -> bool:
    """Whether the process has 64-bit numbers: what a new thread sees, which has no other value."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(lambda: jax.config.jax_enable_x64).result()  # type: ignore[attr-defined]
