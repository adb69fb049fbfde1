import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.nnx import bridge

from zerojax import models, symmetry


def test_constnet_trains_in_nnx_as_in_linen_and_keeps_its_symmetry():
    """Through Flax's bridge: same weights, logits, gradients and statistics."""
    model = models.create('constnet', depth=7, width=1, convolution='patches')
    rng = np.random.default_rng(3)
    images = rng.normal(size=(16, 8, 8, 1)).astype(np.float32)
    labels = rng.integers(0, 10, 16)
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), images)

    @nnx.jit
    def start():
        return bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(images, train=False)

    network = start()
    tx = optax.sgd(0.1)
    optimizer = nnx.Optimizer(network, tx, wrt=nnx.Param)
    opt_state = tx.init(variables['params'])

    def loss_of(logits):
        return optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, 10)).mean()

    @nnx.jit
    def nnx_step(network, optimizer):
        def loss_function(network):
            return loss_of(network(images, train=True, mutable=['batch_stats']))

        loss, grads = nnx.value_and_grad(loss_function)(network)
        optimizer.update(network, grads)
        return loss

    @jax.jit
    def linen_step(variables, opt_state):
        def loss_function(params):
            logits, updated = model.apply(
                variables | {'params': params}, images, train=True, mutable=['batch_stats']
            )
            return loss_of(logits), updated

        (loss, updated), grads = jax.value_and_grad(loss_function, has_aux=True)(
            variables['params']
        )
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(variables['params'], updates)
        return loss, {'params': params, **updated}, opt_state

    for _ in range(3):
        loss = nnx_step(network, optimizer)
        expected, variables, opt_state = linen_step(variables, opt_state)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
    params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
        params,
        variables['params'],
    )
    assert symmetry.is_symmetric(params, model.feature_axes()['params'])
    assert jnp.any(params['head']['kernel'] != 0)
