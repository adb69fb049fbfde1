"""The line between two networks: its ends, its barrier, its statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerojax import models
from zerojax.compare import interpolation

RNG = np.random.default_rng(0)


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_the_line_goes_from_one_end_to_the_other(dtype):
    a = {'w': RNG.normal(size=(5, 4)).astype(dtype)}
    b = {'w': RNG.normal(size=(5, 4)).astype(dtype)}
    for t, end in ((0.0, a), (1.0, b)):
        point = interpolation.interpolate(a, b, t)['w']
        assert point.dtype == dtype
        np.testing.assert_array_equal(point, end['w'])
    for t in np.linspace(0, 1, 11):
        np.testing.assert_array_equal(interpolation.interpolate(a, a, t)['w'], a['w'])
    quarter = 0.75 * a['w'].astype(np.float64) + 0.25 * b['w'].astype(np.float64)
    np.testing.assert_array_equal(interpolation.interpolate(a, b, 0.25)['w'], quarter.astype(dtype))


def test_barrier_is_the_height_above_the_straight_line():
    t = np.linspace(0, 1, 5)
    assert interpolation.barrier(t, [0.7] * 5) == 0
    assert interpolation.barrier(t, 3 - 2 * t) == 0
    assert interpolation.barrier(t, 1 + t + t * (1 - t)) == pytest.approx(0.25, rel=1e-15)
    assert interpolation.barrier(t, 1 + t - t * (1 - t)) == 0, 'a valley is no barrier'


@pytest.mark.parametrize(
    'network',
    [
        {'name': 'constnet', 'depth': 7, 'width': 1, 'init': 'random', 'convolution': 'patches'},
        {'name': 'constnet', 'depth': 7, 'width': 1, 'init': 'random', 'convolution': 'mixed'},
        {'name': 'leakynet', 'depth': 7, 'width': 1, 'init': '1_i_1_1'},
        {'name': 'wideresnet', 'depth': 10, 'width': 1, 'init': 'he'},
        {'name': 'wideresnet', 'depth': 10, 'width': 1, 'init': 'fixup'},
        {'name': 'mlp', 'width': 4},
    ],
)
def test_statistics_are_what_the_running_averages_take_up(network):
    model = models.create(**network)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    )
    variables = {
        name: jax.tree.map(lambda x: RNG.uniform(0.1, 0.5, x.shape), shapes.get(name, {}))
        for name in ('params', 'batch_stats')
    }

    @jax.jit
    def both(images):
        _, updates = model.apply(variables, images, train=True, mutable=['batch_stats'])
        return interpolation.batch_statistics(model, variables, images), updates

    with jax.enable_x64(True), jax.numpy_dtype_promotion('standard'):  # as BatchNorm needs it
        found, updates = both(jnp.asarray(RNG.normal(size=(6, 8, 8, 1))))
    old, updates = variables['batch_stats'], jax.device_get(updates)
    expected = jax.tree.map(
        lambda new, old: (new - 0.9 * old) / 0.1, updates.get('batch_stats', {}), old
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), found, expected
    )


class Odd(nn.Module):
    """Keeps a statistic of its own."""

    @nn.compact
    def __call__(self, x, train):
        self.variable('batch_stats', 'largest', lambda: jnp.zeros(()))
        return x


def test_unknown_statistics_are_refused():
    variables = {'params': {}, 'batch_stats': {'largest': jnp.zeros(())}}
    with pytest.raises(ValueError, match=r"not of a BatchNorm: \['largest'\]"):
        interpolation.batch_statistics(Odd(), variables, jnp.zeros((2, 3)))
