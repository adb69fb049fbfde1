"""Axes found in a function are those that may be permuted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from zerojax import models, symmetry


def same_up_to_names(inferred, declared):
    """Whether two declarations group the same axes, and leave the same without a name."""
    inferred, declared = flatten_dict(inferred), flatten_dict(declared)
    assert inferred.keys() == declared.keys()
    pairs = {(None, None)}
    for path, names in declared.items():
        pairs |= set(zip(inferred[path], names, strict=True))
    ours, theirs = zip(*pairs, strict=True)
    return len(set(ours)) == len(pairs) == len(set(theirs))


NETWORKS = [
    *({'name': 'constnet', 'depth': 10, 'init': init} for init in models.constnet.INITS),
    {'name': 'constnet', 'depth': 7, 'shortcut': 'pre_relu'},
    {'name': 'constnet', 'depth': 7, 'dtype': 'bfloat16'},
    {'name': 'leakynet', 'depth': 10, 'init': '1_ii_hh_ak'},
    *({'name': 'wideresnet', 'depth': 10, 'init': init} for init in models.wide_resnet.INITS),
    {'name': 'mlp', 'init': 'random', 'width': 1},
    {'name': 'mlp', 'init': 'averaging', 'width': 9},
]


@pytest.fixture
def standard_promotion():
    """Flax's layers mix dtypes."""
    with jax.numpy_dtype_promotion('standard'):
        yield


@pytest.mark.usefixtures('standard_promotion')
@pytest.mark.parametrize('convolution', ['direct', 'patches', 'mixed'])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('network', NETWORKS, ids=lambda x: '-'.join(map(str, x.values())))
def test_shipped_networks_are_as_declared(network, channels, convolution):
    """However they are computed, in training and out of it, at any width."""
    images = jax.ShapeDtypeStruct((2, 8, 8, channels), jnp.float32)
    model = models.create(**{'width': 1} | network, convolution=convolution)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    declared = model.feature_axes()
    inferred = symmetry.infer_feature_axes(
        lambda variables, x: model.apply(variables, x, train=False), shapes, images
    )
    assert same_up_to_names(inferred.axes, {key: declared[key] for key in shapes})
    if 'batch_stats' not in shapes:
        return

    def in_training(params, x):
        variables = {'params': params, 'batch_stats': statistics}
        return model.apply(variables, x, train=True, mutable=['batch_stats'])[0]

    statistics = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes['batch_stats'])
    inferred = symmetry.infer_feature_axes(in_training, shapes['params'], images)
    assert same_up_to_names(inferred.axes, declared['params'])


def two_layers(p, x):
    return jnp.tanh(x @ p['first']['kernel'] + p['first']['bias'][None]) @ p['second']['kernel']


TWO_LAYERS = {
    'first': {'kernel': np.zeros((4, 5)), 'bias': np.zeros(5)},
    'second': {'kernel': np.zeros((5, 3))},
}


def test_report_says_what_every_axis_is():
    """Streams with their axes, and the reason of every axis without a name."""
    inferred = symmetry.infer_feature_axes(two_layers, TWO_LAYERS, np.zeros((2, 4)))
    assert inferred.axes == {
        'first': {'kernel': (None, 'first'), 'bias': ('first',)},
        'second': {'kernel': ('first', None)},
    }
    assert inferred.report.splitlines() == [
        'first: first/bias axis 0, first/kernel axis 1, second/kernel axis 0',
        'no name for first/kernel axis 0: it is an axis of the inputs',
        'no name for second/kernel axis 1: it is an axis of the outputs',
    ]


def test_what_is_inferred_is_a_declaration():
    """The rest of `symmetry` takes it."""
    axes = symmetry.infer_feature_axes(two_layers, TWO_LAYERS, np.zeros((2, 4))).axes
    assert symmetry.stream_names(axes) == ['first']
    assert symmetry.find_orbits(TWO_LAYERS, axes).counts() == {'first': 1}


def test_several_inputs_and_any_tree():
    """A tuple holds all further arguments; any pytree is given back with names in it."""

    def apply(params, x, extra):
        layers, gain = params
        return (jnp.tanh(x @ layers[0]) * extra['scale'][None]) @ layers[1] * gain

    params = ([np.zeros((4, 5)), np.zeros((5, 3))], np.zeros(()))
    inputs = np.zeros((2, 4)), {'scale': np.zeros(5)}
    inferred = symmetry.infer_feature_axes(apply, params, inputs)
    assert inferred.axes == ([(None, None), (None, None)], ())
    one = inputs[0], {'scale': np.zeros(1)}
    inferred = symmetry.infer_feature_axes(apply, params, one)
    assert inferred.axes == ([(None, '0'), ('0', None)], ())


def test_a_single_array_is_a_tree():
    """And its stream is one of the params."""
    inferred = symmetry.infer_feature_axes(lambda p, x: jnp.sum(p**2) * x, np.zeros(3), np.zeros(2))
    assert inferred.axes == ('params',)


def test_names_differ():
    """Streams that one module writes first are told apart by array, or by axis."""

    def apply(params, x):
        cell = params['cell']
        hidden = jnp.tanh(jnp.einsum('bi,ihd->bhd', x, cell['heads']))
        other = jnp.tanh(x @ cell['other'])
        return jnp.sum(hidden**2, (1, 2)) + jnp.sum(other, 1)

    params = {'cell': {'heads': np.zeros((4, 2, 3)), 'other': np.zeros((4, 5))}}
    axes = symmetry.infer_feature_axes(apply, params, np.zeros((2, 4))).axes
    assert axes['cell']['heads'] == (None, 'cell/heads.1', 'cell/heads.2')
    assert axes['cell']['other'] == (None, 'cell/other')


def test_parameters_that_are_not_used_have_no_name():
    """Whatever is in them: nothing indexes them."""
    params = TWO_LAYERS | {'unused': np.zeros(7)}
    inferred = symmetry.infer_feature_axes(two_layers, params, np.zeros((2, 4)))
    assert inferred.axes['unused'] == (None,)
    assert 'no name for unused axis 0: the function does not use it' in inferred.report


def test_what_is_no_array_is_refused():
    """With its path, and what to do."""
    with pytest.raises(ValueError, match=r'params: second/kernel is .*tanh.*, must be an array'):
        symmetry.infer_feature_axes(two_layers, {'second': {'kernel': jnp.tanh}}, np.zeros((2, 4)))
