"""Whether the kernels of a backend keep equal features bitwise equal, layer by layer.

A kernel that gives the same bits in every call may still treat features differently: the last ones
of a vector, or a tile at the edge, may be summed in another order. Whether it does depends on the
width, so it is measured on the very network. Works for any Linen model that declares its
`feature_axes` as `zerojax.symmetry` has them.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from zerojax import metrics, symmetry
from zerojax.noise import Spread, feature_spread

Tree = Any


def symmetric_fill(params: Tree, feature_axes: Tree, seed: int = 0) -> Tree:
    """Weights that tell something and have all features of a layer equal.

    Where a network starts at zeros and constants, most results are 0 and would look exact whatever
    the kernels do. Here arrays with two axes or more become N(0, 1) / fan_in (fan_in: product of
    all axes but the last), all others (scales, biases) get 0.1 · N(0, 1) added; then each feature
    is set to its layer's first one (`symmetry.project`). Drawn on the host, so that every device,
    compilation and process has the same bits.

    Args:
        params: any floats, whose shapes, dtypes and 1-D values are taken over.
        feature_axes: the declaration of `params`.
        seed: of the random numbers.

    Raises:
        ValueError: `params` and `feature_axes` do not fit each other.
    """
    generator = np.random.default_rng(seed)
    filled = {}
    for path, x in sorted(flatten_dict(params).items()):
        values = np.asarray(x)
        noise = generator.standard_normal(values.shape)
        if values.ndim >= 2:
            noise = noise / np.prod(values.shape[:-1])
        else:
            noise = values.astype(np.float64) + 0.1 * noise
        filled[path] = noise.astype(values.dtype)
    project = functools.partial(symmetry.project, feature_axes=feature_axes)
    return jax.jit(project)(unflatten_dict(filled))  # eagerly, each shape would be compiled


def tensors(
    loss: Callable[[Tree], jax.Array], params: Tree, layers: Collection[str]
) -> dict[str, Any]:
    """Outputs of the layers, the loss, and its gradients; pure, to be jitted by the caller.

    Args:
        loss: calls a Linen model's `apply` once with its argument as parameters; returns a scalar.
        params: the parameters.
        layers: paths of submodules, as in `metrics.layer_outputs`.

    Returns:
        {'forward': {'outputs': {layer: [..., C]}, 'loss': []},
        'gradients': {'outputs': {layer: [..., C]}, 'params': like params}}.
    """
    value, outputs, output_gradients, gradients = metrics.all_gradients(loss, params, layers)
    return {
        'forward': {'outputs': outputs, 'loss': value},
        'gradients': {'outputs': output_gradients, 'params': gradients},
    }


def equal_features(tree: Tree, feature_axes: Tree) -> dict[str, Spread]:
    """Spread between features, for each array that has a named axis, by '/'-joined path.

    1 distinct feature and 0 ULPs mean bitwise equal. Of several named axes the worst counts. Runs
    on the host.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    arrays, declared = flatten_dict(tree, sep='/'), flatten_dict(feature_axes, sep='/')
    if arrays.keys() != declared.keys():
        differing = ', '.join(sorted(arrays.keys() ^ declared.keys()))
        raise ValueError(f'feature_axes and tree differ in {differing}')
    spreads = {}
    for path, x in arrays.items():
        if len(declared[path]) != np.ndim(x):
            raise ValueError(f'{path}: {declared[path]} does not fit shape {np.shape(x)}')
        along = [
            feature_spread(x, axis) for axis, name in enumerate(declared[path]) if name is not None
        ]
        if along:
            spreads[path] = max(along, key=lambda spread: (spread.ulps, spread.distinct))
    return spreads


def equal_features_of(results: dict[str, Any], params_axes: Tree) -> dict[str, Spread]:
    """`equal_features` of what `tensors` returns: outputs, their gradients, and those of weights.

    Features are the last axis of every output.
    """
    outputs, output_gradients = results['forward']['outputs'], results['gradients']['outputs']
    last = {layer: (None,) * (np.ndim(x) - 1) + ('features',) for layer, x in outputs.items()}
    return equal_features(
        {
            'outputs': outputs,
            'output_gradients': output_gradients,
            'gradients': results['gradients']['params'],
        },
        {'outputs': last, 'output_gradients': last, 'gradients': params_axes},
    )
