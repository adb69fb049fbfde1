"""The convolution that all networks are built of.

Shapes are written as suffixes: B batch, H and W space, C channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

CONVOLUTIONS = ('direct', 'patches')


def convolve_direct(x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolution padded by k // 2 on all sides (not Flax's 'SAME', which differs at stride 2)."""
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x_BxHxWxC,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


def convolve_patches(x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
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
    return jnp.concatenate(taps, axis=-1) @ kernel.reshape(size * size * c_in, c_out)


class Conv(nn.Module):
    """Square convolution without bias; computes in `dtype`, None: in that of its kernel."""

    features: int
    kernel_size: int
    stride: int
    kernel_init: nn.initializers.Initializer
    convolution: str
    dtype: str | None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x_BxHxWxC.shape[-1], self.features)
        kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
        convolve = {'direct': convolve_direct, 'patches': convolve_patches}[self.convolution]
        dtype = self.dtype or kernel.dtype
        return convolve(x_BxHxWxC.astype(dtype), kernel.astype(dtype), self.stride)


class Linear(nn.Module):
    """Dense layer with a bias that starts at 0; computes in the dtype of its kernel."""

    features: int
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_BxC: jax.Array) -> jax.Array:
        kernel = self.param(
            'kernel', self.kernel_init, (x_BxC.shape[-1], self.features), jnp.float32
        )
        bias = self.param('bias', nn.initializers.zeros, (self.features,), jnp.float32)
        return x_BxC.astype(kernel.dtype) @ kernel + bias[None, :]


def batch_norm(train: bool, dtype: str | None, name: str) -> nn.BatchNorm:
    """The paper's BatchNorm: epsilon 1e-5, running averages that keep 0.9 a step.

    Statistics are computed in float32 or better; what it returns is rounded to `dtype`.
    """
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name
    )


def mean_over_space(x_BxHxWxC: jax.Array, dtype: str | None) -> jax.Array:
    """[B, C] for the head; float32 where the layers before it compute in a `dtype` of their own."""
    return jnp.mean(x_BxHxWxC.astype(jnp.float32) if dtype else x_BxHxWxC, axis=(1, 2))


class Scalar(nn.Module):
    """One trainable number, shape [1]; called without arguments, it returns the number, []."""

    value: float
    parameter: str

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.initializers.constant(self.value)
        return self.param(self.parameter, init, (1,), jnp.float32)[0]
