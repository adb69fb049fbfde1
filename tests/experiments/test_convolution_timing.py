"""All expressions of a convolution that are timed are the same function."""

import jax
import numpy as np
import pytest

from experiments.performance import convolutions


@pytest.mark.parametrize('which', convolutions.PASSES)
@pytest.mark.parametrize('shape', [(8, 3, 5, 1), (8, 4, 6, 2)])
def test_all_expressions_agree(shape, which):
    with jax.enable_x64(True):
        arguments = [jax.numpy.asarray(each, 'float64') for each in convolutions.inputs(shape, 2)]
        found = {
            name: np.asarray(jax.jit(each)(*arguments))
            for name, each in convolutions.expressions(which, shape[-1]).items()
        }
    assert ('outer' in found) == (which == 'weight gradient' and shape[-1] == 1)
    for name in found:
        np.testing.assert_allclose(found[name], found['direct'], rtol=1e-12, atol=1e-12)
