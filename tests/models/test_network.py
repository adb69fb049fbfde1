"""What holds for every network."""

import functools
import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from zerojax import models
from zerojax.models import constnet, wide_resnet
from zerojax.models.layers import Dropout

NETWORKS = {
    'constnet': {'name': 'constnet', 'depth': 10, 'width': 1, 'init': 'random'},
    'constnet, width 2': {'name': 'constnet', 'depth': 7, 'width': 2, 'init': 'random'},
    'leakynet': {'name': 'leakynet', 'depth': 13, 'width': 1, 'init': 'h_hhh_hhh_hhh'},
    'mlp': {'name': 'mlp', 'width': 12, 'init': 'random'},
    'wideresnet': {'name': 'wideresnet', 'depth': 10, 'width': 1, 'init': 'he'},
    'fixup, width 2': {'name': 'wideresnet', 'depth': 16, 'width': 2, 'init': 'fixup'},
}
CONVOLUTIONAL = {
    'constnet': {'name': 'constnet', 'depth': 7, 'width': 1},
    'leakynet': {'name': 'leakynet', 'depth': 10, 'width': 1, 'init': '1_ii_ii_hh'},
    'wideresnet': {'name': 'wideresnet', 'depth': 10, 'width': 1, 'init': 'he'},
    'fixup': {'name': 'wideresnet', 'depth': 10, 'width': 1, 'init': 'fixup'},
}
KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS)
def network(request):
    return models.create(**request.param)


@pytest.fixture(params=CONVOLUTIONAL.values(), ids=CONVOLUTIONAL)
def arguments(request):
    return request.param


def shapes_of(model, images=IMAGES):
    return jax.eval_shape(functools.partial(model.init, train=False), KEY, images)


def some_variables(model):
    """Of the model's shapes and dtypes, without any symmetry; none of them is 0."""
    rng = np.random.default_rng(0)

    def draw(x):
        if x.ndim == 1:
            return rng.uniform(0.5, 1.5, x.shape).astype(x.dtype)
        return rng.normal(0, np.prod(x.shape[:-1]) ** -0.5, x.shape).astype(x.dtype)

    return jax.tree.map(draw, shapes_of(model))


def assert_axes_fit(model):
    """Every variable is declared, and axes of one name have one size, which are returned."""
    variables, axes = flatten_dict(shapes_of(model)), flatten_dict(model.feature_axes())
    assert variables.keys() == axes.keys()
    sizes = {}
    for path, x in variables.items():
        for name, size in zip(axes[path], x.shape, strict=True):
            assert name is None or sizes.setdefault(name, size) == size
    return sizes


def test_feature_axes_describe_every_variable(network):
    assert_axes_fit(network)


@pytest.mark.parametrize('name', ['constnet', 'leakynet', 'wideresnet', 'fixup, width 2'])
def test_features_are_as_many_as_they_are_said_to_be(name):
    network = models.create(**NETWORKS[name])
    counts = {axis: 2 + i for i, axis in enumerate(sorted(assert_axes_fit(network)))}
    assert assert_axes_fit(network.with_features(counts)) == counts


def test_permuting_the_features_of_one_name_changes_nothing(network):
    """What the declaration means: it names exactly the axes that a permutation must act on."""
    variables = some_variables(network)
    logits = jax.jit(functools.partial(network.apply, train=False))
    expected = logits(variables, IMAGES)
    assert np.ptp(expected) > 0.01
    axes = flatten_dict(network.feature_axes())
    for name in {name for names in axes.values() for name in names if name}:
        permuted = {
            path: np.flip(x, [axis for axis, its_name in enumerate(axes[path]) if its_name == name])
            for path, x in flatten_dict(variables).items()
        }
        actual = logits(unflatten_dict(permuted), IMAGES)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize('shape', [(9, 9, 1), (28, 28, 1), (32, 32, 3), (5, 7, 4)])
