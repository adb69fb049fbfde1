import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerojax.models import layers


@pytest.mark.parametrize('convolve', layers.CONVOLUTIONS.values(), ids=layers.CONVOLUTIONS)
@pytest.mark.parametrize('size,stride', [(3, 1), (3, 2), (1, 1), (1, 2)])
@pytest.mark.parametrize('side', [7, 8])
def test_convolution_is_the_sum_over_taps(convolve, size, stride, side):
    """Against the definition, in float64; padding k // 2 on both sides as in PyTorch."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, side, side, 3)), rng.normal(size=(size, size, 3, 5))
    pad = size // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    out = (side + 2 * pad - size) // stride + 1
    expected = np.zeros((2, out, out, 5))
    for i in range(out):
        for j in range(out):
            window = padded[:, i * stride : i * stride + size, j * stride : j * stride + size]
            expected[:, i, j] = np.einsum('bhwc,hwcd->bd', window, kernel)
    with jax.enable_x64(True):
        actual = jax.jit(convolve, static_argnums=2)(x, kernel, stride)
        assert actual.dtype == jnp.float64
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)


class WithDropout(nn.Module):
    """A layer in a network, twice: where it stands is in its key."""

    layer: Any

    @nn.compact
    def __call__(self, x):
        return self.layer()(self.layer()(x))


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.99])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_dropout_is_that_of_flax_and_64_bit_numbers_change_no_draw(rate, dtype):
    x, rngs = jnp.ones((8, 5, 5, 16), dtype), {'dropout': jax.random.key(3)}
    flax = WithDropout(functools.partial(nn.Dropout, rate, deterministic=False))
    ours = WithDropout(lambda: functools.partial(layers.dropout, rate=rate, train=True))
    expected = flax.apply({}, x, rngs=rngs)
    actual = ours.apply({}, x, rngs=rngs)
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, expected)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(ours.apply({}, x, rngs=rngs), expected)
        wide = ours.apply({}, x.astype(jnp.float64), rngs=rngs)
        assert wide.dtype == jnp.float64
        np.testing.assert_array_equal(wide != 0, expected != 0)
