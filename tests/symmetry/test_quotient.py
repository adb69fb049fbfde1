import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

from zerojax import models, perturb, symmetry
from zerojax.run import data
from zerojax.step import create_state, optimizer, train_step_function
from zerojax.step.precision import numbers_of
from zerojax.symmetry import quotient
from zerojax.symmetry.orbits import feature_counts

STEPS = 200


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion('standard'):  # Flax's BatchNorm mixes float64 and float32
        yield


def sgd():
    return optimizer.sgd(lambda _: 0.1, 0.9, nesterov=True, weight_decay=5e-4)


@functools.cache
def batches():
    digits = data.load('digits', None, 'train', 'test').train
    order = np.random.default_rng(0).integers(0, len(digits.labels), (STEPS, 16))
    return {'image': digits.images[order] / 8.0 - 1.0, 'label': digits.labels[order]}


def initial_state(model, tx, dtype=jnp.float32):
    return quick.jit(
        lambda: create_state(model, tx, (8, 8, 1), seed=0, perturbation_seed=0, dtype=dtype)
    )()


def losses(model, tx, state):
    """[STEPS], and the last state."""
    step = train_step_function(model, tx)

    @quick.jit
    def train(state):
        def one(state, batch):
            state, metrics = step(state, batch)
            return state, metrics['loss']

        return jax.lax.scan(one, state, jax.tree.map(jnp.asarray, batches()))

    state, its_losses = train(state)
    return np.asarray(its_losses), state


def reduced(model, tx, state, orbits):
    """The small network, its optimizer and its state."""
    axes = model.feature_axes()
    small = quotient.Quotient(model.with_features(orbits.counts()), axes, orbits)
    small_tx = optax.chain(quotient.average_gradients(axes['params'], orbits), tx)
    return small, small_tx, reduced_state(state, axes, orbits, small_tx)


def reduced_state(state, axes, orbits, small_tx):
    params = quotient.reduce(state.params, axes['params'], orbits)
    return dataclasses.replace(
        state,
        params=params,
        batch_stats=quotient.reduce(state.batch_stats, axes['batch_stats'], orbits),
        opt_state=small_tx.init(params),
    )


def orbits_of(model, state):
    return symmetry.find_orbits(state.params, model.feature_axes()['params'])


def constnet(**options):
    return models.create('constnet', depth=7, width=1, convolution='patches', **options)


def leakynet():
    return models.create('leakynet', depth=7, width=1, init='1_11_1', convolution='patches')


def toy():
    return models.create('mlp', width=64, init='random', unique_features=5)


NETWORKS = {
    'post_relu': (constnet, sgd),
    'pre_relu': (lambda: constnet(shortcut='pre_relu'), lambda: optax.adam(1e-3)),
    'leakynet': (leakynet, sgd),
    'toy': (toy, sgd),
}


@pytest.mark.parametrize('network', NETWORKS)
def test_the_quotient_trains_as_the_symmetric_network_to_rounding(network):
    make, make_tx = NETWORKS[network]
    model, tx = make(), make_tx()
    with numbers_of('float64'):
        state = initial_state(model, tx, jnp.float64)
        orbits = orbits_of(model, state)
        small, small_tx, small_state = reduced(model, tx, state, orbits)
        want, end = losses(model, tx, state)
        got, small_end = losses(small, small_tx, small_state)
        assert want.dtype == np.float64
        np.testing.assert_allclose(got, want, rtol=1e-11)
        assert want.min() < want[0] - 0.1  # something was learned that could be followed
        axes = model.feature_axes()['params']
        assert jax.jit(lambda x: symmetry.is_symmetric(x, axes, orbits))(end.params)
        expanded = quotient.expand(small_end.params, axes, orbits)
        for x, y in zip(jax.tree.leaves(expanded), jax.tree.leaves(end.params), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-9 * np.abs(y).max())


@pytest.mark.parametrize('m', [2, 8])
@pytest.mark.parametrize('network', ['post_relu', 'pre_relu', 'leakynet'])
def test_a_reduced_network_takes_every_step_of_the_one_with_m_unique_features(network, m):
    """Each step from the same state, since rounding would grow as any difference does."""
    make, make_tx = NETWORKS[network]
    model, tx = make(), make_tx()
    axes = model.feature_axes()
    with numbers_of('float64'):
        state = initial_state(model, tx, jnp.float64)
        noisy = perturb.unequal_init(state.params, axes['params'], jax.random.key(0), 0.03, m)
        state = dataclasses.replace(state, params=noisy)
        orbits = quotient.shares(feature_counts(noisy, axes['params']), m)
        small, small_tx, small_state = reduced(model, tx, state, orbits)
        assert small_state.params['head']['kernel'].shape == (m, 10)
        step = quick.jit(train_step_function(model, tx))
        small_step = quick.jit(train_step_function(small, small_tx))
        exact = jax.jit(lambda tree, axes=axes['params']: symmetry.project(tree, axes, orbits))
        batch = jax.tree.map(jnp.asarray, batches())
        for i in range(60):
            state, metrics = step(state, jax.tree.map(lambda x, i=i: x[i], batch))
            small_state, small_metrics = small_step(
                small_state, jax.tree.map(lambda x, i=i: x[i], batch)
            )
            np.testing.assert_allclose(small_metrics['loss'], metrics['loss'], rtol=1e-12)
            assert_equal_to(
                quotient.expand(small_state.params, axes['params'], orbits), state.params, 1e-12
            )
            # Both go on from the same state, in which the features of a share are equal to the bit.
            state = dataclasses.replace(
                state,
                params=exact(state.params),
                batch_stats=quotient.expand(small_state.batch_stats, axes['batch_stats'], orbits),
                opt_state=of_params(exact, state.opt_state, state.params),
            )
            small_state = dataclasses.replace(
                small_state,
                params=quotient.reduce(state.params, axes['params'], orbits),
                opt_state=(
                    small_state.opt_state[0],
                    of_params(
                        lambda x: quotient.reduce(x, axes['params'], orbits),
                        state.opt_state,
                        state.params,
                    ),
                ),
            )
        unique = symmetry.unique_features(state.params, axes['params'])
        assert set(unique.values()) == {m}


