"""The layers that all networks are built of.

Shapes are written as suffixes: B batch, H and W space, C channels.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

# (x, kernel, stride, precision) -> out; the gradients' products have the same precision
Convolve = Callable[[jax.Array, jax.Array, int, str], jax.Array]
PRECISIONS = ('highest', 'high', 'default')  # of products, see `jax.lax.Precision`
ModuleDef = Callable[..., Any]  # makes a layer; a block is handed those that it is made of


def convolve_direct(
    x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int, precision: str = 'highest'
) -> jax.Array:
    """Convolution padded by k // 2 on all sides (not Flax's 'SAME', which differs at stride 2)."""
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x_BxHxWxC,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=precision,
    )


def convolve_patches(
    x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int, precision: str = 'highest'
) -> jax.Array:
    """The same convolution as one matrix product: patches [B, H, W, k·k·C] times kernel."""
    size, _, c_in, c_out = kernel.shape
    pad = size // 2
    x = jnp.pad(x_BxHxWxC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    batch, height, width, _ = x.shape
    out_height, out_width = (height - size) // stride + 1, (width - size) // stride + 1
    taps = [
        lax.slice(
            x,
            (0, i, j, 0),
            (batch, i + stride * (out_height - 1) + 1, j + stride * (out_width - 1) + 1, c_in),
            (1, stride, stride, 1),
        )
        for i in range(size)
        for j in range(size)
    ]
    matrix = kernel.reshape(size * size * c_in, c_out)
    return jnp.matmul(jnp.concatenate(taps, axis=-1), matrix, precision=precision)


CONVOLUTIONS: dict[str, Convolve] = {'direct': convolve_direct, 'patches': convolve_patches}


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
