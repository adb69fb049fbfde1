import functools

import jax
import numpy as np

from zerojax import models

KEY = jax.random.key(0, impl='rbg')  # compiles much faster


def test_fixup_starts_as_its_skip_connections():
    """Rule 1: the last convolution of each branch is 0, so a branch adds nothing."""
    model = models.create('wideresnet', depth=10, width=1, init='fixup')
    images = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)
    start = functools.partial(model.init_with_output, train=True, capture_intermediates=True)
    _, variables = jax.jit(start)(KEY, images)
    captured = variables['intermediates']
    np.testing.assert_array_equal(
        captured['block1_0']['__call__'][0], captured['stem']['__call__'][0]
    )
