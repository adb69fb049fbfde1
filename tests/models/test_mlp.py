import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerojax import models


@pytest.mark.parametrize('unique', [1, 3, None])
def test_the_toy_has_the_chosen_number_of_unique_features_and_keeps_them(unique):
    model = models.create('mlp', width=12, init='random', unique_features=unique)
    images = np.random.default_rng(1).normal(size=(16, 8, 8, 1)).astype(np.float32)
    key = jax.random.key(0, impl='rbg')  # compiles much faster
    params = jax.jit(functools.partial(model.init, train=False))(key, images)
    labels = np.eye(10, dtype=np.float32)[np.arange(16) % 10]

    @jax.jit
    @jax.value_and_grad
    def loss_and_grads(params):
        logits = model.apply(params, images, train=True)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * labels, axis=1))

    losses = []
    for _ in range(4):
        loss, grads = loss_and_grads(params)
        losses.append(loss)
        params = jax.tree.map(lambda w, g: w - np.float32(0.1) * g, params, grads)
    assert losses[-1] < losses[0]
    hidden, head = params['params']['hidden']['kernel'], params['params']['head']['kernel']
    assert len(np.unique(np.concatenate([hidden, head.T]), axis=1).T) == (unique or 12)
