"""Symmetry of features, measured to the bit.

A model declares once which axes of which parameter are indexed by the same features: a tree like
the parameters (nested dictionaries) whose leaves are tuples with a name, or None, for every axis
(the form known from permutation alignment, Ainsworth et al., "Git Re-Basin", 2022). An orbit is a
set of features that start identical: all features along a named axis, unless `find_orbits` says
otherwise. Everything here follows from that declaration and works on any nested dictionary of
arrays that has one.

Deviations are taken from the orbit's first feature and not from its mean, because the mean of
identical numbers is rounded and need not be that number.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Tree = Any
Path = tuple[str, ...]

_UINTS = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


@dataclasses.dataclass(frozen=True)
class Orbits:
    """Which features are meant to be equal; made by `find_orbits`.

    Attributes:
        first: for each axis name an int array [features]: the first feature of each one's orbit.
        entries: for arrays (by path) whose weights are not all equal between two orbits, such as an
            identity between hidden layers: an int array of their shape, for each weight the
            flat index of the first one that must equal it.
    """

    first: dict[str, np.ndarray]
    entries: dict[Path, np.ndarray]

    def counts(self) -> dict[str, int]:
        """Number of orbits along each axis name."""
        return {name: len(np.unique(first)) for name, first in self.first.items()}


def named_axes(tree: Tree, feature_axes: Tree) -> Iterator[tuple[Path, Any, dict[int, str]]]:
    """Path, array and names of the named axes, for every array, in the order of the declaration.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    arrays, declared = flatten_dict(tree), flatten_dict(feature_axes)
    if arrays.keys() != declared.keys():
        differing = sorted('/'.join(path) for path in arrays.keys() ^ declared.keys())
        raise ValueError(f'feature_axes and tree differ in {", ".join(differing)}')
    for path, names in declared.items():
        x = arrays[path]
        if len(names) != x.ndim:
            raise ValueError(f'{"/".join(path)}: {names} does not fit shape {x.shape}')
        yield path, x, {axis: name for axis, name in enumerate(names) if name is not None}


def find_orbits(params: Tree, feature_axes: Tree) -> Orbits:
    """The largest sets of features that are equal at `params` and stay equal in training.

    Two features belong to one orbit if their weights from (and to) the features of each orbit are
    the same numbers in whatever order: then both see the same activations and gradients. This is
    the coarsest equitable partition, found by colour refinement: all features along an axis begin
    as one set, and sets are split until the condition holds. Runs on the host.

    Raises:
        ValueError: tree and declaration do not fit each other, or two axes of one name differ in
            length.
    """
    arrays = [(path, np.asarray(x), names) for path, x, names in named_axes(params, feature_axes)]
    first: dict[str, np.ndarray] = {}
    for path, x, names in arrays:
        for axis, name in names.items():
            start = first.setdefault(name, np.zeros(x.shape[axis], np.int64))
            if len(start) != x.shape[axis]:
                raise ValueError(
                    f'{"/".join(path)}: axis {name!r} has {x.shape[axis]} features, '
                    f'elsewhere {len(start)}'
                )
    while True:
        signatures: dict[str, list[np.ndarray]] = {name: [x[:, None]] for name, x in first.items()}
        for _, x, names in arrays:
            for axis, name in names.items():
                signatures[name].append(_signature(x, axis, names, first))
        refined = {name: _first_equal_rows(rows) for name, rows in signatures.items()}
        if all(np.array_equal(refined[name], first[name]) for name in first):
            break
        first = refined

    entries = {}
    for path, x, names in arrays:
        block = np.arange(x.size).reshape(x.shape)
        for axis, name in names.items():
            block = np.take(block, first[name], axis)
        if not np.array_equal(_bits(x), _bits(x).ravel()[block]):
            pairs = np.stack([block.ravel(), _bits(x).ravel().astype(np.int64)], axis=1)
            _, index, inverse = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
            entries[path] = index[inverse.ravel()].reshape(x.shape)
    return Orbits(first, entries)


