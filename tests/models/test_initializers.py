"""Each initializer has the property that its docstring states."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from jax.nn import initializers as jax_initializers

from zerojax.models import initializers

KEY = jax.random.key(0, impl='rbg')  # compiles much faster
KERNEL = (3, 3, 4, 10)

ALL = {
    'averaging': initializers.averaging(),
    'tiled_identity': initializers.tiled_identity(),
    'hadamard': initializers.hadamard(),
    'random_control': initializers.random_control(2.0),
    'random_control(0)': initializers.random_control(0.0),
    'repeated': initializers.repeated(jax_initializers.he_normal(), 3),
    'fixup': initializers.fixup(6),
} | {f'letter {x}': initializers.lettered(x, 1, 0.01) for x in initializers.LETTERS}


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float64])
def test_it_has_the_signature_of_jax_initializers(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        for shape in (KERNEL, (4, 10)):
            kernel = jax.eval_shape(lambda: ALL[name](KEY, shape, dtype))  # noqa: B023
            assert kernel.shape == shape
            assert kernel.dtype == dtype
    assert jax.eval_shape(lambda: ALL[name](KEY, KERNEL)).dtype == jnp.float32
    layer = nn.Conv(10, (3, 3), kernel_init=ALL[name])
    variables = jax.eval_shape(layer.init, KEY, jnp.ones((1, 6, 6, 4)))
    assert variables['params']['kernel'].shape == KERNEL


def centre(kernel):
    """The centre tap [c_in, c_out], once everything else is known to be 0."""
    kernel = np.asarray(kernel)
    middle = kernel[kernel.shape[0] // 2, kernel.shape[1] // 2]
    assert np.count_nonzero(kernel) == np.count_nonzero(middle)
    return middle


@pytest.mark.parametrize('shape', [(3, 3, 3, 16), (1, 1, 16, 5), (5, 5, 2, 2)])
def test_averaging_gives_the_mean_of_the_inputs_to_each_feature(shape):
    kernel = initializers.averaging(3.0)(KEY, shape, jnp.float32)
    assert (centre(kernel) == np.float32(3 / shape[-2])).all()
    np.testing.assert_allclose(np.asarray(kernel).sum((0, 1, 2)), 3, rtol=1e-6)


@pytest.mark.parametrize('make', ['averaging', 'tiled_identity', 'hadamard'])
def test_a_kernel_without_a_centre_is_refused(make):
    with pytest.raises(ValueError, match='centre tap, not one of 2x3'):
        getattr(initializers, make)()(KEY, (2, 3, 4, 4))


def test_tiled_identity_has_as_many_orbits_as_inputs():
    kernel = centre(initializers.tiled_identity(-2.0)(KEY, (3, 3, 3, 8)))
    for feature in range(8):
        assert kernel[feature % 3, feature] == -2
    assert np.count_nonzero(kernel) == 8
    assert len(np.unique(kernel, axis=1).T) == 3
    with pytest.raises(ValueError, match='identity of 8 features onto 3'):
        initializers.tiled_identity()(KEY, (3, 3, 8, 3))


@pytest.mark.parametrize('c_in,c_out', [(4, 16), (3, 16), (16, 32), (5, 6)])
def test_hadamard_where_features_grow(c_in, c_out):
    matrix = centre(initializers.hadamard()(KEY, (3, 3, c_in, c_out)))
    size = 2 ** math.ceil(math.log2(c_out))
    np.testing.assert_allclose(np.abs(matrix), size**-0.5, rtol=1e-6)
    if size == c_out:
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(c_in), atol=1e-6)
    assert len(np.unique(matrix, axis=1).T) == min(c_out, 2 ** math.ceil(math.log2(c_in)))


@pytest.mark.parametrize('c_in,c_out', [(8, 8), (8, 3)])
def test_hadamard_is_the_identity_where_features_do_not_grow(c_in, c_out):
    matrix = centre(initializers.hadamard()(KEY, (3, 3, c_in, c_out)))
    np.testing.assert_array_equal(matrix, np.eye(c_in, c_out))


def assert_variance(kernel, expected):
    """Within five standard errors of a normal distribution's variance; its mean within five too."""
    kernel = np.asarray(kernel, np.float64)
    assert kernel.var() == pytest.approx(expected, rel=5 * math.sqrt(2 / kernel.size))
    assert abs(kernel.mean()) < 5 * math.sqrt(expected / kernel.size)


@pytest.mark.parametrize('gain', [1.0, 2.0])
@pytest.mark.parametrize('size', [1, 3])
def test_random_control_has_variance_gain_over_fan_out(gain, size):
    kernel = initializers.random_control(gain)(KEY, (size, size, 64, 200), jnp.float32)
    assert_variance(kernel, gain / (size**2 * 200))
    assert np.abs(kernel).max() > 3 * np.std(kernel), 'not truncated'


def test_random_control_without_gain_is_exactly_zero():
    assert not initializers.random_control(0.0)(KEY, KERNEL).any()


@pytest.mark.parametrize('letter', initializers.LETTERS)
@pytest.mark.parametrize('block', [None, 0, 1, 6, 7])
@pytest.mark.parametrize('slope', [0.01, 0.2, 0.0])
def test_letters(letter, block, slope):
    """The constant with its factor, and noise of the variance that the paper's code gives it."""
    shape = (3, 3, 32, 64)
    kernel = np.asarray(initializers.lettered(letter, block, slope)(KEY, shape))
    sign = 1 if block is None or block % 2 == 0 else -1 / (slope or 1)
    constant = {
        '1': initializers.averaging(sign), 'a': initializers.averaging(0.99 * sign),
        'i': initializers.tiled_identity(sign), 'k': initializers.tiled_identity(0.99 * sign),
        'h': initializers.random_control(0.0),
    }[letter](KEY, shape)  # fmt: skip
    share = {'1': 0.0, 'i': 0.0, 'k': 0.01, 'a': 0.01, 'h': 1.0}[letter]
    noise = kernel - np.asarray(constant)
    if share == 0:
        assert not noise.any()
    else:
        assert_variance(noise, math.sqrt(2) * (1 + slope) * share / (9 * 32))


def test_an_unknown_letter_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"letter 'x': must be one of '1' averaging, 'i' identity"):
        initializers.lettered('x', 0, 0.01)


@pytest.mark.parametrize('unique', [1, 3, 10])
def test_repeated_has_that_many_unique_features(unique):
    base = jax_initializers.he_normal()
    kernel = np.asarray(initializers.repeated(base, unique)(KEY, KERNEL))
    features = kernel.reshape(-1, 10).T
    assert len(np.unique(features, axis=0)) == unique
    np.testing.assert_array_equal(features, features[np.arange(10) % unique])
    with pytest.raises(ValueError, match='11 unique features: must be from 1 to 10'):
        initializers.repeated(base, 11)(KEY, KERNEL)


def test_fixup_is_he_scaled_by_the_root_of_the_number_of_branches():
    kernel = initializers.fixup(9)(KEY, (3, 3, 64, 200), jnp.float32)
    assert_variance(kernel, 2 / (9 * 64) / 9)


@pytest.mark.parametrize('name', ALL)
def test_64_bit_numbers_change_no_draw(name):
    draw = quick.jit(ALL[name], static_argnums=(1, 2))
    for key in (KEY, jax.random.key(1)):
        usual = draw(key, KERNEL, jnp.float32)
        with jax.enable_x64(True):
            np.testing.assert_array_equal(draw(key, KERNEL, jnp.float32), usual)
            np.testing.assert_array_equal(draw(key, KERNEL), usual)
