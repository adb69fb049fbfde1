"""The straight line between two networks' weights, and the loss on it."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from zerojax.models.batch_norm import BatchNorm
from zerojax.step.precision import at_least_float32

Tree = Any


def interpolate(a: Tree, b: Tree, t: float) -> Tree:
    """(1 - t) a + t b on the host: computed in float64, returned in a's dtypes."""

    def between(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        point = (1 - t) * np.asarray(x, np.float64) + t * np.asarray(y, np.float64)
        return point.astype(x.dtype)

    return jax.tree.map(between, a, b)


def barrier(t: Sequence[float], losses: Sequence[float]) -> float:
    """Height of the loss above the straight line between its ends, in units of the loss, >= 0.

    max over t of loss(t) - ((1 - t) loss(0) + t loss(1)), as Entezari et al., "The Role of
    Permutation Invariance in Linear Mode Connectivity", 2022, define it. Frankle et al., "Linear
    Mode Connectivity and the Lottery Ticket Hypothesis", 2020, subtract the mean of the two ends
    instead, which is the same where these are equal.

    Args:
        t: positions, rising from 0 to 1.
        losses: the loss at each.
    """
    first, last = losses[0], losses[-1]
    between = zip(t[:-1], losses[:-1], strict=True)  # at 1 it is 0, but for rounding
    return max(loss - (first + position * (last - first)) for position, loss in between)


def batch_statistics(model: nn.Module, variables: Tree, images: jax.Array) -> Tree:
    """Mean and variance of what each BatchNorm of the network sees, normalising by this batch.

    A tree like `variables['batch_stats']`, in its dtypes; pure, to be jitted. The running averages
    of two networks say nothing of the one between them, whose activations vary less: Jordan et al.,
    "REPAIR", 2022. The model is called as `zerojax.models` are, with train=True and no dropout.

    Raises:
        ValueError: a statistic belongs to something else than a BatchNorm, Flax's or zerojax's,
            over all axes but the last.
    """
    seen: dict[tuple[str, ...], jax.Array] = {}

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if (
            isinstance(context.module, nn.BatchNorm | BatchNorm)
            and context.method_name == '__call__'
        ):
            x = args[0].astype(at_least_float32(args[0].dtype))
            axes = tuple(range(x.ndim - 1))
            seen[(*context.module.path, 'mean')] = jnp.mean(x, axes)
            seen[(*context.module.path, 'var')] = jnp.var(x, axes)
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        model.apply(variables, images, train=True, mutable=['batch_stats'])
    stored = flatten_dict(variables['batch_stats'])
    if {k: x.shape for k, x in stored.items()} != {k: x.shape for k, x in seen.items()}:
        unknown = sorted('/'.join(path) for path in stored.keys() ^ seen.keys())
        raise ValueError(f'statistics that are not of a BatchNorm: {unknown}')
    return unflatten_dict({path: seen[path].astype(x.dtype) for path, x in stored.items()})