def test_images_of_any_size_and_number_of_channels(network, shape):
    """The strides halve the size twice, rounding up; the mean over space takes what is left."""
    images = jnp.zeros((2, *shape))
    init = functools.partial(network.init_with_output, train=False, capture_intermediates=True)
    logits, variables = jax.eval_shape(init, KEY, images)
    assert logits.shape == (2, 10)
    if isinstance(network, models.MLP):
        assert variables['params']['hidden']['kernel'].shape == (np.prod(shape), 12)
    else:
        (last,) = variables['intermediates'][network.layers()[-1]]['__call__']
        assert last.shape[1:3] == (-(-shape[0] // 4), -(-shape[1] // 4))


def test_layers_are_the_submodules_in_order(network):
    assert set(network.layers()) <= shapes_of(network)['params'].keys()
    assert network.layers()[0] in ('stem', 'hidden')


def test_dropout_is_in_each_block_and_in_training_only(arguments):
    plain, model = models.create(**arguments), models.create(**arguments, dropout=0.5)

    def is_dropout(module, _):
        return isinstance(module, Dropout)

    call = functools.partial(model.init_with_output, train=True, capture_intermediates=is_dropout)
    _, variables = jax.eval_shape(call, {'params': KEY, 'dropout': KEY}, IMAGES)
    assert [path[0] for path in flatten_dict(variables['intermediates'])] == model.layers()[1:]

    def evaluation(model):
        return str(jax.make_jaxpr(functools.partial(model.apply, train=False))(variables, IMAGES))

    assert evaluation(model) == evaluation(plain)


def test_mixed_precision_keeps_parameters_statistics_and_logits_in_float32(arguments):
    """And every convolution, forward and backward, computes in bfloat16."""
    single, mixed = models.create(**arguments), models.create(**arguments, dtype='bfloat16')

    def loss(params, batch_stats):
        logits, updated = mixed.apply(
            {'params': params, 'batch_stats': batch_stats}, IMAGES, train=True,
            mutable=['batch_stats'],
        )  # fmt: skip
        return jnp.sum(logits**2), (logits, updated)

    with jax.numpy_dtype_promotion('standard'):  # Flax's BatchNorm mixes bfloat16 and float32
        variables = some_variables(mixed)
        params, batch_stats = variables['params'], variables.get('batch_stats', {})
        gradient = jax.make_jaxpr(jax.grad(loss, has_aux=True), return_shape=True)
        jaxpr, results = gradient(params, batch_stats)
        logits, expected = (
            jax.jit(functools.partial(model.apply, train=True, mutable=['batch_stats']))(
                variables, IMAGES
            )[0]
            for model in (mixed, single)
        )
    for x in jax.tree.leaves((variables, results)):
        assert x.dtype == np.float32
    convolutions = re.findall(r'(\w+)\[[\d,]+\] = conv_general_dilated', str(jaxpr))
    assert len(convolutions) > 9
    assert set(convolutions) == {'bf16'}
    # bfloat16 rounds to 2^-9, once in each of at most 10 layers.
    assert 0 < np.abs(logits - expected).max() < 10 * 2**-9 * np.abs(expected).max()


@pytest.mark.parametrize(
    'arguments',
    [
        *({'name': 'constnet', 'depth': 7, 'init': init} for init in constnet.INITS),
        {'name': 'constnet', 'depth': 7, 'init': 'averaging', 'sigma_w': 0.1},
        {'name': 'leakynet', 'depth': 10, 'init': '1_ih_ka_1i'},
        {'name': 'mlp', 'init': 'averaging'},
        {'name': 'mlp', 'init': 'random', 'unique_features': 3},
        *({'name': 'wideresnet', 'depth': 10, 'init': init} for init in wide_resnet.INITS),
    ],
    ids=lambda arguments: ' '.join(map(str, arguments.values())),
)
def test_tracing_the_initialisation_allocates_nothing(arguments):
    """So that weights can be counted of which no memory could hold a thousandth."""
    model = models.create(**arguments, width=2**20)
    arrays = len(jax.live_arrays())
    tracemalloc.start()
    shapes = shapes_of(model, jnp.zeros((1, 32, 32, 3)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(x.size for x in jax.tree.leaves(shapes)) > 1e9
    assert peak < 2**24
    assert len(jax.live_arrays()) <= arrays + 1  # the images
