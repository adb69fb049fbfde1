"""Whether the kernels of a backend keep equal features bitwise equal, layer by layer.

The middle storey of the audit: it compares the features of one result, by the measures of `noise`.
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

from zerojax import perturb
from zerojax.measure import metrics
from zerojax.measure.noise import Spread, element_spread, feature_spread
from zerojax.step.determinism import jit_without_products
from zerojax.symmetry import project
from zerojax.symmetry.orbits import Orbits, Path, named_axes, output_axes

Tree = Any

# A mean over hundreds of features is still about a unit in the last place of bfloat16; noise as
# large as the weights leaves whole layers behind a ReLU at 0, which tell nothing.
BREAKING_NOISE = 0.1


def symmetric_fill(
    params: Tree, feature_axes: Tree, orbits: Orbits | None = None, seed: int = 0
) -> Tree:
    """Weights that tell something and have all features of an orbit equal.

    Where a network starts at zeros and constants, most results are 0 and would look exact whatever
    the kernels do. Here arrays with two axes or more become N(0, 1) / fan_in (fan_in: product of
    all axes but the last), all others (scales, biases) get 0.1 · N(0, 1) added; then each feature
    is set to its orbit's first one (`symmetry.project`). Drawn on the host, so that every device,
    compilation and process has the same bits.

    Args:
        params: any floats, whose shapes, dtypes and 1-D values are taken over.
        feature_axes: the declaration of `params`.
        orbits: which features are to be equal, by default all of a layer.
        seed: of the random numbers.

    Raises:
        ValueError: `params` and `feature_axes` do not fit each other.
    """
    generator = np.random.default_rng(seed)
    filled = {}
    for path, x in sorted(flatten_dict(params).items()):
        values = np.asarray(x)
        noise: Any = generator.standard_normal(values.shape)
        if values.ndim >= 2:
            noise = noise / np.prod(values.shape[:-1])
        else:
            noise = values.astype(np.float64) + 0.1 * noise
        filled[path] = noise.astype(values.dtype)
    fill = functools.partial(project, feature_axes=feature_axes, orbits=orbits)
    # Eagerly, each shape would be compiled.
    return jit_without_products(fill)(unflatten_dict(filled))


def broken_fill(params: Tree, feature_axes: Tree, stream: str, seed: int = 1) -> Tree:
    """The weights with the features of one stream no longer equal, and all others' as they were.

    What the stream indexes is multiplied by 1 + 0.1 · N(0, 1), averaged over the features of all
    other streams, as a perturbation 'gaussian' that is relative and aimed at the stream would; but
    drawn on the host, as in `symmetric_fill`.

    Args:
        params: any floats, nested dictionaries.
        feature_axes: the declaration of `params`.
        stream: one of its names.
        seed: of the random numbers.

    Returns:
        NumPy arrays of the same shapes and dtypes.

    Raises:
        ValueError: there is no such stream, or `params` and `feature_axes` do not fit each other.
    """
    generator = np.random.default_rng(seed)
    averaged = perturb.averaged_axes(params, '.*', (stream,), feature_axes)
    broken = {}
    for path, x in sorted(flatten_dict(params).items()):
        values, name = np.asarray(x), '/'.join(path)
        noise: Any = generator.standard_normal(values.shape)
        if name in averaged:
            noise = noise.mean(averaged[name], keepdims=True)
            values = (values.astype(np.float64) * (1 + BREAKING_NOISE * noise)).astype(values.dtype)
        broken[path] = values
    return unflatten_dict(broken)


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


def equal_features(
    tree: Tree, feature_axes: Tree, orbits: Orbits | None = None, stream: str | None = None
) -> dict[str, Spread]:
    """Spread between equal features, for each array that has any, by '/'-joined path.

    1 distinct feature and 0 ULPs mean bitwise equal. Of several named axes the worst counts. Only
    features of one orbit are compared (by default all of a layer are one); of arrays in
    `orbits.entries`, such as an identity, the single weights that must be equal. With a `stream`
    only its features are compared. In the order of their paths. Runs on the host.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    spreads = {}
    for path, x, names in sorted(named_axes(tree, feature_axes), key=lambda each: each[0]):
        names = {axis: name for axis, name in names.items() if stream in (None, name)}
        if names and (along := _spreads(x, path, names, orbits)):
            spreads['/'.join(path)] = max(along, key=lambda each: (each.ulps, each.distinct))
    return spreads


def _spreads(x: Any, path: Path, names: dict[int, str], orbits: Orbits | None) -> list[Spread]:
    """Of an array's equal features along each named axis, or of its equal weights."""
    if orbits is None:
        return [feature_spread(x, axis) for axis in names]
    if path in orbits.entries:
        return [element_spread(x, orbits.entries[path])]
    counts = orbits.counts()
    return [
        feature_spread(x, axis, orbits.first[name])
        for axis, name in names.items()
        if counts[name] < x.shape[axis]
    ]


def output_axis(layer: str, params_axes: Tree) -> str:
    """Name of the features that a layer puts out, as its kernels declare it.

    Raises:
        ValueError: its kernels do not agree, or it has none.
    """
    names = _output_names(layer, params_axes)
    name = next(iter(names), None)
    if len(names) != 1 or name is None:
        raise ValueError(f'layer {layer!r}: its kernels have {names} along their last axis')
    return name


def _output_names(layer: str, params_axes: Tree) -> set[str | None]:
    outputs = output_axes(params_axes).items()
    return {name for path, name in outputs if path.startswith(f'{layer}/')}


def equal_features_of(
    results: dict[str, Any],
    params_axes: Tree,
    orbits: Orbits | None = None,
    stream: str | None = None,
) -> dict[str, Spread]:
    """`equal_features` of what `tensors` returns: outputs, their gradients, and those of weights.

    Features are the last axis of every output. With a `stream`, outputs of layers whose kernels do
    not agree on what they put out are left out.
    """
    outputs, output_gradients = results['forward']['outputs'], results['gradients']['outputs']

    def features(layer: str) -> str | None:
        if stream is not None:
            return stream if _output_names(layer, params_axes) == {stream} else None
        return 'features' if orbits is None else output_axis(layer, params_axes)

    last = {layer: (None,) * (np.ndim(x) - 1) + (features(layer),) for layer, x in outputs.items()}
    return {
        f'{kind}/{name}': spread
        for kind, tree, axes in (
            ('outputs', outputs, last),
            ('output_gradients', output_gradients, last),
            ('gradients', results['gradients']['params'], params_axes),
        )
        for name, spread in equal_features(tree, axes, orbits, stream).items()
    }
