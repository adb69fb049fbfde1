"""How far features are from being equal, and the nearest weights where they are.

Deviations are taken from the orbit's first feature and not from its mean, because the mean of
identical numbers is rounded and need not be that number.

Equal means equal in all bits, but for 0.0 and -0.0, which are equal. So infinite weights of one
sign are equal, and so are NaNs of the same bits. A weight that is not finite and differs from what
it must equal is infinitely far from it.

Arrays with features must be real floats, NumPy's or JAX's, that JAX does not round. Others are a
ValueError, but where the features are counted, on the host.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from zerojax.symmetry.bits import bit_patterns
from zerojax.symmetry.orbits import (
    Orbits,
    Path,
    Tree,
    feature_counts,
    first_equal_rows,
    named_axes,
    signature,
)


def _along(x: jax.Array, axis: int, first: np.ndarray | None) -> jax.Array:
    """Every slice along the axis replaced by that of its orbit's first feature; one orbit if None.

    May have length 1 along the axis, to be broadcast.
    """
    if first is None or not first.any():
        return jax.lax.slice_in_dim(x, 0, 1, axis=axis)
    return jnp.take(x, first, axis=axis)


def _named_floats(tree: Tree, feature_axes: Tree) -> Iterator[tuple[Path, Any, dict[int, str]]]:
    """As `named_axes`, of floats that JAX does not round."""
    widest = jax.dtypes.canonicalize_dtype(np.float64).itemsize
    for path, x, names in named_axes(tree, feature_axes):
        if names and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f'{"/".join(path)} is {x.dtype}; what features have must be real floats'
            )
        if names and x.dtype.itemsize > widest:
            raise ValueError(
                f'{"/".join(path)} is {x.dtype}, which JAX would round, and features that differ '
                "by less would be equal; call jax.config.update('jax_enable_x64', True), or round "
                'it to float32 first'
            )
        yield path, x, names


def _classes(
    path: Path, names: dict[int, str], orbits: Orbits | None
) -> list[tuple[list[str], Any]]:
    """(axis names concerned, function x -> x with all that must be equal replaced by its first)."""
    if orbits is not None and path in orbits.entries:
        index = orbits.entries[path]
        return [(list(names.values()), lambda x: x.reshape(-1)[index])]
    first = {} if orbits is None else orbits.first
    return [
        ([name], functools.partial(_along, axis=axis, first=first.get(name)))
        for axis, name in names.items()
    ]


def _is_first(x: jax.Array, to_first: Any) -> jax.Array:
    bits = bit_patterns(jnp.asarray(x))
    return jnp.all(bits == to_first(bits))


def _deviation_size(x: jax.Array, to_first: Any) -> jax.Array:
    """|x - its first|, infinite where that is no number because one of the two is not finite."""
    size = jnp.abs(x - to_first(x))
    bits = bit_patterns(jnp.asarray(x))
    lost = jnp.where(bits == to_first(bits), jnp.zeros_like(size), jnp.full_like(size, jnp.inf))
    return jnp.where(jnp.isnan(size), lost, size)


def is_symmetric(tree: Tree, feature_axes: Tree, orbits: Orbits | None = None) -> jax.Array:
    """Whether all features of every orbit are equal: bool []. Exact: bits are compared, 0.0 equals
    -0.0, and a NaN or an infinity what has its bits.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    return jnp.all(jnp.array([equal for _, equal in _equalities(tree, feature_axes, orbits)]))


