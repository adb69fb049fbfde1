import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerojax.models import layers


class WithDropout(nn.Module):
    """A layer in a network, twice: where it stands is in its key."""

    layer: Any

    @nn.compact
    def __call__(self, x):
        return self.layer()(self.layer()(x))


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.99])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_dropout_is_that_of_flax_and_64_bit_numbers_change_no_draw(rate, dtype):
    x, rngs = jnp.ones((8, 5, 5, 16), dtype), {'dropout': jax.random.key(3)}
    flax = WithDropout(functools.partial(nn.Dropout, rate, deterministic=False))
    ours = WithDropout(lambda: functools.partial(layers.dropout, rate=rate, train=True))
    expected = flax.apply({}, x, rngs=rngs)
    actual = ours.apply({}, x, rngs=rngs)
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, expected)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(ours.apply({}, x, rngs=rngs), expected)
        wide = ours.apply({}, x.astype(jnp.float64), rngs=rngs)
        assert wide.dtype == jnp.float64
        np.testing.assert_array_equal(wide != 0, expected != 0)
