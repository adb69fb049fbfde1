"""Predictions by small networks, against a large one of two streams that is no network of ours."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zerojax import symmetry
from zerojax.measure import prediction, stability
from zerojax.symmetry import alignment, quotient

# Stream a is unstable in training, with one direction much faster than the others; b is not.
AXES = {
    'first': {'kernel': (None, 'a'), 'bias': ('a',)},
    'second': {'kernel': ('a', 'b'), 'bias': ('b',)},
    'head': {'kernel': ('b', None), 'bias': (None,)},
}
COUNTS = {'a': 11, 'b': 14}
STEPS = 80


class Net(nn.Module):
    counts: dict

    @nn.compact
    def __call__(self, x):
        constant = nn.initializers.constant
        x = nn.tanh(nn.Dense(self.counts['a'], kernel_init=constant(0.3), name='first')(x))
        x = nn.tanh(nn.Dense(self.counts['b'], kernel_init=constant(0.2), name='second')(x))
        return nn.Dense(3, kernel_init=nn.initializers.zeros, name='head')(x)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion('standard'):
        yield


def optimizer():
    return optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.1, momentum=0.9))


def batches():
    """The same one each step: full-batch gradient descent."""
    rng = np.random.default_rng(3)
    means, labels = rng.normal(0, 1, (3, 4)), rng.integers(0, 3, 64)
    batch = {'x': rng.normal(means[labels], 0.5), 'y': np.eye(3)[labels]}
    return [batch] * STEPS


def network(orbits=None):
    """(step, state at the start) of the large network, or of one with a feature for each orbit."""
    whole = symmetry.Orbits({k: np.arange(n) for k, n in COUNTS.items()}, {})
    orbits = orbits or whole
    model = Net(orbits.counts())
    tx = optax.chain(quotient.average_gradients(AXES, orbits), optimizer())

    def step(state, batch):
        def loss(params):
            logits = model.apply({'params': quotient.counted(params, AXES, orbits)}, batch['x'])
            return jnp.mean(optax.softmax_cross_entropy(logits, batch['y']))

        params, opt_state = state
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = model.init(jax.random.key(0), jnp.ones((1, 4)))['params']
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    return step, (params, tx.init(params))


def noise(seed=0):
    _, (params, _) = network()
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape), params)


def sensitivities():
    step, state = network(quotient.shares(COUNTS, 2))
    return prediction.sensitivities(step, state, batches(), AXES)


def grown(tangent, orbits=None):
    """Each stream's curve, by the linearised step."""
    step, state = network(orbits)
    tangents = jax.tree.map(lambda x: jnp.asarray(x)[None], tangent)
    growth = stability.growth(step, state, batches(), tangents, AXES)
    return {name: curve[:, 0] for name, curve in growth.log_by_stream.items()}, growth.log_largest


def in_order(of_seed=0):
    drawn = noise(of_seed)
    order, _ = prediction.arranged(prediction.coordinates(drawn, AXES, sensitivities()), 4)
    return alignment.permute(drawn, AXES, order)


def test_two_features_grow_exactly_as_those_of_a_network_of_any_width():
    halves = quotient.shares(COUNTS, 2)
    tangent = jax.tree.map(lambda x: x.sum(0), prediction.two_features(noise(), AXES))
    small, small_largest = grown(tangent, halves)
    large, largest = grown(quotient.expand(tangent, AXES, halves))
    for name in COUNTS:
        np.testing.assert_allclose(small[name], large[name], rtol=0, atol=1e-9)
        np.testing.assert_allclose(small_largest[name], largest[name], rtol=0, atol=1e-11)
        assert np.ptp(small[name]) > 0.9, 'something grew, or shrank'


def test_the_linear_prediction_is_that_of_the_noise_itself():
    """Of all features and both parts: once one direction rules, to rounding; before, closely."""
    drawn = in_order()
    active = jax.tree.map(lambda x: x.sum(0), prediction.two_features(drawn, AXES))
    active, largest = grown(active, quotient.shares(COUNTS, 2))
    whole, _ = grown(drawn)
    error = np.maximum(active['a'], passive_curve(drawn, 'a', largest)) - whole['a']
    assert np.all(np.abs(error) < 0.5)
    assert np.all(np.abs(error[40:]) < 0.01)


def test_each_stream_has_a_tangent_of_its_own():
    tangents = prediction.two_features(noise(), AXES)
    for i, name in enumerate(COUNTS):
        sizes = symmetry.asymmetry_by_stream(jax.tree.map(lambda x, i=i: x[i], tangents), AXES)
        assert {stream for stream, size in sizes.items() if size > 0} == {name}


