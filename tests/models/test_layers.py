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