def is_symmetric_by_stream(
    tree: Tree, feature_axes: Tree, orbits: Orbits | None = None
) -> dict[str, jax.Array]:
    """As `is_symmetric`, for each stream: bool []. Of what a stream is and which weights tell of
    it, see `asymmetry_by_stream`.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    streams: dict[str, list[jax.Array]] = {}
    for names, equal in _equalities(tree, feature_axes, orbits):
        for name in names:
            streams.setdefault(name, []).append(equal)
    return {name: jnp.all(jnp.array(values)) for name, values in streams.items()}


def _equalities(
    tree: Tree, feature_axes: Tree, orbits: Orbits | None
) -> Iterator[tuple[list[str], jax.Array]]:
    """(axis names concerned, whether all is as it must be, bool []) of each class."""
    for path, x, names in _named_floats(tree, feature_axes):
        for concerned, to_first in _classes(path, names, orbits):
            yield concerned, _is_first(x, to_first)


def asymmetry(
    tree: Tree, feature_axes: Tree, orbits: Orbits | None = None, *, relative_to: Tree = None
) -> dict[str, jax.Array]:
    """Largest relative deviation of any feature from its orbit's first, for each layer.

    A feature is all that its axis name indexes: weights into it, its normalisation, weights out of
    it. So a deviation in any array is taken relative to the largest of all weights indexed by that
    name: `max |w - w[first feature]| / max |w'|` with w' running over all finite weights of all
    arrays with that name. (Relative to its own array alone, any noise on weights that start at 0
    would count as 1.) A layer is the module that holds the arrays ('block1_0/conv'); its value is
    the largest over its arrays and their named axes: a float [] in the arrays' dtype, exactly 0 if
    and only if all features are equal, at most 2 of finite weights, and infinity where a weight
    that is not finite differs from its orbit's first, or a difference is too large for the dtype.
    Never NaN.

    With `relative_to` the w' are those of another tree like it: if `tree` is a direction in which
    symmetric weights `relative_to` are moved, this is the asymmetry gained per unit moved.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    layers: dict[str, list[jax.Array]] = {}
    for path, _, relative in _relative_deviations(tree, feature_axes, orbits, relative_to):
        layers.setdefault('/'.join(path[:-1]), []).append(relative)
    return {layer: jnp.max(jnp.stack(values)) for layer, values in layers.items()}


def asymmetry_by_stream(
    tree: Tree, feature_axes: Tree, orbits: Orbits | None = None, *, relative_to: Tree = None
) -> dict[str, jax.Array]:
    """As `asymmetry`, for each stream: for each name of an axis, whose features an array's slices
    along the axis belong to.

    A kernel between two streams tells of both, of each along its own axis. A weight that stands in
    a class of its own (`orbits.entries`) tells of all streams that index its array.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    streams: dict[str, list[jax.Array]] = {}
    for _, names, relative in _relative_deviations(tree, feature_axes, orbits, relative_to):
        for name in names:
            streams.setdefault(name, []).append(relative)
    return {name: jnp.max(jnp.stack(values)) for name, values in streams.items()}


def largest_weights(tree: Tree, feature_axes: Tree) -> dict[str, jax.Array]:
    """Largest `|w|` of all finite weights that each stream indexes, [].

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    largest: dict[str, jax.Array] = {}
    for _, x, names in _named_floats(tree, feature_axes):
        if not names:
            continue
        size = jnp.abs(x)
        of_array = jnp.max(jnp.where(jnp.isfinite(size), size, jnp.zeros_like(size)))
        for name in names.values():
            largest[name] = jnp.maximum(largest[name], of_array) if name in largest else of_array
    return largest


def _relative_deviations(
    tree: Tree, feature_axes: Tree, orbits: Orbits | None, relative_to: Tree
) -> Iterator[tuple[Path, list[str], jax.Array]]:
    """(array, axis names concerned, largest relative deviation from what it must equal, [])."""
    scales = largest_weights(tree if relative_to is None else relative_to, feature_axes)
    for path, x, names in _named_floats(tree, feature_axes):
        for concerned, to_first in _classes(path, names, orbits):
            # A difference so small that the arithmetic loses it is still a difference.
            tiny = jnp.finfo(x.dtype).tiny
            scale = functools.reduce(jnp.maximum, (scales[name] for name in concerned))
            largest = jnp.max(_deviation_size(x, to_first))
            relative = jnp.maximum(largest / jnp.maximum(scale, tiny), tiny)
            relative = jnp.where(_is_first(x, to_first), jnp.zeros_like(relative), relative)
            yield path, concerned, relative