def of_params(function, opt_state, params):
    """The optimizer's state with the function of each tree in it that is like the parameters."""

    def is_like_params(x):
        return isinstance(x, dict) and x.keys() == params.keys()

    return jax.tree.map(
        lambda x: function(x) if is_like_params(x) else x, opt_state, is_leaf=is_like_params
    )


def assert_equal_to(tree, other, tolerance):
    """Up to a share `tolerance` of the largest weight."""
    largest = max(np.abs(x).max() for x in jax.tree.leaves(other))
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * largest)


def test_the_average_is_the_mean_of_the_features_that_each_stands_for():
    axes = {'hidden': {'kernel': (None, 'h'), 'bias': ('h',)}, 'head': {'kernel': ('h', 'h')}}
    random = np.random.default_rng(0)
    tree = {
        'hidden': {'kernel': random.normal(size=(3, 5)), 'bias': random.normal(size=5)},
        'head': {'kernel': random.normal(size=(5, 5))},
    }
    orbits = quotient.shares({'h': 5}, 2)
    averaged = quotient.average(tree, axes, orbits)
    even, odd = [0, 2, 4], [1, 3]
    kernel, square = tree['hidden']['kernel'], tree['head']['kernel']
    np.testing.assert_allclose(
        averaged['hidden']['kernel'], np.stack([kernel[:, even].mean(1), kernel[:, odd].mean(1)], 1)
    )
    want = [[square[np.ix_(i, j)].mean() for j in (even, odd)] for i in (even, odd)]
    np.testing.assert_allclose(averaged['head']['kernel'], want)
    expanded = quotient.expand(averaged, axes, orbits)
    for x, y in zip(
        jax.tree.leaves(quotient.average(expanded, axes, orbits)),
        jax.tree.leaves(averaged),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=1e-15)


def test_a_stream_of_few_features_has_one_share_each():
    orbits = quotient.shares({'a': 3, 'b': 10}, 4)
    assert orbits.counts() == {'a': 3, 'b': 4}
    np.testing.assert_array_equal(orbits.first['b'], [0, 1, 2, 3, 0, 1, 2, 3, 0, 1])
    with pytest.raises(ValueError, match='m=0: must be at least 1'):
        quotient.shares({'a': 3}, 0)


def test_there_and_back_changes_no_bit():
    model = toy()
    axes = model.feature_axes()['params']
    params = initial_state(model, sgd()).params
    orbits = symmetry.find_orbits(params, axes)
    reduced = quotient.reduce(params, axes, orbits)
    assert {path: x.shape for path, x in reduced['hidden'].items()} == {
        'kernel': (64, 5), 'bias': (5,),
    }  # fmt: skip
    assert reduced['head']['kernel'].shape == (5, 10)
    expanded = quotient.expand(reduced, axes, orbits)
    for x, y in zip(jax.tree.leaves(expanded), jax.tree.leaves(params), strict=True):
        assert x.tobytes() == y.tobytes()


def test_the_step_costs_a_small_fraction():
    """Counted by XLA: at the paper's width, what is left is the image and the classes."""
    model = models.create('constnet', depth=7, width=10)
    tx = sgd()
    state = initial_state(model, tx)
    small, small_tx, small_state = reduced(model, tx, state, orbits_of(model, state))
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batches())

    def flops(model, tx, state):
        return jax.jit(train_step_function(model, tx)).lower(state, batch).cost_analysis()['flops']

    assert flops(small, small_tx, small_state) < 1e-3 * flops(model, tx, state)


def test_what_has_no_quotient_is_refused():
    model = toy()
    axes = model.feature_axes()['params']
    params = initial_state(model, sgd()).params
    orbits = symmetry.find_orbits(params, axes)
    reduced = quotient.reduce(params, axes, orbits)

    changed = jax.tree.map(lambda x: x, params)
    changed['hidden']['bias'] = changed['hidden']['bias'].at[7].set(1e-30)
    with pytest.raises(ValueError, match='features of one orbit differ'):
        quotient.reduce(changed, axes, orbits)
    with pytest.raises(ValueError, match="axis 'hidden' has length 5; 64 would fit"):
        quotient.reduce(reduced, axes, orbits)
    with pytest.raises(ValueError, match="axis 'hidden' has length 64; 5 would fit"):
        quotient.expand(params, axes, orbits)

    identity = models.create('leakynet', depth=7, width=1, init='1_ii_1')
    params = initial_state(identity, sgd()).params
    axes = identity.feature_axes()
    orbits = symmetry.find_orbits(params, axes['params'])
    with pytest.raises(ValueError, match='differ in block1_0/conv/kernel'):
        quotient.reduce(params, axes['params'], orbits)

    dropout = models.create('constnet', depth=7, width=1, dropout=0.1)
    with pytest.raises(ValueError, match=r'dropout=0\.1'):
        quotient.Quotient(dropout, axes, orbits)
