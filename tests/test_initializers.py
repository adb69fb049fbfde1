import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerojax import initializers


@pytest.mark.parametrize('shape', [(3, 3, 3, 16), (1, 1, 16, 32), (5, 5, 1, 1)])
def test_averaging_computes_the_mean_of_the_input_channels(shape):
    kernel = initializers.averaging()(jax.random.key(0), shape)
    images = jax.random.normal(jax.random.key(1), (2, 6, 6, shape[2]))
    out = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    mean = jnp.broadcast_to(jnp.mean(images, axis=-1, keepdims=True), out.shape)
    np.testing.assert_allclose(out, mean, rtol=0, atol=1e-6)


def test_averaging_is_exactly_zero_off_centre_and_the_same_for_all_features():
    kernel = np.array(initializers.averaging()(jax.random.key(0), (3, 3, 7, 4)))
    assert (kernel[1, 1] == np.float32(1 / 7)).all()
    kernel[1, 1] = 0
    assert (kernel == 0).all()


def test_averaging_needs_a_centre_tap():
    with pytest.raises(ValueError, match='centre tap'):
        initializers.averaging()(jax.random.key(0), (2, 2, 3, 3))


@pytest.mark.parametrize('gain', [1.0, 2.0])
def test_random_control_has_the_papers_variance(gain):
    """Variance gain / (k² c_out), from 92160 samples: relative deviation sqrt(2 / n) = 0.5%."""
    kernel = np.asarray(initializers.random_control(gain)(jax.random.key(0), (3, 3, 64, 160)))
    assert np.var(kernel) == pytest.approx(gain / (9 * 160), rel=0.02)
    assert abs(kernel.mean()) < 4 * np.sqrt(gain / (9 * 160) / kernel.size)
    assert np.abs(kernel).max() > 3.5 * np.sqrt(gain / (9 * 160)), 'must not be truncated'
