"""Whether an optimizer follows gradients, and treats each weight by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zerojax.measure import optimizers

PARAMS = {'kernel': np.zeros((3, 4), np.float32), 'bias': np.zeros(4, np.float32)}
CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))


@pytest.fixture(autouse=True)
def standard_promotion():
    """As users have it."""
    with jax.numpy_dtype_promotion('standard'):
        yield


def by_part(kernel, bias):
    return optax.partition(
        {'kernel': kernel, 'bias': bias}, {name: name for name in ('kernel', 'bias')}
    )


def expanded(params):
    """Each output three times."""
    return jax.tree.map(lambda x: np.repeat(x, 3, axis=-1), params)


ALONE = [
    optax.sgd(0.1, 0.9, nesterov=True), optax.adam(1e-2, mu_dtype=jnp.bfloat16),
    optax.adamw(1e-2, mask={'kernel': True, 'bias': False}), optax.rmsprop(1e-2, centered=True),
    optax.adabelief(1e-2), optax.adagrad(1e-2), optax.nadam(1e-2), optax.radam(1e-2),
    optax.yogi(1e-2), optax.yogi(optax.linear_schedule(0.0, 1e-2, 10)),
    optax.chain(optax.clip(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, 10))),
    optax.MultiSteps(optax.yogi(1e-2), 16).gradient_transformation(),
    by_part(optax.sgd(0.1), optax.set_to_zero()), optax.apply_if_finite(optax.sgd(0.1), 3),
    optax.chain(optax.add_decayed_weights(1e-4), optax.keep_params_nonnegative(), optax.sgd(0.1)),
]  # fmt: skip


@pytest.mark.parametrize('tx', ALONE)
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_most_optimizers_follow_gradients_of_each_weight_alone(tx, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    assert optimizers.follows_gradients(tx, params)
    optimizers.check_each_alone(tx, params, expanded)


@pytest.mark.parametrize(
    'tx',
    [
        optax.lion(1e-2), optax.sign_sgd(1e-2), optax.rprop(1e-2),
        optax.lion(optax.linear_schedule(0.0, 1e-2, 10)),
        optax.MultiSteps(optax.lion(1e-2), 16).gradient_transformation(),
        by_part(optax.sgd(0.1), optax.lion(1e-2)),
        optax.stateless_with_tree_map(lambda grad, _: jnp.where(grad > 0, -0.1, 0.1)),
    ],
)  # fmt: skip
def test_signs_of_gradients_are_not_followed(tx):
    """Also those of some arrays alone, or however they are written."""
    assert not optimizers.follows_gradients(tx, PARAMS)


@pytest.mark.parametrize(
    'tx',
    [
        CLIPPED, optax.lars(0.1), optax.lamb(1e-2), optax.adafactor(1e-2, 1),
        optax.contrib.muon(1e-2), optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(0.1)),
        optax.MultiSteps(CLIPPED, 16).gradient_transformation(), optax.centralize(),
        optax.adaptive_grad_clip(0.01), optax.noisy_sgd(0.1, key=0),
        optax.chain(CLIPPED, optax.scale_by_schedule(optax.linear_schedule(0.0, 1.0, 20))),
    ],
)  # fmt: skip
def test_weights_that_are_updated_together_are_seen(tx):
    with pytest.raises(
        ValueError, match='tx: what it does to a weight is random or depends on oth'
    ):
        optimizers.check_each_alone(tx, PARAMS, uneven)


def uneven(params):
    """The first output twice as often as the others: means over outputs are not the same."""
    return jax.tree.map(lambda x: np.repeat(x, [4, 2, 2, 2], axis=-1), params)


def test_so_they_are_beside_many_weights_that_stand_once():
    params = PARAMS | {'alone': np.zeros((100, 1000), np.float32)}
    with pytest.raises(ValueError, match='tx: what it does to a weight'):
        optimizers.check_each_alone(
            CLIPPED, params, lambda tree: expanded(tree) | {'alone': tree['alone']}
        )


def test_what_cannot_be_tried_out_is_a_sentence():
    decay = optax.stateless(
        lambda grads, params: jax.tree.map(lambda g, w, start: g + w - start, grads, params, PARAMS)
    )
    with pytest.raises(
        ValueError, match=r'tx: fails for a smaller network \(.*shapes.*what it hol'
    ):
        optimizers.check_each_alone(decay, PARAMS, expanded)
    with pytest.raises(ValueError, match='tx: does nothing in 60 updates, so it cannot be seen'):
        optimizers.check_each_alone(optax.set_to_zero(), PARAMS, expanded)
