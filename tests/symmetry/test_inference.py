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