def passive_curve(drawn, name, largest):
    _, (params, _) = network()
    left = prediction.persistence(optimizer(), params, STEPS)
    sizes = prediction.passive_deviations(drawn, AXES)[name]
    if not sizes:
        return np.full(STEPS + 1, -np.inf)
    return (
        np.log(np.max([size * left[path] for path, size in sizes.items()], axis=0)) - largest[name]
    )


def test_noise_without_sums_acts_on_nothing_but_itself():
    kernel = noise()['second']['kernel']
    kernel = kernel - kernel.mean(0, keepdims=True)
    kernel = kernel - kernel.mean(1, keepdims=True)
    drawn = jax.tree.map(np.zeros_like, noise())
    drawn['second']['kernel'] = kernel
    whole, largest = grown(drawn)
    for name in COUNTS:
        want = passive_curve(drawn, name, largest)
        np.testing.assert_allclose(whole[name], want, rtol=0, atol=1e-9)
        np.testing.assert_allclose(
            prediction.passive_deviations(noise(), AXES)[name]['second/kernel'],
            prediction.passive_deviations(drawn, AXES)[name]['second/kernel'],
        )
    _, (params, _) = network()
    left = prediction.persistence(optimizer(), params, STEPS)['second/kernel']
    assert left[0] == 1 and left[-1] < 0.95, 'the weight decay is in it'


def test_covectors_that_are_not_finite_are_refused():
    def step(state, batch):
        root = jax.tree.map(jnp.sqrt, state[1][0])  # has no derivative at the start
        return jax.tree.map(jnp.add, state[0], root), state[1]

    _, (params, _) = network(quotient.shares(COUNTS, 2))
    state = params, (jax.tree.map(jnp.zeros_like, params),)
    with pytest.raises(ValueError, match='steps 1 to 3: what they do, backwards in time'):
        prediction.sensitivities(step, state, [None] * 3, AXES)


def test_a_stream_of_which_nothing_is_left_has_covectors_of_zero():
    def step(state, batch):
        return jax.tree.map(jnp.zeros_like, state[0]), state[1]

    _, (params, _) = network(quotient.shares(COUNTS, 2))
    covectors = prediction.sensitivities(step, (params, ()), [None], AXES)
    assert not any(np.any(x) for x in jax.tree.leaves(covectors))
    at = prediction.coordinates(noise(), AXES, covectors)
    _, shares = prediction.arranged(at, 5)
    expected = {name: prediction.expected_largest(n) for name, n in COUNTS.items()}
    assert prediction.furthest(at, shares) == expected


def test_coordinates_tell_what_each_feature_comes_to():
    drawn = noise()
    at = prediction.coordinates(drawn, AXES, sensitivities())
    step, state = network(quotient.shares(COUNTS, 2))
    pairs = []
    for d in range(1, COUNTS['a']):
        swapped = np.arange(COUNTS['a'])
        swapped[[1, d]] = d, 1
        pairs.append(prediction.two_features(alignment.permute(drawn, AXES, {'a': swapped}), AXES))
    tangents = jax.tree.map(lambda *x: jnp.stack(x)[:, 0], *pairs)  # of stream a, the first
    growth = stability.growth(step, state, batches(), tangents, AXES)
    ends = np.exp(growth.log_by_stream['a'][-1] - growth.log_by_stream['a'][-1].max())
    sizes = np.abs(at['a'][1:] - at['a'][0])
    np.testing.assert_allclose(sizes / sizes.max(), ends, rtol=0, atol=1e-3)


def test_the_first_and_the_furthest_features_are_shares_of_their_own():
    at = {'a': np.array([0.5, 3.5, -1.0, 0.1, -2.0, 0.2, 0.9]), 'b': np.array([0.0, 1.0])}
    order, orbits = prediction.arranged(at, 5)
    np.testing.assert_array_equal(order['a'][:3], [0, 1, 4])
    np.testing.assert_array_equal(order['a'][3:], [2, 3, 5, 6])
    np.testing.assert_array_equal(orbits.first['a'], [0, 1, 2, 3, 3, 5, 5])
    np.testing.assert_array_equal(order['b'], [0, 1])
    np.testing.assert_array_equal(orbits.first['b'], [0, 1])
    _, other = prediction.arranged({name: -x for name, x in at.items()}, 5)
    for name in at:
        np.testing.assert_array_equal(orbits.first[name], other.first[name])
    with pytest.raises(ValueError, match='m=3: must be at least 4'):
        prediction.arranged(at, 3)


def test_the_expected_largest_is_that_of_draws():
    assert prediction.expected_largest(1) == 0
    assert prediction.expected_largest(2) == pytest.approx(2 / np.sqrt(np.pi), rel=1e-6)
    drawn = np.random.default_rng(0).normal(size=(20_000, 64))
    largest = np.abs(drawn - drawn[:, :1]).max(1)
    standard_error = largest.std() / np.sqrt(len(largest))
    assert abs(prediction.expected_largest(64) - largest.mean()) < 4 * standard_error