def distance(tree: Tree, feature_axes: Tree, orbits: Orbits | None = None) -> dict[str, jax.Array]:
    """L2 distance of each layer's weights from the symmetric subspace, in units of the weights.

    That is from the nearest weights that are symmetric, where each weight is the mean of all that
    must equal it: a float [] a layer, exactly 0 if and only if all of them are equal, or so close
    that the square of the distance is lost. The distance of the whole tree is the root of the sum
    of squares. Infinite where a weight that is not finite differs from what it must equal, or the
    square is too large for the dtype; never NaN.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    layers: dict[str, list[jax.Array]] = {}
    for path, x, names in _named_floats(tree, feature_axes):
        if names:
            square = _squared_distance(x, path, names, orbits)
            layers.setdefault('/'.join(path[:-1]), []).append(square)
    return {layer: jnp.sqrt(sum(values)) for layer, values in layers.items()}


def distance_by_stream(
    tree: Tree, feature_axes: Tree, orbits: Orbits | None = None
) -> dict[str, jax.Array]:
    """As `distance`, for each stream: from the nearest weights that are symmetric in it alone.

    There each weight is the mean of all that must equal it along the stream's own axes; where its
    array stands in `orbits.entries`, of all that must equal it. So a kernel between two streams
    adds to both, to each what its own features differ by.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    streams: dict[str, list[jax.Array]] = {}
    for path, x, names in _named_floats(tree, feature_axes):
        for stream in dict.fromkeys(names.values()):
            own = {axis: name for axis, name in names.items() if name == stream}
            streams.setdefault(stream, []).append(_squared_distance(x, path, own, orbits))
    return {stream: jnp.sqrt(sum(values)) for stream, values in streams.items()}


def _squared_distance(
    x: jax.Array, path: Path, names: dict[int, str], orbits: Orbits | None
) -> jax.Array:
    """Of an array from what is symmetric along these axes, []; infinite where it is no number."""
    square = jnp.sum(_transverse(x, path, names, orbits) ** 2)
    return jnp.where(jnp.isnan(square), jnp.full_like(square, jnp.inf), square)


