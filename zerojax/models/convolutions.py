"""How a convolution is computed. All ways are the same function up to rounding.

Shapes are written as suffixes: B batch, H and W space, C channels.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from zerojax.step.precision import at_least_float32

# (x, kernel, stride, precision) -> out; the gradients' products have the same precision
Convolve = Callable[[jax.Array, jax.Array, int, str], jax.Array]


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
    matrix = kernel.reshape(size * size * c_in, c_out)
    patches = jnp.concatenate(_taps(x_BxHxWxC, size, stride), axis=-1)
    return jnp.matmul(patches, matrix, precision=precision)


def _taps(x_BxHxWxC: jax.Array, size: int, stride: int) -> list[jax.Array]:
    """What each of the k·k taps of a kernel is multiplied by, [B, H, W, C] of the outputs."""
    pad = size // 2
    x = jnp.pad(x_BxHxWxC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    batch, height, width, channels = x.shape
    out_height, out_width = (height - size) // stride + 1, (width - size) // stride + 1
    return [
        lax.slice(
            x,
            (0, i, j, 0),
            (batch, i + stride * (out_height - 1) + 1, j + stride * (out_width - 1) + 1, channels),
            (1, stride, stride, 1),
        )
        for i in range(size)
        for j in range(size)
    ]


def _convolve_one_channel(x_BxHxWx1: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The same convolution of a single channel: a sum over taps, without products of matrices."""
    wide = at_least_float32(x_BxHxWx1.dtype)
    weights = kernel.reshape(-1, 1, 1, 1, kernel.shape[-1]).astype(wide)
    taps = _taps(x_BxHxWx1.astype(wide), kernel.shape[0], stride)
    products = [tap * weight for tap, weight in zip(taps, weights, strict=True)]
    return functools.reduce(jnp.add, products).astype(x_BxHxWx1.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def convolve_mixed(
    x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int, precision: str = 'highest'
) -> jax.Array:
    """The same convolution, each pass as is fastest on a CPU outside of loops and branches.

    That is `convolve_direct`, but as patches where XLA's convolution does badly: outputs and input
    gradients of images of at most 2x2, all input gradients at stride 2, and everything in float64;
    and a sum over taps where one channel comes in. The table is in docs/performance.md.
    """
    if kernel.shape[-2] == 1:
        return _convolve_one_channel(x_BxHxWxC, kernel, stride)
    tiny = max(x_BxHxWxC.shape[1:3]) <= 2
    convolve = convolve_patches if tiny or x_BxHxWxC.dtype == jnp.float64 else convolve_direct
    return convolve(x_BxHxWxC, kernel, stride, precision)


@convolve_mixed.defjvp
def _(stride, precision, primals, tangents):  # type: ignore[no-untyped-def]
    # The gradients are the transposes of these two, each the pass of its way.
    x, kernel = primals
    dx, dkernel = tangents
    double, tiny = x.dtype == jnp.float64, max(x.shape[1:3]) <= 2
    of_inputs = convolve_patches if double or tiny or stride > 1 else convolve_direct
    of_kernel = convolve_patches if double else convolve_direct
    tangent = of_inputs(dx, kernel, stride, precision) + of_kernel(x, dkernel, stride, precision)
    return convolve_mixed(x, kernel, stride, precision), tangent


CONVOLUTIONS: dict[str, Convolve] = {
    'direct': convolve_direct,
    'patches': convolve_patches,
    'mixed': convolve_mixed,
}
CHOICES = ('auto', *CONVOLUTIONS)


def resolve(convolution: str, *, alone: bool = True, backend: str | None = None) -> str:
    """The way that is fast on a backend in place of 'auto'; any other as it is.

    Args:
        convolution: one of `CHOICES`.
        alone: neither in a loop, nor in one of two branches, nor batched by `jax.vmap`, where XLA's
            convolution has no threads on a CPU.
        backend: 'cpu', 'gpu' or 'tpu'; by default the one that JAX runs on.
    """
    if convolution != 'auto':
        return convolution
    if (backend or jax.default_backend()) != 'cpu':
        return 'direct'
    return 'mixed' if alone else 'patches'
