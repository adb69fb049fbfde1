import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerojax.measure import noise

BFLOAT16 = jnp.bfloat16.dtype
FLOATS = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)]


@pytest.mark.parametrize('dtype', FLOATS, ids=str)
def test_ulps_count_the_numbers_between(dtype):
    eps = float(jnp.finfo(dtype).eps)
    one = np.ones((), dtype)
    assert noise.ulps_apart(one, one) == 0
    assert noise.ulps_apart(one, np.asarray(1 + 3 * eps, dtype)) == 3
    assert noise.ulps_apart(one, np.asarray(1 - eps, dtype)) == 2, 'below 1 they are twice as dense'
    tiny = np.asarray(jnp.finfo(dtype).smallest_subnormal, dtype)
    assert noise.ulps_apart(-tiny, tiny) == 2, 'and only one zero lies between'
    assert noise.ulps_apart(-0.0 * one, 0.0 * one) == 0
    a, b = np.array([1, 2, 4], dtype), np.array([1, 2 + 4 * eps, 4 + 4 * eps], dtype)
    assert noise.ulps_apart(a, b) == noise.ulps_apart(b, a) == 2, 'the largest of all elements'


@pytest.mark.parametrize('dtype', FLOATS, ids=str)
def test_the_largest_numbers_and_nan(dtype):
    largest = np.asarray(jnp.finfo(dtype).max, dtype)
    infinity, nan = np.asarray(math.inf, dtype), np.asarray(math.nan, dtype)
    assert noise.ulps_apart(largest, infinity) == 1
    between = 2 * int(largest.reshape(1).view(f'uint{8 * dtype.itemsize}')[0])
    assert noise.ulps_apart(-largest, largest) == between, 'more than a signed integer holds'
    assert noise.ulps_apart(nan, -nan) == 0
    assert noise.ulps_apart(nan, largest) == noise.ulps_apart(infinity, nan) == math.inf


@pytest.mark.parametrize(
    'a,b,message',
    [
        (np.zeros(2), np.zeros(3), 'must be of one dtype, shape'),
        (np.zeros(2), np.zeros(2, np.float32), 'must be of one dtype, shape'),
        (np.zeros(2, int), np.zeros(2, int), 'dtype int64: must be a float'),
        (np.zeros(2, np.longdouble), np.zeros(2, np.longdouble), 'must have 2, 4 or 8 bytes'),
    ],
)
def test_what_has_no_ulps_is_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        noise.ulps_apart(a, b)


def test_the_noise_floor_is_told_tensor_by_tensor():
    eps = np.finfo(np.float32).eps
    results = [
        {
            'quiet': jnp.arange(3.0),
            'noisy': jnp.array([1.0, 4.0 + 4 * k * eps]),
            'signs': jnp.array([0.0, -0.0])[k % 2],
            'pair': (jnp.bfloat16(k), jnp.int32(k)),
            'key': jax.random.key(0),
            'zero': jnp.zeros(2),
        }
        for k in (0, 3, 1, 1)
    ]
    floor = noise.noise_floor(iter(results))
    assert floor['quiet'] == noise.Spread(1, 0, 0.0, 0.0, 2.0)
    assert floor['noisy'].distinct == 3
    assert floor['noisy'].ulps == 3
    assert floor['noisy'].absolute == 12 * eps
    assert floor['noisy'].relative == 12 * eps / (4 + 12 * eps)
    assert (floor['signs'].distinct, floor['signs'].ulps) == (2, 0), 'bits differ, numbers do not'
    assert (floor['pair/0'].distinct, floor['pair/0'].absolute) == (3, 3)
    assert (floor['pair/1'].distinct, floor['pair/1'].ulps) == (3, 3)
    assert floor['key'].distinct == 1
    assert floor['zero'].magnitude == 0, 'so that one sees that it tells nothing'


def test_nan_is_noise_only_against_numbers():
    nans = [{'x': jnp.array([jnp.nan, 1.0])}] * 2
    assert noise.noise_floor(nans)['x'] == noise.Spread(1, 0, 0.0, 0.0, 1.0)
    spread = noise.noise_floor([*nans, {'x': jnp.array([2.0, 1.0])}])['x']
    assert (spread.distinct, spread.ulps, spread.absolute) == (2, math.inf, math.inf)
    assert spread.record()['ulps'] is None, 'JSON knows no infinity'