def _bits(x: np.ndarray) -> np.ndarray:
    """The bit patterns as integers; 0.0 equals -0.0."""
    kind = {2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize]
    return np.where(x == 0, np.zeros_like(x), x).view(kind)


def _signature(
    x: np.ndarray, axis: int, names: dict[int, str], first: dict[str, np.ndarray]
) -> np.ndarray:
    """[features, ...]: equal rows for features with the same weights, whatever their order within
    the orbits of the other axes."""
    rows = np.moveaxis(_bits(x), axis, 0)
    if (rows == rows[:1]).all():
        return np.zeros((len(rows), 1), np.int64)
    # Weights of one column of `place` may be exchanged: same position, same orbits.
    place = np.arange(x[:1].size if axis == 0 else x.size // x.shape[axis])
    place = place.reshape(rows.shape[1:])
    others = [each for each in range(x.ndim) if each != axis]
    for i, other in enumerate(others):
        if other in names:
            place = np.take(place, first[names[other]], i)
    rows, place = rows.reshape(len(rows), -1), place.ravel()
    order = np.argsort(place, kind='stable')
    bounds = np.flatnonzero(np.diff(place[order])) + 1
    groups = np.split(rows[:, order], bounds, axis=1)
    return np.concatenate([np.sort(group, axis=1) for group in groups], axis=1)


def _first_equal_rows(columns: list[np.ndarray]) -> np.ndarray:
    """For each row the index of the first equal one, [rows]."""
    seen: dict[bytes, int] = {}
    rows = zip(*([row.tobytes() for row in each] for each in columns), strict=True)
    return np.array([seen.setdefault(b''.join(row), i) for i, row in enumerate(rows)])


def _along(x: jax.Array, axis: int, first: np.ndarray | None) -> jax.Array:
    """Every slice along the axis replaced by that of its orbit's first feature; one orbit if None.

    May have length 1 along the axis, to be broadcast.
    """
    if first is None or not first.any():
        return jax.lax.slice_in_dim(x, 0, 1, axis=axis)
    return jnp.take(x, first, axis=axis)


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
    # Bits are compared, not values: XLA's comparison takes subnormal numbers for 0.
    bits = jax.lax.bitcast_convert_type(x, _UINTS[x.dtype.itemsize])
    negative_zero = jax.lax.bitcast_convert_type(jnp.asarray(-0.0, x.dtype), bits.dtype)
    bits = jnp.where(bits == negative_zero, jnp.zeros_like(bits), bits)
    return jnp.all(bits == to_first(bits))


def is_symmetric(tree: Tree, feature_axes: Tree, orbits: Orbits | None = None) -> jax.Array:
    """Whether all features of every orbit are equal: bool []. Exact; 0.0 equals -0.0.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    equal = [
        _is_first(x, to_first)
        for path, x, names in named_axes(tree, feature_axes)
        for _, to_first in _classes(path, names, orbits)
    ]
    return jnp.all(jnp.array(equal))


def asymmetry(
    tree: Tree, feature_axes: Tree, orbits: Orbits | None = None, *, relative_to: Tree = None
) -> dict[str, jax.Array]:
    """Largest relative deviation of any feature from its orbit's first, for each layer.

    A feature is all that its axis name indexes: weights into it, its normalisation, weights out of
    it. So a deviation in any array is taken relative to the largest of all weights indexed by that
    name: max |w - w[first feature]| / max |w'| with w' running over all arrays with that name.
    (Relative to its own array alone, any noise on weights that start at 0 would count as 1.) A
    layer is the module that holds the arrays ('block1_0/conv'); its value is the largest over its
    arrays and their named axes: a float [] between 0 and 2 in the arrays' dtype, exactly 0 if and
    only if all features are equal.

    With `relative_to` the w' are those of another tree like it: if `tree` is a direction in which
    symmetric weights `relative_to` are moved, this is the asymmetry gained per unit moved.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    leaves = list(named_axes(tree, feature_axes))
    scales: dict[str, jax.Array] = {}
    for _, x, names in leaves if relative_to is None else named_axes(relative_to, feature_axes):
        for name in names.values():
            largest = jnp.max(jnp.abs(x))
            scales[name] = jnp.maximum(scales[name], largest) if name in scales else largest

    layers: dict[str, list[jax.Array]] = {}
    for path, x, names in leaves:
        for concerned, to_first in _classes(path, names, orbits):
            # A difference so small that the arithmetic loses it is still a difference.
            tiny = jnp.finfo(x.dtype).tiny
            scale = functools.reduce(jnp.maximum, (scales[name] for name in concerned))
            largest = jnp.max(jnp.abs(x - to_first(x)))
            relative = jnp.maximum(largest / jnp.maximum(scale, tiny), tiny)
            relative = jnp.where(_is_first(x, to_first), jnp.zeros_like(relative), relative)
            layers.setdefault('/'.join(path[:-1]), []).append(relative)
    return {layer: jnp.max(jnp.stack(values)) for layer, values in layers.items()}


def distance(tree: Tree, feature_axes: Tree, orbits: Orbits | None = None) -> dict[str, jax.Array]:
    """L2 distance of each layer's weights from the symmetric subspace, in units of the weights.

    That is from the nearest weights that are symmetric, where each weight is the mean of all that
    must equal it: a float [] a layer, exactly 0 if and only if all of them are equal, or so close
    that the square of the distance is lost. The distance of the whole tree is the root of the sum
    of squares.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    layers: dict[str, list[jax.Array]] = {}
    deviations = flatten_dict(transverse(tree, feature_axes, orbits))
    for path, _, names in named_axes(tree, feature_axes):
        if names:
            layers.setdefault('/'.join(path[:-1]), []).append(jnp.sum(deviations[path] ** 2))
    return {layer: jnp.sqrt(sum(values)) for layer, values in layers.items()}


def transverse(tree: Tree, feature_axes: Tree, orbits: Orbits | None = None) -> Tree:
    """The part of the tree that is orthogonal to the symmetric subspace.

    That is each weight less the mean of all that must equal it; exactly 0 where they are equal.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    parts = {}
    for path, x, names in named_axes(tree, feature_axes):
        deviation = x - _project(x, path, names, orbits)  # exactly 0 where features are equal
        parts[path] = deviation - _class_mean(deviation, path, names, orbits)
    return unflatten_dict(parts)


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

    The features of a layer are indexed by the last named axis of its arrays: the output axis of a
    convolution, the input axis of a dense head whose outputs are classes. Exact; 0.0 equals -0.0.
    Of arrays in `orbits.entries` (an identity) the order of the weights within an orbit does not
    count. Runs on the host.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    layers: dict[str, list[np.ndarray]] = {}
    for path, x, names in named_axes(tree, feature_axes):
        if names:
            x, axis = np.asarray(x), max(names)
            if orbits is not None and path in orbits.entries:
                rows = _signature(x, axis, names, orbits.first)
            else:
                rows = np.moveaxis(_bits(x), axis, 0).reshape(x.shape[axis], -1)
            layers.setdefault('/'.join(path[:-1]), []).append(rows)
    return {layer: len(set(_first_equal_rows(rows))) for layer, rows in layers.items()}


def project(tree: Tree, feature_axes: Tree, orbits: Orbits | None = None) -> Tree:
    """The tree with every feature replaced by its orbit's first one.

    A symmetric tree comes back bit for bit, which a projection onto the mean would not grant.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    return unflatten_dict(
        {
            path: _project(x, path, names, orbits)
            for path, x, names in named_axes(tree, feature_axes)
        }
    )


def _project(x: jax.Array, path: Path, names: dict[int, str], orbits: Orbits | None) -> jax.Array:
    shape = x.shape
    for _, to_first in _classes(path, names, orbits):
        x = jnp.broadcast_to(to_first(x), shape)
    return x
