import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from zerojax import models
from zerojax.models.layers import Dropout

KEY = jax.random.key(0, impl='rbg')  # compiles much faster
IMAGES = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)


def start(capture=True, **arguments):
    """Logits and variables of the first call in training, with what `capture` takes along."""
    model = models.create('constnet', width=1, **arguments)
    call = functools.partial(model.init_with_output, train=True, capture_intermediates=capture)
    return jax.jit(call)({'params': KEY, 'dropout': KEY}, IMAGES)


def test_parameter_count_of_the_papers_network():
    """17,115,390 in PyTorch, less the 3 unused numbers ('scale', 'biases') of each of 12 blocks."""
    model = models.create('constnet', depth=16, width=10, num_classes=10)
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, KEY, IMAGES)['params']
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 17_115_390 - 3 * 12


def test_the_noise_axis_lies_between_constnet_and_random_control():
    def kernels(**arguments):
        model = models.create('constnet', depth=7, width=1, **arguments)
        params = jax.jit(functools.partial(model.init, train=False))(KEY, IMAGES)['params']
        return (
            params['stem']['kernel'],
            params['block2_0']['conv']['kernel'],
            params['block2_0']['shortcut']['kernel'],
        )

    stem, conv, shortcut = kernels()
    assert not conv.any()
    noisy_stem, noisy_conv, noisy_shortcut = kernels(sigma_w=0.5)
    np.testing.assert_array_equal(stem, noisy_stem)
    np.testing.assert_array_equal(shortcut, noisy_shortcut)
    variance = 2 * 0.5 / (9 * 32)
    assert np.var(noisy_conv) == pytest.approx(variance, rel=5 * (2 / conv.size) ** 0.5)
    random, half = kernels(init='random'), kernels(init='random', sigma_w=0.25)
    for whole, part in zip(random, half, strict=True):
        np.testing.assert_allclose(part, whole / 2, rtol=1e-6)


def test_logits_are_zero_and_features_constant_at_the_start():
    logits, variables = start(depth=10)
    assert (logits == 0).all()
    for path, (output,) in flatten_dict(variables['intermediates']).items():
        if output.ndim == 4:
            assert (output == output[..., :1]).all(), path


def test_shortcut_reads_before_or_after_the_relu():
    def of_block2(shortcut):
        captured = start(depth=7, shortcut=shortcut)[1]['intermediates']['block2_0']
        return captured['bn']['__call__'][0], captured['shortcut']['__call__'][0]

    normalized, before = of_block2('pre_relu')
    read = normalized[:, ::2, ::2, 0]  # the shortcut averages equal features
    np.testing.assert_allclose(before[..., 0], read, atol=1e-6)
    _, after = of_block2('post_relu')
    np.testing.assert_allclose(after[..., 0], np.maximum(read, 0), atol=1e-6)


def test_dropout_behind_the_stem_only():
    def zeros(dropout_at):
        is_dropout = lambda module, _: isinstance(module, Dropout)  # noqa: E731
        _, variables = start(is_dropout, depth=7, dropout=0.5, dropout_at=dropout_at)
        outputs = flatten_dict(variables['intermediates'])
        return {path[:-1]: jnp.mean(output == 0) for path, (output,) in outputs.items()}

    assert zeros('stem') == {('Dropout_0',): pytest.approx(0.5, abs=0.05)}
    assert {path[0] for path in zeros('blocks')} == {'block1_0', 'block2_0', 'block3_0'}


def test_dropout_draws_from_its_key():
    model = models.create('constnet', depth=7, width=1, init='random', dropout=0.5)
    variables = jax.jit(functools.partial(model.init, train=False))(KEY, IMAGES)
    variables['params']['head']['kernel'] += 1.0

    @jax.jit
    def logits(key):
        rngs = {'dropout': key}
        return model.apply(variables, IMAGES, train=True, mutable=['batch_stats'], rngs=rngs)[0]

    assert (logits(KEY) == logits(KEY)).all()
    assert (logits(KEY) != logits(jax.random.key(1, impl='rbg'))).any()
