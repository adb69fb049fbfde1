"""Feature axes found in a function, instead of declared."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from zerojax.symmetry.following import Following
from zerojax.symmetry.identities import Axes, Factor, Identities
from zerojax.symmetry.orbits import Path, Tree


@dataclasses.dataclass(frozen=True)
class InferredAxes:
    """What `infer_feature_axes` found.

    Attributes:
        axes: a tree like the parameters; each leaf is a tuple with a name, or None, for each axis:
            the declaration of `zerojax.symmetry`.
        report: the axes of each name, and for each axis without one what stopped it.
    """

    axes: Tree
    report: str


def infer_feature_axes(
    apply: Callable[..., Any], params: Tree, example_inputs: Any
) -> InferredAxes:
    """Which axes of which parameter are indexed by the same features, from the function itself.

    The function is traced, not run, and each axis of each parameter is followed through its
    operations. Axes that must be permuted together get one name: that of the module whose product
    first puts these features out (of its array, where a module has several). Permuting all axes of
    a name leaves the function as it is, whatever the parameters. An axis has no name if the order
    of its positions matters (space, what is read of the inputs, what is put out, what a loop goes
    along), or if it cannot be followed; so some that could have a name may have none, but none has
    a name that could not. Arrays that the function closes over count with their values: where they
    differ along an axis, that has no name. Derivatives of a symmetric function are symmetric; where
    a function gives derivatives of its own (`jax.custom_jvp`, `jax.custom_vjp`), these are followed
    as well.

    Args:
        apply: the model, called as apply(params, *inputs).
        params: a pytree of arrays, or of their `jax.ShapeDtypeStruct`; values do not matter.
        example_inputs: an array, or a tuple of all further arguments, each a pytree of arrays.

    Raises:
        ValueError: a leaf of params is no array.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [_names(path) for path, _ in paths_and_leaves]
    leaves = [leaf for _, leaf in paths_and_leaves]
    for path, leaf in zip(paths, leaves, strict=True):
        if not hasattr(leaf, 'shape'):
            raise ValueError(
                f'params: {"/".join(path)} is {leaf!r}, must be an array; take the arrays out of '
                'the model first, such as by equinox.partition(model, equinox.is_array)'
            )
    closed = jax.make_jaxpr(apply)(params, *inputs)
    following = Following()
    ids = following.ids
    arrays = [[ids.new() for _ in leaf.shape] for leaf in leaves]
    followed: list[Axes] = [
        tuple((Factor(identity, size),) for identity, size in zip(array, leaf.shape, strict=True))
        for array, leaf in zip(arrays, leaves, strict=True)
    ]
    of_inputs = 'it is an axis of the inputs'
    followed += [
        tuple(ids.new_pinned(size, of_inputs) for size in x.shape)
        for x in closed.in_avals[len(arrays) :]
    ]
    for axes in following.follow(closed, followed):
        for axis in axes:
            ids.pin(axis, 'it is an axis of the outputs')

    axes_of = {  # in the order of the parameters
        identity: (path, i)
        for path, array in zip(paths, arrays, strict=True)
        for i, identity in enumerate(array)
    }
    for identity in axes_of.keys() - following.used:
        ids.pin_identity(identity, 'the function does not use it')
    names = _name_streams(following, axes_of)
    tuples = [tuple(names.get(ids.root(x)) for x in array) for array in arrays]
    return InferredAxes(jax.tree.unflatten(treedef, tuples), _report(ids, axes_of, names))


def _names(path: tuple[Any, ...]) -> Path:
    """Keys, attributes and indices on the way to a leaf; without the box that it is in, such as an
    `nnx.Variable`."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey('value'):
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path) or ('params',)


def _name_streams(following: Following, axes_of: dict[int, tuple[Path, int]]) -> dict[int, str]:
    """A name for each root that is not pinned."""
    ids = following.ids
    first: dict[int, tuple[Path, int]] = {}
    for identity in (*following.written, *axes_of):
        if identity in axes_of and ids.reason(identity) is None:
            first.setdefault(ids.root(identity), axes_of[identity])

    def names(path: Path, axis: int) -> tuple[str, str, str]:
        return '/'.join(path[:-1]) or path[0], '/'.join(path), f'{"/".join(path)}.{axis}'

    candidates = {root: names(*place) for root, place in first.items()}
    taken = collections.Counter(name for each in candidates.values() for name in set(each))
    return {
        root: next((name for name in each if taken[name] == 1), f'{each[-1]} ({root})')
        for root, each in candidates.items()
    }


def _report(ids: Identities, axes_of: dict[int, tuple[Path, int]], names: dict[int, str]) -> str:
    streams: dict[str, list[str]] = {name: [] for name in names.values()}
    stopped: dict[str, list[str]] = {}
    for identity, (path, axis) in axes_of.items():
        reason = ids.reason(identity)
        if reason is None:
            places = streams[names[ids.root(identity)]]
        else:
            places = stopped.setdefault(reason, [])
        places.append(f'{"/".join(path)} axis {axis}')
    return '\n'.join(
        [f'{name}: {", ".join(places)}' for name, places in streams.items()]
        + [f'no name for {", ".join(places)}: {reason}' for reason, places in stopped.items()]
    )
