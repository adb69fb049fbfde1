import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerojax import models


def test_a_pair_of_leakynet_blocks_computes_minus_x():
    """Even block, then odd block, before the odd block's BatchNorm."""
    model = models.create('leakynet', depth=10, width=1, init='1_ii_11_11')
    images = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)
    start = functools.partial(model.init_with_output, train=False, capture_intermediates=True)
    _, variables = jax.jit(start)(jax.random.key(0), images)
    captured = variables['intermediates']
    (stem,) = captured['stem']['__call__']
    (out,) = captured['block1_1']['__call__']
    # At the start BatchNorm in evaluation mode only divides by sqrt(1 + epsilon).
    np.testing.assert_allclose(out, -stem / np.sqrt(1 + 1e-5), rtol=1e-5, atol=1e-6)


def test_leakynet_normalizes_behind_odd_blocks_counted_over_all_stages():
    model = models.create('leakynet', depth=13, width=1, init='1_iii_iii_iii')
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert set(variables['batch_stats']) == {'block1_1', 'block2_0', 'block2_2', 'block3_1'}


@pytest.mark.parametrize(
    'init,message',
    [
        ('1_ii_ix_11', r"init='1_ii_ix_11': block 3, letter 'x': must be one of '1' averaging"),
        ('x_ii_ii_11', r"init='x_ii_ii_11': the stem, letter 'x'"),
        ('1_ii_ii_1', r"init='1_ii_ii_1': has 6 letters; depth=10 needs 7, one for the stem"),
        ('', r"init='': has 0 letters"),
    ],
)
def test_a_bad_init_string_is_refused_letter_by_letter(init, message):
    with pytest.raises(ValueError, match=message):
        models.create('leakynet', depth=10, width=1, init=init)
