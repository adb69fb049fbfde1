"""The declaration of feature axes, and which features start equal: orbits."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from zerojax.symmetry.bits import bit_patterns

Tree = Any
Path = tuple[str, ...]


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


def feature_counts(tree: Tree, feature_axes: Tree) -> dict[str, int]:
    """Number of features along each axis name, in the order of the declaration.

    Raises:
        ValueError: tree and declaration do not fit each other, or two axes of one name differ in
            length.
    """
    counts: dict[str, int] = {}
    for path, x, names in named_axes(tree, feature_axes):
        for axis, name in names.items():
            if counts.setdefault(name, x.shape[axis]) != x.shape[axis]:
                raise ValueError(
                    f'{"/".join(path)}: axis {name!r} has {x.shape[axis]} features, '
                    f'elsewhere {counts[name]}'
                )
    return counts


def stream_names(feature_axes: Tree) -> list[str]:
    """The names of a declaration's axes, each once, in its order."""
    return list(
        dict.fromkeys(x for names in flatten_dict(feature_axes).values() for x in names if x)
    )


def output_axes(feature_axes: Tree) -> dict[str, str | None]:
    """{'/'-joined path of each kernel: name of the features it puts out, or None}, sorted.

    Kernels are the arrays of two axes or more; their last axis is that of the output.
    """
    flat = flatten_dict(feature_axes, sep='/')
    return {path: names[-1] for path, names in sorted(flat.items()) if len(names) >= 2}


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
    counts = feature_counts(params, feature_axes)
    first = {name: np.zeros(count, np.int64) for name, count in counts.items()}
    while True:
        signatures: dict[str, list[np.ndarray]] = {name: [x[:, None]] for name, x in first.items()}
        for _, x, names in arrays:
            for axis, name in names.items():
                signatures[name].append(signature(x, axis, names, first))
        refined = {name: first_equal_rows(rows) for name, rows in signatures.items()}
        if all(np.array_equal(refined[name], first[name]) for name in first):
            break
        first = refined

    entries = {}
    for path, x, names in arrays:
        block = np.arange(x.size).reshape(x.shape)
        for axis, name in names.items():
            block = np.take(block, first[name], axis)
        bits = bit_patterns(x)
        if not np.array_equal(bits, bits.ravel()[block]):
            pairs = np.stack([block.ravel(), bits.ravel().astype(np.int64)], axis=1)
            _, index, inverse = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
            entries[path] = index[inverse.ravel()].reshape(x.shape)
    return Orbits(first, entries)


def signature(
    x: np.ndarray, axis: int, names: dict[int, str], first: dict[str, np.ndarray]
) -> np.ndarray:
    """[features, ...]: equal rows for features with the same weights, whatever their order within
    the orbits of the other axes."""
    rows = np.moveaxis(bit_patterns(x), axis, 0)
    if (rows == rows[:1]).all():
        return np.zeros((len(rows), 1), np.int64)
    # Weights of one column of `place` may be exchanged: same position, same orbits.
    place = np.arange(rows[0].size).reshape(rows.shape[1:])
    others = [each for each in range(x.ndim) if each != axis]
    for i, other in enumerate(others):
        if other in names:
            place = np.take(place, first[names[other]], i)
    rows, place = rows.reshape(len(rows), -1), place.ravel()
    order = np.argsort(place, kind='stable')
    bounds = np.flatnonzero(np.diff(place[order])) + 1
    groups = np.split(rows[:, order], bounds, axis=1)
    return np.concatenate([np.sort(group, axis=1) for group in groups], axis=1)


def first_equal_rows(columns: list[np.ndarray]) -> np.ndarray:
    """For each row the index of the first equal one, [rows]."""
    seen: dict[bytes, int] = {}
    rows = zip(*([row.tobytes() for row in each] for each in columns), strict=True)
    return np.array([seen.setdefault(b''.join(row), i) for i, row in enumerate(rows)])