def shares_of_several(n):
    """The first two features alone, the others in shares of four."""
    return symmetry.Orbits({'a': np.array([0, 1, *np.repeat(np.arange(2, n, 4), 4)])}, {})


def test_features_spread_as_shares_of_several_do_where_these_do_not_average():
    """As at kinks: the spread of the shares is that of single features."""
    n, rng = 402, np.random.default_rng(0)
    shares = shares_of_several(n)
    factor = {'a': prediction.expected_largest(n)}
    scale = {'scale': jnp.full(102, 100.0)}  # what all is relative to
    axes = {'bias': ('a',), 'scale': ('a',)}
    spread = jax.jit(lambda x: prediction.spread({'bias': x} | scale, axes, shares, factor)['a'])
    expected = [100 * spread(rng.normal(size=102)) for _ in range(300)]
    measured = np.abs(rng.normal(size=(300, n)) - rng.normal(size=(300, 1))).max(1)
    assert np.mean(expected) == pytest.approx(np.mean(measured), rel=0.03)


def test_the_furthest_is_that_of_the_coordinates_or_what_is_expected():
    rng, shares = np.random.default_rng(1), shares_of_several(402)
    at = rng.normal(size=402)
    at[2:] = np.sort(at[2:])  # neighbours together, so that their means are spread as they are
    at[:2] = 0.0, 2.9
    means = at[2:].reshape(100, 4).mean(1)
    own = np.abs(at).max() / means.std(ddof=1)
    assert own < prediction.expected_largest(402)
    assert prediction.furthest({'a': at}, shares) == {'a': pytest.approx(own)}
    at[1] = 30.0
    expected = prediction.expected_largest(402)
    assert prediction.furthest({'a': at}, shares) == {'a': expected}


def test_streams_whose_features_are_all_there_have_no_further_ones():
    at = {'a': np.arange(5.0)}
    for first in (np.arange(5), np.array([0, 1, 2, 3, 3])):
        assert prediction.furthest(at, symmetry.Orbits({'a': first}, {})) == {}
    whole = symmetry.Orbits({'a': np.arange(5)}, {})
    assert prediction.spread({'bias': jnp.arange(5.0)}, {'bias': ('a',)}, whole, {}) == {}


def test_a_reduced_network_follows_the_large_one_from_noise_that_is_not_small():
    drawn, scale = in_order(), 1e-4
    _, orbits = prediction.arranged({k: np.zeros(n) for k, n in COUNTS.items()}, 8)
    whole = symmetry.Orbits({k: np.arange(n) for k, n in COUNTS.items()}, {})
    at = prediction.coordinates(drawn, AXES, sensitivities())
    curves = []
    for shares in (whole, orbits):
        step, (params, rest) = network(shares)
        part = quotient.average(drawn, AXES, shares)
        params = jax.tree.map(lambda w, x: w + scale * x, params, part)
        follower = prediction.Follower(step, AXES, shares)
        factors = prediction.furthest(at, shares)
        found = list(follower.follow((params, rest), batches(), factors))
        curves.append({k: np.array([float(each[k]) for each in found]) for k in COUNTS})
    until = np.argmax(curves[0]['a'] > 0.3)
    assert until > 20, 'beyond what is linear'
    for name in COUNTS:
        large, small = (curve[name][20:until] for curve in curves)
        np.testing.assert_allclose(small, large, rtol=0.05)


def test_what_is_not_finite_is_said():
    def step(state, batch):
        return jax.tree.map(lambda x: x * batch, state[0]), state[1]

    _, (params, _) = network()
    whole = symmetry.Orbits({k: np.arange(n) for k, n in COUNTS.items()}, {})
    found = list(prediction.Follower(step, AXES, whole).follow((params, ()), [1.0, np.inf], {}))
    assert [bool(jnp.isfinite(each['a'])) for each in found] == [True, True, False]


@pytest.mark.parametrize('names', [{1: 'a'}, {0: 'a', 2: 'b'}, {0: 'a', 1: 'b', 2: 'c'}])
def test_noise_is_what_it_has_in_common_its_streams_parts_and_a_part_without_sums(names):
    x = np.random.default_rng(0).normal(size=(3, 4, 5))
    own = [prediction.own_part(x, axis, names) for axis in names]
    passive = prediction.passive_part(x, names)
    common = x.mean(tuple(names), keepdims=True)
    if len(names) > 1:
        np.testing.assert_allclose(common + sum(own) + passive, x, atol=1e-15)
    else:
        assert not passive.any()
    for axis in names:
        others = tuple(each for each in names if each != axis)
        np.testing.assert_allclose(passive.sum(others), 0, atol=1e-14)