def transverse(tree: Tree, feature_axes: Tree, orbits: Orbits | None = None) -> Tree:
    """The part of the tree that is orthogonal to the symmetric subspace.

    That is each weight less the mean of all that must equal it; exactly 0 where they are equal. An
    array in which a weight that is not finite differs from what it must equal has no such part:
    NaN.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    return unflatten_dict(
        {
            path: _transverse(x, path, names, orbits) if names else jnp.zeros_like(x)
            for path, x, names in _named_floats(tree, feature_axes)
        }
    )


def _transverse(
    x: jax.Array, path: Path, names: dict[int, str], orbits: Orbits | None
) -> jax.Array:
    first = _project(x, path, names, orbits)
    # Exactly 0 where features are equal, infinite ones as well.
    equal = bit_patterns(jnp.asarray(x)) == bit_patterns(jnp.asarray(first))
    deviation = jnp.where(equal, jnp.zeros_like(x), x - first)
    part = deviation - _class_mean(deviation, path, names, orbits)
    return jnp.where(jnp.all(jnp.isfinite(deviation)), part, jnp.full_like(x, jnp.nan))


def _class_mean(
    x: jax.Array, path: Path, names: dict[int, str], orbits: Orbits | None
) -> jax.Array:
    """Every weight replaced by the mean of all that must equal it."""
    if orbits is not None and path in orbits.entries:
        index = orbits.entries[path].ravel()
        sums = jnp.zeros(x.size, x.dtype).at[index].add(x.ravel())
        sizes = np.bincount(index, minlength=x.size)
        return (sums / np.maximum(sizes, 1).astype(x.dtype))[index].reshape(x.shape)
    for axis, name in names.items():
        first = None if orbits is None else orbits.first.get(name)
        if first is None:
            first = np.zeros(x.shape[axis], int)
        members = (first[:, None] == first[None, :]) / np.bincount(first)[first][:, None]
        mean = jnp.tensordot(jnp.asarray(members, x.dtype), x, axes=(1, axis), precision='highest')
        x = jnp.moveaxis(mean, 0, axis)
    return x


def unique_features(tree: Tree, feature_axes: Tree, orbits: Orbits | None = None) -> dict[str, int]:
    """Number of features of each layer that differ from one another in at least one weight.

    The features of a layer are those of one axis name: that of the last named axis of the layer's
    array with the most axes (of several as large, the first by name). So they are the outputs of a
    convolution, the inputs of a dense head whose outputs are classes. A feature's weights are its
    slices of all arrays of the layer whose last named axis has that name; arrays that end in others
    do not count. Exact: bits are compared, 0.0 equals -0.0, and a NaN or an infinity what has its
    bits. Of arrays in `orbits.entries` (an identity) the order of the weights within an orbit does
    not count. Runs on the host.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    layers: dict[str, list[tuple[Path, np.ndarray, dict[int, str]]]] = {}
    for path, x, names in named_axes(tree, feature_axes):
        if names:
            layers.setdefault('/'.join(path[:-1]), []).append((path, np.asarray(x), names))

    counts = {}
    for layer, arrays in layers.items():
        _, _, names_of_largest = min(arrays, key=lambda array: (-array[1].ndim, array[0]))
        features = names_of_largest[max(names_of_largest)]
        columns = [
            _rows(path, x, max(names), names, orbits)
            for path, x, names in arrays
            if names[max(names)] == features
        ]
        counts[layer] = len(set(first_equal_rows(columns)))
    return counts


def unique_features_by_stream(
    tree: Tree, feature_axes: Tree, orbits: Orbits | None = None
) -> dict[str, int]:
    """Number of features of each stream that differ from one another in at least one weight.

    A feature's weights are its slices of all arrays that the stream indexes, along each axis of its
    name. Exact, and of arrays in `orbits.entries`, as `unique_features`. Runs on the host.

    Raises:
        ValueError: tree and declaration do not fit each other, or two axes of one name differ in
            length.
    """
    columns: dict[str, list[np.ndarray]] = {
        stream: [] for stream in feature_counts(tree, feature_axes)
    }
    for path, x, names in named_axes(tree, feature_axes):
        for axis, stream in names.items():
            columns[stream].append(_rows(path, np.asarray(x), axis, names, orbits))
    return {stream: len(set(first_equal_rows(rows))) for stream, rows in columns.items()}


def _rows(
    path: Path, x: np.ndarray, axis: int, names: dict[int, str], orbits: Orbits | None
) -> np.ndarray:
    """[features of the axis, ...]: rows of integers, equal where the weights are."""
    if orbits is not None and path in orbits.entries:
        return signature(x, axis, names, orbits.first)
    return np.moveaxis(bit_patterns(x), axis, 0).reshape(x.shape[axis], -1)


def project(tree: Tree, feature_axes: Tree, orbits: Orbits | None = None) -> Tree:
    """The tree with every feature replaced by its orbit's first one.

    A symmetric tree comes back bit for bit, which a projection onto the mean would not grant.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    return unflatten_dict(
        {
            path: _project(x, path, names, orbits)
            for path, x, names in _named_floats(tree, feature_axes)
        }
    )


def _project(x: jax.Array, path: Path, names: dict[int, str], orbits: Orbits | None) -> jax.Array:
    shape = x.shape
    for _, to_first in _classes(path, names, orbits):
        x = jnp.broadcast_to(to_first(x), shape)
    return x
