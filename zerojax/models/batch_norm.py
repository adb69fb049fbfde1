"""Batch normalisation with sums that are fast on CPUs."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from zerojax.step.precision import at_least_float32


def sum_by_product(x: jax.Array) -> jax.Array:
    """Sum over all axes but the last, [..., C] -> [C]; if it can be, as a matrix product with ones.

    XLA's CPU backend reduces many rows in small windows, far below the speed of memory; its matrix
    product is not that slow. Of eight rows of ones one counts: a product with a single one would
    be turned into a reduction. The product may sum what is left over when features are taken 16
    (in float64 8) at a time in another order, so that equal features would not stay equal to the
    bit: other numbers of features, and other dtypes, are reduced.
    """
    if not _has_product(x):
        return jnp.sum(x, tuple(range(x.ndim - 1)))
    rows = x.reshape(-1, x.shape[-1])
    return jnp.matmul(jnp.ones((8, len(rows)), x.dtype), rows, precision='highest')[0]


def _has_product(x: jax.Array) -> bool:
    return x.dtype == jnp.float32 and x.shape[-1] % 16 == 0


def _spread(v_C: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[C] -> shape [..., C]; what `sum_by_product` is the transpose of."""
    if not _has_product(v_C):
        return jnp.broadcast_to(v_C.reshape((1,) * (len(shape) - 1) + v_C.shape), shape)
    ones = jnp.ones((8, math.prod(shape[:-1])), v_C.dtype)
    rows = jnp.zeros((8, v_C.shape[0]), v_C.dtype).at[0].set(v_C)
    return jnp.matmul(ones.T, rows, precision='highest').reshape(shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def normalize(
    x: jax.Array, scale_C: jax.Array, bias_C: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x - mean) / sqrt(var + epsilon) · scale + bias, and mean and variance [C] over all axes but
    the last; the variance as mean(x²) - mean(x)²."""
    return _normalize(x, scale_C, bias_C, epsilon)[0]


def _normalize(
    x: jax.Array, scale_C: jax.Array, bias_C: jax.Array, epsilon: float
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array, jax.Array]:
    """What `normalize` returns, x - mean, and 1 / sqrt(var + epsilon)."""
    number = x.size // x.shape[-1]
    mean_C = sum_by_product(x) / number
    var_C = jnp.maximum(0.0, sum_by_product(x * x) / number - mean_C * mean_C)
    centred, inverse_C = x - _rows(mean_C, x), lax.rsqrt(var_C + epsilon)
    y = centred * _rows(inverse_C * scale_C, x) + _rows(bias_C, x)
    return (y, mean_C, var_C), centred, inverse_C


def _rows(v_C: jax.Array, like: jax.Array) -> jax.Array:
    """[C] -> [1, ..., 1, C], to be broadcast."""
    return v_C.reshape((1,) * (like.ndim - 1) + v_C.shape)


@normalize.defjvp
def _(epsilon, primals, tangents):  # type: ignore[no-untyped-def]
    # Linear in the tangents, and written so that its transpose, which is what training computes,
    # sums twice by products, and that the sums in it are transposed to broadcasts.
    x, scale_C, bias_C = primals
    dx, dscale_C, dbias_C = tangents
    outputs, centred, inverse_C = _normalize(x, scale_C, bias_C, epsilon)
    number, axes = x.size // x.shape[-1], tuple(range(x.ndim - 1))
    dscaled = _rows(inverse_C * scale_C, x) * dx
    dmean_C = jnp.sum(dscaled, axes) / number
    dnorm_C = inverse_C * jnp.sum(centred * dscaled, axes) / number
    dy = (
        dscaled
        + _spread(dbias_C - dmean_C, x.shape)
        + centred * _spread(inverse_C * (dscale_C - dnorm_C), x.shape)
    )
    return outputs, (dy, jnp.sum(dx, axes) / number, 2 * jnp.sum(centred * dx, axes) / number)


class BatchNorm(nn.Module):
    """`flax.linen.BatchNorm` over all axes but the last, with its parameters and statistics.

    Statistics are computed in float32 or better; what is returned has the given dtype, None: that
    of the statistics.
    """

    use_running_average: bool
    momentum: float
    epsilon: float
    dtype: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = x.shape[-1:]
        scale = self.param('scale', nn.initializers.ones, size, jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, size, jnp.float32)
        mean = self.variable('batch_stats', 'mean', jnp.zeros, size, jnp.float32)
        var = self.variable('batch_stats', 'var', jnp.ones, size, jnp.float32)
        x = x.astype(jnp.promote_types(at_least_float32(x.dtype), scale.dtype))
        if self.use_running_average:
            factor = lax.rsqrt(var.value + self.epsilon) * scale
            y = (x - _rows(mean.value, x)) * _rows(factor, x) + _rows(bias, x)
        else:
            y, mean_C, var_C = normalize(x, scale, bias, self.epsilon)
            if not self.is_initializing():
                mean.value = self.momentum * mean.value + (1 - self.momentum) * mean_C
                var.value = self.momentum * var.value + (1 - self.momentum) * var_C
        return y.astype(self.dtype or y.dtype)