@pytest.mark.parametrize(
    'results,message',
    [
        ([], 'needs at least one'),
        ([{'a': jnp.ones(1)}, {'b': jnp.ones(1)}], 'results differ in a, b'),
        ([{'a': jnp.ones(1)}, {'a': jnp.ones(2)}], r'a: float32\(2,\) and float32\(1,\)'),
        ([{'a': jnp.ones(1)}, {'a': jnp.ones(1, int)}], 'must be of one dtype and shape'),
    ],
)
def test_results_of_different_computations_are_refused(results, message):
    with pytest.raises(ValueError, match=message):
        noise.noise_floor(results)


def test_deliberate_noise_within_an_executable_is_counted():
    calls = itertools.count()

    def add_ulps(x):
        for _ in range(next(calls) % 3):
            x = np.nextafter(x, np.float32(np.inf))
        return x

    def function(x):
        noisy = jax.pure_callback(add_ulps, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return {'noisy': noisy, 'quiet': 2.0 * x}

    floors = noise.measure_noise(function, jnp.ones(4), repeats=9, compilations=2)
    within = floors['one executable']
    assert (within['noisy'].distinct, within['noisy'].ulps) == (3, 2)
    assert within['quiet'].distinct == 1


def test_deliberate_noise_across_compilations_is_told_apart():
    traces = itertools.count()

    def function(x):
        return x + 0.5 * next(traces)

    floors = noise.measure_noise(jax.jit(function), jnp.ones(4), repeats=5, compilations=3)
    assert floors['one executable'][''].distinct == 1
    assert floors['fresh compilations'][''].distinct == 1, 'what is jitted is traced once'
    floors = noise.measure_noise(function, jnp.ones(4), repeats=5, compilations=3)
    assert floors['one executable'][''].distinct == 1
    assert floors['fresh compilations'][''].distinct == 3
    assert floors['fresh compilations'][''].absolute == 1.0


@pytest.mark.parametrize('few', [{'repeats': 1}, {'compilations': 0}])
def test_one_result_has_no_noise(few):
    with pytest.raises(ValueError, match='must be at least 2'):
        noise.measure_noise(jnp.sin, jnp.ones(1), **few)


def test_features_are_compared_as_results_are():
    x = jnp.array([[1.0, 1.0, 1.0 + 2**-23, -0.0], [0.0, -0.0, 0.0, 0.0]])
    spread = noise.feature_spread(x[:, :2], axis=1)
    assert (spread.distinct, spread.ulps) == (1, 0), '0.0 equals -0.0'
    spread = noise.feature_spread(x[:, :3], axis=1)
    assert (spread.distinct, spread.ulps, spread.absolute) == (2, 1, 2**-23)
    assert noise.feature_spread(x, axis=0).distinct == 2


def test_features_are_compared_within_their_orbits():
    x = jnp.array([[1.0, 2.0, 1.0, 2.0 + 2**-22], [0.0, 3.0, -0.0, 3.0]])
    first = np.array([0, 1, 0, 1])
    assert noise.feature_spread(x[:, :3], 1, first[:3]).distinct == 1
    spread = noise.feature_spread(x, 1, first)
    assert (spread.distinct, spread.ulps, spread.magnitude) == (2, 1, 3.0)
    assert noise.feature_spread(x, 1).distinct == 3


def test_elements_are_compared_within_their_classes():
    """As in an identity, where the diagonal is one class and the rest another."""
    classes = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])
    x = jnp.where(classes == 0, 2.0, 1.0)
    assert noise.element_spread(x, classes) == noise.Spread(1, 0, 0.0, 0.0, 2.0)
    x = x.at[0, 1].add(2**-23).at[2, 0].add(2**-22)
    spread = noise.element_spread(x, classes)
    assert (spread.distinct, spread.ulps, spread.absolute) == (3, 2, 2**-22)
    assert noise.element_spread(jnp.array([0.0, -0.0]), np.zeros(2, int)).distinct == 1
