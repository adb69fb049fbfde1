"""`precision` reaches every product of every network, in both passes."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from zerojax import models
from zerojax.models.convolutions import CONVOLUTIONS
from zerojax.models.layers import PRECISIONS

NETWORKS = {
    'constnet': {'depth': 7, 'width': 2, 'shortcut': 'pre_relu'},
    'leakynet': {'depth': 7, 'width': 1, 'init': '1_i1h'},
    'mlp': {'width': 12, 'init': 'random'},
    'wideresnet': {'depth': 10, 'width': 1, 'init': 'he'},
    'wideresnet without normalisation': {'depth': 10, 'width': 1, 'init': 'fixup'},
}


def products(jaxpr):
    """(whether it is a sum by eight rows of ones, precision) of all products, inner ones included.

    BatchNorm sums in that way under 'mixed'.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name in ('dot_general', 'conv_general_dilated'):
            shapes = [x.aval.shape for x in equation.invars]
            is_sum = any(len(shape) == 2 and 8 in shape for shape in shapes)
            yield is_sum, equation.params['precision']
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('convolution', CONVOLUTIONS)
@pytest.mark.parametrize('network', NETWORKS)
def test_every_product_has_it(network, convolution, precision):
    name = network.split()[0]
    model = models.create(name, **NETWORKS[network], convolution=convolution, precision=precision)
    images = jnp.ones((2, 8, 8, 1))
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), images)

    def loss(params, images):
        logits, _ = model.apply(
            {**variables_of_zeros, 'params': params}, images, train=True, mutable=['batch_stats']
        )
        return jnp.sum(logits**2)

    variables_of_zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables)
    gradient = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))
    found = list(products(gradient(variables_of_zeros['params'], images).jaxpr))
    sums = {each for is_sum, each in found if is_sum}
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    assert sums == ({highest} if convolution == 'mixed' and 'batch_stats' in variables else set())
    others = [each for is_sum, each in found if not is_sum]
    layers = len([x for x in jax.tree.leaves(variables['params']) if x.ndim >= 2])
    if convolution == 'mixed':  # leaves products with tangents of 0 for XLA to remove
        assert len(others) >= 3 * layers - 1, 'but for the stem of one channel'
    else:
        assert len(others) == 3 * layers, 'forward, and backward to inputs and to weights'
    expected = jax.lax.Precision(jax.lax.Precision.__members__[precision.upper()])
    assert set(others) == {(expected, expected)}


def test_highest_is_the_default():
    assert models.create('constnet').precision == 'highest'
    with pytest.raises(ValueError, match=r"^precision='tf32': must be one of highest, high, def"):
        models.create('mlp', precision='tf32')
