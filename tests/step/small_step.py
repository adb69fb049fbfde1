"""A small train step that the tests of this room share."""

import functools

import jax
import numpy as np
import optax
import quick

from zerojax import models, perturb, step
from zerojax.step import optimizer

SHAPE = (8, 8, 1)


@functools.cache
def _built(perturbation, project, name, arguments):
    model = models.create(name, **dict(arguments))
    tx = optimizer.sgd(optax.constant_schedule(0.05), 0.9, False, 5e-4)
    create = functools.partial(step.create_state, model, tx, SHAPE, seed=0, perturbation_seed=0)
    train_step = step.make_train_step(model, tx, perturbation=perturbation, project=project)
    return model, tx, quick.jit(create)(), train_step


def setup(perturbation=perturb.NONE, project=False, name='constnet', **arguments):
    """Model, optimizer, a new state and the jitted train step, compiled once for all tests."""
    if name == 'constnet':
        arguments = {'depth': 7, 'width': 1, 'convolution': 'patches'} | arguments
    built = _built(perturbation, project, name, tuple(sorted(arguments.items())))
    model, tx, state, train_step = built
    return model, tx, jax.tree.map(lambda x: x.copy(), state), train_step


def batches(count):
    """Random images and labels, different for each step."""
    keys = jax.random.split(jax.random.key(7), count)
    return [
        {
            'image': jax.random.normal(key, (16, *SHAPE)),
            'label': jax.random.randint(key, (16,), 0, 10),
        }
        for key in keys
    ]


def run(train_step, state, count):
    """State and metrics after so many steps."""
    for batch in batches(count):
        state, metrics = train_step(state, batch)
    return state, metrics


def broken_at_step(state):
    """The step at which the first stream broke; -1 if none did."""
    return min((int(x) for x in state.broken_streams.values() if x >= 0), default=-1)


def bits(tree):
    """The bytes of every array."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]
