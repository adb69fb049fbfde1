import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests import quick
from zerojax.models.batch_norm import BatchNorm, normalize, sum_by_product
from zerojax.step import jit_in_mode

ARGUMENTS = {'momentum': 0.9, 'epsilon': 1e-5}


def variables(features, dtype=jnp.float64, seed=0):
    rng = np.random.default_rng(seed)
    scale, bias, mean = (jnp.asarray(rng.normal(size=features), dtype) for _ in range(3))
    var = jnp.asarray(rng.uniform(0.5, 2, size=features), dtype)
    return {'params': {'scale': scale, 'bias': bias}, 'batch_stats': {'mean': mean, 'var': var}}


def outputs_and_gradients(layer, given, x, cotangent, train, jit=quick.jit):
    def loss(params, x):
        both = {**given, 'params': params}
        y, changed = layer(use_running_average=not train, dtype=None, **ARGUMENTS).apply(
            both, x, mutable=['batch_stats']
        )
        return jnp.sum(y * cotangent), (y, changed)

    return jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(given['params'], x)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('shape', [(8, 4, 4, 5), (70, 3, 3, 32), (33, 16)])
@pytest.mark.parametrize('dtype,rounding', [('float32', 3e-5), ('float64', 1e-13)])
def test_it_is_flax_batch_norm_with_its_gradients(shape, train, dtype, rounding):
    """Features in 16s are summed by products in float32, all others are reduced."""
    double = dtype == 'float64'
    with jax.enable_x64(double), jax.numpy_dtype_promotion('standard'):  # which Flax needs
        rng = np.random.default_rng(1)
        x, cotangent = (jnp.asarray(rng.normal(1, 2, size=shape), dtype) for _ in range(2))
        given = variables(shape[-1], dtype)
        expected = outputs_and_gradients(nn.BatchNorm, given, x, cotangent, train)
        actual = outputs_and_gradients(BatchNorm, given, x, cotangent, train)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=rounding * np.abs(b).max())


def test_it_starts_as_flax_batch_norm():
    x = jnp.ones((4, 2, 2, 3))
    made = [
        layer(use_running_average=False, dtype=None, **ARGUMENTS).init(jax.random.key(0), x)
        for layer in (BatchNorm, nn.BatchNorm)
    ]
    assert jax.tree.structure(made[0]) == jax.tree.structure(made[1])
    jax.tree.map(np.testing.assert_array_equal, *made)


def test_forward_and_reverse_derivatives_agree_with_differences():
    """All outputs, also mean and variance."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        x, scale, bias = (jnp.asarray(rng.normal(size=s)) for s in ((6, 3, 3, 4), (4,), (4,)))
        check_grads(lambda *x: normalize(*x, 1e-5), (x, scale, bias), order=2, modes=('fwd', 'rev'))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_statistics_are_of_float32_and_outputs_of_the_dtype(dtype):
    """A mean of 4,096 numbers that bfloat16 could not even count."""
    x = jnp.ones((64, 8, 8, 2), dtype)
    layer = BatchNorm(use_running_average=False, dtype=str(jnp.dtype(dtype)), **ARGUMENTS)
    y, changed = layer.apply(variables(2, jnp.float32), x, mutable=['batch_stats'])
    assert y.dtype == dtype
    expected = 0.9 * variables(2, jnp.float32)['batch_stats']['mean'] + jnp.float32(0.1)
    np.testing.assert_allclose(changed['batch_stats']['mean'], expected, rtol=1e-6)


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('features', [2, 3, 7, 16, 33, 49, 160])
def test_equal_features_stay_equal_to_the_bit(features, dtype):
    """Also what is left over when features are taken sixteen at a time."""
    rng = np.random.default_rng(3)
    one = rng.normal(size=(32, 5, 5, 1)).astype(dtype)
    in_mode = functools.partial(jit_in_mode, mode='deterministic')
    with jax.enable_x64(dtype == 'float64'):
        x = jnp.asarray(np.repeat(one, features, axis=-1))
        cotangent = jnp.asarray(np.repeat(one[::-1], features, axis=-1))
        same = {name: jnp.full(features, 1.1, dtype) for name in ('scale', 'bias', 'mean', 'var')}
        given = {
            'params': {name: same[name] for name in ('scale', 'bias')},
            'batch_stats': {name: same[name] for name in ('mean', 'var')},
        }
        (_, outputs), gradients = outputs_and_gradients(
            BatchNorm, given, x, cotangent, True, in_mode
        )
        for each in (*jax.tree.leaves((outputs, gradients)), in_mode(sum_by_product)(x)):
            first = np.asarray(each)[..., :1]
            np.testing.assert_array_equal(each, np.broadcast_to(first, each.shape))
