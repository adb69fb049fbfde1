"""Feature axes found in a function, instead of declared."""

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

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

    def function(leaves: list[Any], *inputs: Any) -> list[Any]:
        return jax.tree.leaves(apply(jax.tree.unflatten(treedef, leaves), *inputs))

    following = Following()
    arrays = [[following.ids.new() for _ in leaf.shape] for leaf in leaves]
    _follow(following, function, leaves, inputs, arrays)
    axes_of = {  # in the order of the parameters
        identity: (path, i)
        for path, array in zip(paths, arrays, strict=True)
        for i, identity in enumerate(array)
    }
    for identity in axes_of.keys() - following.used:
        following.ids.pin_identity(identity, 'the function does not use it')
    names = _name_streams(following, axes_of)
    tuples = [tuple(names.get(following.ids.root(x)) for x in array) for array in arrays]
    return InferredAxes(jax.tree.unflatten(treedef, tuples), _report(following.ids, axes_of, names))


def _follow(
    following: Following,
    function: Callable[..., list[Any]],
    leaves: list[Any],
    inputs: tuple[Any, ...],
    arrays: list[list[int]],
) -> None:
    """Follows the axes `arrays` of the leaves through a function of them and the inputs.

    Derivatives are followed if some are not JAX's own: forwards, where that can be done.
    """

    def axes_of(i: int) -> Axes:
        pairs = zip(arrays[i], leaves[i].shape, strict=True)
        return tuple((Factor(identity, size),) for identity, size in pairs)

    def pinned(reason: str, values: Iterable[Any]) -> list[Axes]:
        return [tuple(following.ids.new_pinned(size, reason) for size in x.shape) for x in values]

    def put_out(values: Iterable[Axes]) -> None:
        for axes in values:
            for axis in axes:
                following.ids.pin(axis, 'it is an axis of the outputs')

    def of_floats(floats: list[Any], leaves: list[Any], *inputs: Any) -> list[Any]:
        leaves = leaves.copy()
        for i, x in zip(chosen, floats, strict=True):
            leaves[i] = x
        return [y for y in function(leaves, *inputs) if _is_float(y)]

    def forwards(tangents: list[Any], leaves: list[Any], *inputs: Any) -> list[Any]:
        floats = [leaves[i] for i in chosen]
        return jax.jvp(lambda x: of_floats(x, leaves, *inputs), (floats,), (tangents,))[1]

    def backwards(cotangents: list[Any], leaves: list[Any], *inputs: Any) -> list[Any]:
        floats = [leaves[i] for i in chosen]
        return jax.vjp(lambda x: of_floats(x, leaves, *inputs), floats)[1](cotangents)[0]

    chosen = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]
    of_leaves = [axes_of(i) for i in range(len(leaves))]
    closed = jax.make_jaxpr(function)(leaves, *inputs)
    of_inputs = pinned('it is an axis of the inputs', closed.in_avals[len(leaves) :])
    put_out(following.follow(closed, [*of_leaves, *of_inputs]))
    if 'custom_vjp_call' in following.own_derivatives:
        cotangents = [y for y in closed.out_avals if _is_float(y)]
        of_outputs = pinned('it is an axis of the outputs', cotangents)
        closed = jax.make_jaxpr(backwards)(cotangents, leaves, *inputs)
        gradients = following.follow(closed, [*of_outputs, *of_leaves, *of_inputs])
        for i, gradient in zip(chosen, gradients, strict=True):
            for a, b in zip(of_leaves[i], gradient, strict=True):
                following.ids.align(a, b, '(gradient)')
    elif following.own_derivatives:
        of_floats_only = [of_leaves[i] for i in chosen]
        closed = jax.make_jaxpr(forwards)([leaves[i] for i in chosen], leaves, *inputs)
        put_out(following.follow(closed, [*of_floats_only, *of_leaves, *of_inputs]))


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _names(path: tuple[Any, ...]) -> Path:
    """Keys, attributes and indices on the way to a leaf; without the box that it is in, such as an
    `nnx.Variable`."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey('value'):
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


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
        root: next(name for name in each if taken[name] == 1) for root, each in candidates.items()
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
