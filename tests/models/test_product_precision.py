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
    """Precisions of all products of a jaxpr, those of inner ones included.

    But for the sums of BatchNorm under 'mixed', by eight rows of ones: always 'highest'.
    """
    for equation in jaxpr.eqns:
        is_sum = any(8 in x.aval.shape for x in equation.invars if x.aval.ndim == 2)
        if equation.primitive.name in ('dot_general', 'conv_general_dilated') and not is_sum:
            yield equation.params['precision']
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
    layers = len([x for x in jax.tree.leaves(variables['params']) if x.ndim >= 2])
    if convolution != 'mixed':  # which leaves products with tangents of 0 for XLA to remove
        assert len(found) == 3 * layers, 'forward, and backward to inputs and to weights'
    expected = jax.lax.Precision(jax.lax.Precision.__members__[precision.upper()])
    assert set(found) == {(expected, expected)}


def test_highest_is_the_default():
    assert models.create('constnet').precision == 'highest'
    with pytest.raises(ValueError, match=r"^precision='tf32': must be one of highest, high, def"):
        models.create('mlp', precision='tf32')
