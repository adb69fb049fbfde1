"""A perturbation that is aimed at some streams, through the steps that train the others."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
import quick
import small_step
from flax.traverse_util import flatten_dict

from zerojax import models, perturb, step, symmetry
from zerojax.perturb import Perturbation

OWN_AXES = {
    'first': {'kernel': (None, None, None, 'a'), 'bias': ('a',)},
    'second': {'kernel': (None, None, 'a', 'b'), 'bias': ('b',)},
    'head': {'kernel': ('b', None), 'bias': (None,)},
}


class Own(nn.Module):
    """A model that zerojax does not ship, all its features equal: a step that trains it."""

    @nn.compact
    def __call__(self, x, train):
        del train
        constant = nn.initializers.constant
        x = nn.relu(nn.Conv(6, (3, 3), kernel_init=constant(0.1), name='first')(x))
        x = nn.relu(nn.Conv(5, (3, 3), kernel_init=constant(0.1), name='second')(x))
        return nn.Dense(10, kernel_init=constant(0.1), name='head')(x.mean(axis=(1, 2)))

    def feature_axes(self):
        return {'params': OWN_AXES, 'batch_stats': {}}


CONSTNET = models.create('constnet', depth=7, width=1)
NETWORKS = {
    'post_relu': CONSTNET,
    'pre_relu': models.create('constnet', depth=7, width=1, shortcut='pre_relu'),
    'leakynet': models.create('leakynet', depth=7, width=1, init='1_1_1_1'),
    'own': Own(),
}
WEIGHT_KINDS = {
    'gaussian': Perturbation('gaussian', 0.1),
    'relative': Perturbation('gaussian', 0.5, relative=True),
    'one_weight': Perturbation('one_weight', 0.5),
    'unequal_init': Perturbation('unequal_init', 0.1, count=3),
}
WITHIN_STEPS = {
    'gaussian': Perturbation('gaussian', 0.1, at_step=1, every=3),
    'gradient': Perturbation('gradient', 0.5),
    'activation': Perturbation('activation', 0.1),
    'relative': Perturbation('activation', 0.1, relative=True),
    'backward': Perturbation('activation', 0.1, backward=True),
    'dropout': Perturbation('dropout', 0.5),
    'disout': Perturbation('disout', 0.5, strength=1.0),
}
TX = optax.sgd(0.05, 0.9)


@functools.cache
def initial_state(model):
    create = functools.partial(step.create_state, model, TX, small_step.SHAPE)
    return quick.jit(functools.partial(create, seed=0, perturbation_seed=0))()


@functools.cache
def unperturbed_step(model):
    return step.make_train_step(model, TX)


def assert_broken(streams, model, train_step, params=None):
    """After some steps these streams are broken, all others symmetric; and each was trained."""
    axes = model.feature_axes()['params']
    state = jax.tree.map(lambda x: x.copy(), initial_state(model))
    before = flatten_dict(jax.tree.map(np.asarray, state.params))
    if params is not None:
        state = dataclasses.replace(state, params=params)
    state, _ = small_step.run(train_step, state, 8)
    found = symmetry.asymmetry_by_stream(state.params, axes)
    assert {name for name, value in found.items() if value > 0} == set(streams)
    trained = [
        names.values()
        for path, x, names in symmetry.named_axes(state.params, axes)
        if (x != before[path]).any()
    ]
    assert set().union(*trained) == set(symmetry.stream_names(axes))


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('kind', WEIGHT_KINDS)
def test_weights_aimed_at_any_streams_leave_all_others_symmetric_to_the_bit(name, kind):
    """One by one, and all but the first at once."""
    model = NETWORKS[name]
    axes = model.feature_axes()['params']
    names = symmetry.stream_names(axes)
    several = [] if kind == 'one_weight' else [tuple(names[1:])]  # it may meet one of them alone
    for streams in [(each,) for each in names] + several:
        p = dataclasses.replace(WEIGHT_KINDS[kind], streams=streams)
        key, first = jax.random.key(5), jax.numpy.int32(0)
        change = functools.partial(perturb.perturb_weights, p, feature_axes=axes)
        params = quick.jit(change)(initial_state(model).params, key, first)
        assert_broken(streams, model, unperturbed_step(model), params)


@pytest.mark.parametrize(
    'name,kind',
    [*[('post_relu', kind) for kind in WITHIN_STEPS], *[('own', kind) for kind in WITHIN_STEPS],
     ('pre_relu', 'activation'), ('leakynet', 'activation'), ('leakynet', 'gradient')],
)  # fmt: skip
def test_what_acts_within_steps_leaves_all_other_streams_symmetric_to_the_bit(name, kind):
    model = NETWORKS[name]
    streams = symmetry.stream_names(model.feature_axes()['params'])[1:2]
    p = dataclasses.replace(WITHIN_STEPS[kind], streams=tuple(streams))
    train_step = step.train_step_function(model, TX, perturbation=p)
    assert_broken(streams, model, quick.jit(train_step))
