"""Weights of the paper's PyTorch code, in and out."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from zerojax.models import ConstNet, LeakyNet, Network

__all__ = ['check_unused', 'from_reference', 'to_reference', 'unused_in_reference']

# Our collection and last path element: the reference's last name.
_BATCH_NORM = {
    ('params', 'scale'): 'weight',
    ('params', 'bias'): 'bias',
    ('batch_stats', 'mean'): 'running_mean',
    ('batch_stats', 'var'): 'running_var',
}


def _reference_name(path: tuple[str, ...]) -> str:
    """('params', 'block1_0', 'conv', 'kernel') -> 'block1.layer.0.conv.weight'."""
    collection, *modules, leaf = path
    if modules == ['stem']:
        return 'conv1.weight'
    if modules == ['head']:
        return {'kernel': 'fc.weight', 'bias': 'fc.bias'}[leaf]
    block, module = modules
    stage, layer = block.split('_')
    module, last = {
        'bn': ('bn', _BATCH_NORM.get((collection, leaf))),
        'conv': ('conv', 'weight'),
        'shortcut': ('conv_res', 'weight'),
        'shift': ('biases', '0'),
    }[module]
    return f'{stage}.layer.{layer}.{module}.{last}'


def from_reference(arrays: Mapping[str, Any], model: Network) -> dict[str, Any]:
    """Flax variables {'params', 'batch_stats'} from arrays under the PyTorch code's names.

    Convolutions [c_out, c_in, k, k] become [k, k, c_in, c_out], the dense layer is transposed;
    dtypes are kept as far as JAX's x64 mode allows. Names that the network does not use are
    ignored; whether they may be, `check_unused` tells.

    Raises:
        ValueError: a name is missing, an array's shape does not fit the model, or the model is not
            one of that code.
    """
    model = _of_the_paper(model)
    variables = {}
    for path, axes in flatten_dict(model.feature_axes()).items():
        name = _reference_name(path)
        if name not in arrays:
            raise ValueError(f'{name}: missing among the arrays{_other_depth(arrays, model)}')
        array = np.asarray(arrays[name])
        if array.ndim != len(axes):
            raise ValueError(f'{name}: has shape {array.shape}, must have {len(axes)} axes')
        variables[path] = jnp.asarray(_to_flax(array))
    _check_sizes(variables, model)
    return {'batch_stats': {}} | unflatten_dict(variables)


def check_unused(arrays: Mapping[str, Any], model: Network) -> None:
    """Checks that the arrays are those of `model`, and not of a deeper network or another variant.

    What `from_reference` ignores must have a name that the PyTorch code gives to something which
    this network does not use, and must be as that code initialises it: what another variant of the
    network uses has moved. Of BatchNorms that are not applied the statistics tell; their scales,
    biases and counters, and the counters of all others, may be anything.

    Raises:
        ValueError: names the first array that is not so; or as `from_reference` of the model.
    """
    model = _of_the_paper(model)
    used = {_reference_name(path) for path in flatten_dict(model.feature_axes())}
    unused = unused_in_reference(model)
    for name, array in arrays.items():
        if name in used:
            continue
        if name not in unused:
            raise ValueError(
                f'{name}: a {type(model).__name__} of depth {model.depth} has no such array'
                f'{_other_depth(arrays, model)}'
            )
        expected = unused[name].flat[0]
        moved = np.asarray(array) != expected
        if moved.any() and not name.endswith(('.bn.weight', '.bn.bias', '.num_batches_tracked')):
            raise ValueError(
                f'{name}: holds {np.asarray(array)[moved][0]}, must be {expected}; '
                f'{type(model).__name__} has no use for it, another variant of that code has'
            )


def _other_depth(arrays: Mapping[str, Any], model: ConstNet | LeakyNet) -> str:
    """What to add to a message where the arrays' names are those of a network of another depth."""
    matches = [re.match(r'block[123]\.layer\.(\d+)\.', name) for name in arrays]
    layers = 1 + max((int(match[1]) for match in matches if match), default=-1)
    depth = 3 * layers + 4
    return f'; the depth of these may be {depth}' if depth not in (4, model.depth) else ''


def to_reference(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The opposite of `from_reference`: arrays under the PyTorch code's names, in its layout."""
    return {
        _reference_name(path): _to_torch(np.asarray(x))
        for path, x in flatten_dict(variables).items()
    }


def _to_flax(array: np.ndarray) -> np.ndarray:
    return array.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim])


def _to_torch(array: np.ndarray) -> np.ndarray:
    return array.transpose({4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim])


def _check_sizes(variables: dict[tuple[str, ...], Any], model: ConstNet | LeakyNet) -> None:
    """Every axis must have the model's size; the images' channels it does not know."""
    features = {'stem': 16} | {block.name: block.features for block in model.blocks()}
    others = {
        'head': ('classes', model.num_classes), 'shift': ('numbers', 1),
        'shortcut': ('taps a side', 1),
    }  # fmt: skip
    for path, axes in flatten_dict(model.feature_axes()).items():
        for axis, name in enumerate(axes):
            if (path[-2], axis) == ('stem', 2):
                continue
            what, size = others.get(path[-2], ('taps a side', 3))
            if name is not None:
                what, size = 'features', features[name]
            there = variables[path].shape[axis]
            if there != size:
                raise ValueError(
                    f'{_reference_name(path)}: {there} {what} where the model has {size}'
                )


def unused_in_reference(model: Network) -> dict[str, np.ndarray]:
    """Arrays that the PyTorch code's state dict holds beside those of `to_reference`.

    Its networks have no use for them; they are as that code initialises them, so that its strict
    `load_state_dict` is content.

    Raises:
        ValueError: the model is not one of that code.
    """
    model = _of_the_paper(model)
    arrays = {}
    for place in model.blocks():
        stage, layer = place.name.split('_')
        block = f'{stage}.layer.{layer}'
        for i in range(2):
            arrays[f'{block}.biases.{i}'] = np.zeros(1, np.float32)
        arrays[f'{block}.bn.num_batches_tracked'] = np.zeros((), np.int64)
        if isinstance(model, ConstNet):
            arrays[f'{block}.scale'] = np.ones(1, np.float32)
        else:  # behind even blocks too, though not applied
            for last, value in (
                ('weight', 1),
                ('bias', 0),
                ('running_mean', 0),
                ('running_var', 1),
            ):
                arrays[f'{block}.bn.{last}'] = np.full(place.features, value, np.float32)
    return arrays


def _of_the_paper(model: Network) -> ConstNet | LeakyNet:
    if not isinstance(model, ConstNet | LeakyNet):
        raise ValueError(f"{type(model).__name__}: not a network of the paper's PyTorch code")
    return model
