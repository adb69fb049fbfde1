"""The layers that all networks are built of.

Shapes are written as suffixes: B batch, H and W space, C channels.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from zerojax.models.convolutions import Convolve

PRECISIONS = ('highest', 'high', 'default')  # of products, see `jax.lax.Precision`
ModuleDef = Callable[..., Any]  # makes a layer; a block is handed those that it is made of


class Conv(nn.Module):
    """Square convolution without bias; computes in `dtype`, None: in that of its kernel."""

    features: int
    kernel_size: int
    stride: int
    kernel_init: nn.initializers.Initializer
    convolve: Convolve
    precision: str
    dtype: str | None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x_BxHxWxC.shape[-1], self.features)
        kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
        dtype = self.dtype or kernel.dtype
        x, kernel = x_BxHxWxC.astype(dtype), kernel.astype(dtype)
        return self.convolve(x, kernel, self.stride, self.precision)


class Linear(nn.Module):
    """Dense layer with a bias that starts at 0; computes in the dtype of its kernel."""

    features: int
    kernel_init: nn.initializers.Initializer
    precision: str

    @nn.compact
    def __call__(self, x_BxC: jax.Array) -> jax.Array:
        kernel = self.param(
            'kernel', self.kernel_init, (x_BxC.shape[-1], self.features), jnp.float32
        )
        bias = self.param('bias', nn.initializers.zeros, (self.features,), jnp.float32)
        product = jnp.matmul(x_BxC.astype(kernel.dtype), kernel, precision=self.precision)
        return product + bias[None, :]


class Dropout(nn.Module):
    """x with a share `rate`, below 1, of it set to 0 and the rest scaled up.

    Flax's draws in float64 where JAX has 64-bit numbers; this one in float32 always, and what it
    draws is what Flax's draws there, also because it bears the same name: that is in the key.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        share = 1.0 - self.rate
        kept = jax.random.bernoulli(self.make_rng('dropout'), jnp.float32(share), x.shape)
        return lax.select(kept, x / share, jnp.zeros_like(x))


def dropout(x: jax.Array, rate: float, train: bool) -> jax.Array:
    """x, in training with a share `rate` of it set to 0 and the rest scaled up."""
    return Dropout(rate)(x) if train and rate > 0 else x


class Scalar(nn.Module):
    """One trainable number, shape [1]; called without arguments, it returns the number, []."""

    value: float
    parameter: str

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.initializers.constant(self.value)
        return self.param(self.parameter, init, (1,), jnp.float32)[0]
