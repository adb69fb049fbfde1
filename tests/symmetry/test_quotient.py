import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

from zerojax import models, symmetry
from zerojax.run import data
from zerojax.step import create_state, optimizer, train_step_function
from zerojax.step.precision import numbers_of
from zerojax.symmetry import quotient

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


def quotient_of(model, small_model, tx, state):
    """The small network, its optimizer and its state."""
    axes = model.feature_axes()
    orbits = symmetry.find_orbits(state.params, axes['params'])
    small = quotient.Quotient(small_model(orbits.counts()), axes, orbits)
    tx = optax.chain(quotient.average_gradients(axes['params'], orbits), tx)
    params = quotient.reduce(state.params, axes['params'], orbits)
    batch_stats = quotient.reduce(state.batch_stats, axes['batch_stats'], orbits)
    state = dataclasses.replace(
        state, params=params, batch_stats=batch_stats, opt_state=tx.init(params)
    )
    return small, tx, state, orbits


def constnet(**options):
    model = models.create('constnet', depth=7, convolution='patches', **options)
    return model, lambda counts: model.clone(feature_counts=counts)


def leakynet():
    model = models.create('leakynet', depth=7, width=1, init='1_11_1', convolution='patches')
    return model, lambda counts: model.clone(feature_counts=counts)


def toy():
    model = models.create('mlp', width=64, init='random', unique_features=5)
    return model, lambda counts: model.clone(width=counts['hidden'])


NETWORKS = {
    'post_relu': (lambda: constnet(width=1), sgd),
    'pre_relu': (lambda: constnet(width=1, shortcut='pre_relu'), lambda: optax.adam(1e-3)),
    'leakynet': (leakynet, sgd),
    'toy': (toy, sgd),
}


@pytest.mark.parametrize('network', NETWORKS)
def test_the_quotient_trains_as_the_symmetric_network_to_rounding(network):
    make, make_tx = NETWORKS[network]
    model, small_model = make()
    with numbers_of('float64'):
        tx = make_tx()
        state = initial_state(model, tx, jnp.float64)
        small, small_tx, small_state, orbits = quotient_of(model, small_model, tx, state)
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


def test_there_and_back_changes_no_bit():
    model, _ = toy()
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
    small, small_tx, small_state, _ = quotient_of(
        model, lambda counts: model.clone(feature_counts=counts), tx, state
    )
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batches())

    def flops(model, tx, state):
        return jax.jit(train_step_function(model, tx)).lower(state, batch).cost_analysis()['flops']

    assert flops(small, small_tx, small_state) < 1e-3 * flops(model, tx, state)


def test_what_has_no_quotient_is_refused():
    model, _ = toy()
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
