"""Whether a declaration of feature axes is true of a function: tried out, in float64.

That the features of a stream may be permuted is a statement on numbers, and can be refuted by
numbers. At random weights, which no network's initial ones resemble, each stream is permuted by a
cycle of all its features and by a transposition of two neighbours in it, which together generate
all permutations. Outputs must stay, gradients and updates must be permuted likewise, all of it to
the rounding of float64. Then features are set equal, where a maximum or a sort may have to choose
between them: their gradients must be equal. At last every axis without a name is tried the same
way, for a stream that was overlooked.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zerojax.symmetry.trial import FLOOR, OPTIMIZERS, TOLERANCE, Arrays, Axis, Trial

Tree = Any
Names = tuple[str | None, ...]  # of the axes of an array

MOST_TOGETHER = 3  # axes without a name that are tried as one stream
MOST_TRIALS = 300
# How much rounding may grow where features are equal: LayerNorm divides by sqrt(epsilon) then.
AMPLIFIED = 1e4


@dataclasses.dataclass(frozen=True)
class AxesCheck:
    """What was found of a declaration that is true.

    Attributes:
        streams: {stream: number of features}.
        differences: the largest difference that permuting a stream made, relative to the largest
            number of its array: {'outputs', 'gradients', 'SGD', 'Adam'}; rounding.
        unseen: arrays with named axes whose gradient is 0, so that only the outputs speak for them.
        unnamed: sets of axes (path, axis) without a name that could have one: permuted together
            they change nothing, with these inputs.
        not_finite: streams at whose equal features the gradient is not finite, and nothing can be
            compared; '' stands for all streams together.
    """

    streams: dict[str, int]
    differences: dict[str, float]
    unseen: list[str]
    unnamed: list[list[tuple[str, int]]]
    not_finite: list[str]

    def __str__(self) -> str:
        streams = ', '.join(f'{name} ({count})' for name, count in self.streams.items())
        differences = ', '.join(f'{what} {size:.0e}' for what, size in self.differences.items())
        lines = [
            f'streams that may be permuted: {streams or "none"}',
            f'largest relative difference, float64: {differences}',
        ]
        if self.unseen:
            lines.append(f'gradient 0, seen in outputs only: {", ".join(self.unseen)}')
        for name in self.not_finite:
            where = f'of {name} alone' if name else 'of all streams'
            lines.append(f'at equal features {where} the gradient is not finite: not compared')
        for axes in self.unnamed:
            shown = ', '.join(f'{path} axis {axis}' for path, axis in axes)
            lines.append(f'could have a name: {shown}')
        return '\n'.join(lines)


def check_feature_axes(
    apply: Callable[..., Tree], params: Tree, inputs: Tree, axes: Tree
) -> AxesCheck:
    """Tries out whether the features that `axes` declares may be permuted.

    Takes some calls of the gradient a stream and one for each axis without a name, on the CPU, in
    float64 whatever the dtypes; JAX's own settings stay as they are.

    Args:
        apply: a pure (params, *inputs) -> floats, an array or a pytree of them.
        params: any pytree of arrays; only structure, shapes and dtypes count.
        inputs: a tuple of the inputs, or the only one, such as an array. Floats are moved by noise
            of their own size, as equal ones could hide a difference; all else stays.
        axes: the declaration: in place of each array of `params` a tuple of a name or None for each
            of its axes.

    Raises:
        ValueError: the declaration does not fit the params, or is wrong: names the stream and the
            parameter. Or the function cannot be tried: it rounds to less than float64, fails in
            it, or gives no finite floats.
    """
    paths, leaves, names = fitted(params, axes)
    streams = _stream_sizes(paths, leaves, names)
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    with (
        jax.numpy_dtype_promotion('standard'),
        jax.numpy_rank_promotion('allow'),
        jax.default_device(jax.local_devices(backend='cpu')[0]),
    ):
        # Raises what is wrong without us.
        jax.eval_shape(lambda params: apply(params, *arguments), params)
        with jax.enable_x64(True):
            trial = Trial(apply, jax.tree.structure(params), leaves, arguments)
            return _tried(trial, paths, names, streams)


def _tried(
    trial: Trial, paths: list[str], names: list[Names], streams: dict[str, int]
) -> AxesCheck:
    members = {
        stream: [(i, axis) for i, each in enumerate(names) for axis, x in enumerate(each)
                 if x == stream]
        for stream in streams
    }  # fmt: skip
    differences = dict.fromkeys(('outputs', 'gradients', *OPTIMIZERS), 0.0)
    for stream, size in streams.items():
        for permutation in _generators(size):
            moves = dict.fromkeys(members[stream], permutation)
            found = trial.differences(moves, OPTIMIZERS)
            for what, sizes in found.items():
                differences[what] = max(differences[what], *sizes)
            wrong = [what for what, sizes in found.items() if max(sizes) > 1]
            if wrong:
                raise ValueError(_complaint(trial, paths, names, members, stream, found))
    not_finite = []
    for stream in [*streams, ''] if len(streams) > 1 else streams:
        chosen = members[stream] if stream else [x for each in members.values() for x in each]
        worst = trial.unequal(chosen)
        if worst is None:
            not_finite.append(stream)
        elif worst[0] > AMPLIFIED:
            i, axis = worst[1]
            raise ValueError(
                f'stream {names[i][axis]!r}: where its features are equal, the gradients of '
                f'{paths[i]} along axis {axis} are not; something chooses one of equals, such as a '
                'sort or argmax, or divides by their variance, which is 0'
            )
    seen = [bool(np.max(np.abs(x), initial=0.0) > FLOOR) for x in trial.gradients]
    free = [
        (i, axis)
        for i, each in enumerate(names)
        for axis, name in enumerate(each)
        if name is None and trial.weights[i].shape[axis] > 1 and seen[i]
    ]
    return AxesCheck(
        streams=streams,
        differences={what: TOLERANCE * size for what, size in differences.items()},
        unseen=[
            path for path, each, s in zip(paths, names, seen, strict=True) if any(each) and not s
        ],
        unnamed=[[(paths[i], axis) for i, axis in together] for together in _unnamed(trial, free)],
        not_finite=not_finite,
    )


def _complaint(
    trial: Trial,
    paths: list[str],
    names: list[Names],
    members: dict[str, list[Axis]],
    stream: str,
    found: dict[str, list[float]],
) -> str:
    """Says what is wrong with a stream, and of which parameter's axes if that mends it."""
    what = next(each for each, sizes in found.items() if max(sizes) > 1)
    worst = int(np.argmax(found['gradients']))
    said = (
        f'stream {stream!r}: permuting its features changes '
        + ('the outputs' if what == 'outputs' else f'the {what} by more than the permutation')
        + f', most of all the gradient of {paths[worst]}'
    )
    for i, axes in _other_axes(trial, members[stream]):
        kept = [(j, axis) for j, axis in members[stream] if j != i]
        moves = [*kept, *((i, axis) for axis in axes)]
        size = trial.weights[members[stream][0][0]].shape[members[stream][0][1]]
        if moves and all(trial.holds(dict.fromkeys(moves, p)) for p in _generators(size)):
            mended = [
                stream if axis in axes else (None if name == stream else name)
                for axis, name in enumerate(names[i])
            ]
            shown = f'({", ".join(map(repr, mended))}{"," if len(mended) == 1 else ""})'
            return f'{said}; it would hold if {paths[i]} were {shown}, not {names[i]}'
    return said


def _other_axes(trial: Trial, members: list[Axis]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """For each array the sets of axes that the stream might index instead of those it does."""
    (i, axis), *_ = members
    size = trial.weights[i].shape[axis]
    concerned = list(dict.fromkeys(i for i, _ in members))
    others = [i for i in range(len(trial.weights)) if i not in concerned]
    for i in concerned + others:
        fitting = [axis for axis, n in enumerate(trial.weights[i].shape) if n == size]
        own = tuple(axis for j, axis in members if j == i)
        for count in range(len(fitting) + 1):
            for axes in itertools.combinations(fitting, count):
                if axes != own:
                    yield i, axes


def _unnamed(trial: Trial, free: list[Axis]) -> list[list[Axis]]:
    """Sets of axes of one length that may be permuted together, smallest sets first."""
    found: list[list[Axis]] = []
    trials = 0
    for count in range(1, MOST_TOGETHER + 1):
        for together in itertools.combinations(free, count):
            taken = {x for each in found for x in each}
            sizes = {trial.weights[i].shape[axis] for i, axis in together}
            if len(sizes) > 1 or taken & set(together):
                continue
            trials += 1
            if count > 1 and trials > MOST_TRIALS:
                return found
            (size,) = sizes
            if all(trial.holds(dict.fromkeys(together, p)) for p in _generators(size)):
                found.append(list(together))
    return found


def _generators(size: int) -> list[np.ndarray]:
    """A cycle of all features in random order, and a transposition of two neighbours in it."""
    order = np.random.default_rng(2).permutation(size)
    cycle, transposition = np.arange(size), np.arange(size)
    cycle[order] = np.roll(order, 1)
    if size > 1:
        transposition[order[:2]] = order[1::-1]
    return [cycle, transposition] if size > 2 else [cycle]


def _is_declared(x: Any) -> bool:
    return isinstance(x, tuple) and all(each is None or isinstance(each, str) for each in x)


def fitted(params: Tree, axes: Tree) -> tuple[list[str], list[np.ndarray], list[Names]]:
    """Paths, arrays and names of the axes of all parameters.

    Raises:
        ValueError: they do not fit.
    """
    treedef: Any
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [_shown(path) for path, _ in flat]
    for path, (_, x) in zip(paths, flat, strict=True):
        if not hasattr(x, 'shape'):
            raise ValueError(
                f'params: {path} is no array but {x!r:.60}; keep arrays only, as '
                'equinox.partition(model, equinox.is_array) does'
            )
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise ValueError(f'params: {path} is complex; only real numbers can be checked')
    try:
        names = treedef.flatten_up_to(axes)
    except ValueError:
        declared = {
            _shown(path)
            for path, _ in jax.tree_util.tree_flatten_with_path(axes, is_leaf=_is_declared)[0]
        }
        lacking, strange = sorted(set(paths) - declared), sorted(declared - set(paths))
        said = [f'lacks {", ".join(lacking)}'] * bool(lacking)
        said += [f'has {", ".join(strange)}, which params lacks'] * bool(strange)
        raise ValueError(
            f'axes: {"; ".join(said) or "is a tree of another structure than params"}'
        ) from None
    for path, (_, x), each in zip(paths, flat, names, strict=True):
        if not _is_declared(each):
            raise ValueError(f'axes: {path} is {each!r:.60}; must be a tuple of names or None')
        if len(each) != len(x.shape):
            raise ValueError(f'axes: {path} is {each}, which does not fit the shape {x.shape}')
    arrays = [np.asarray(x) for _, x in flat]
    return paths, arrays, names


def _shown(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')


def _stream_sizes(paths: list[str], leaves: Arrays, names: list[Names]) -> dict[str, int]:
    first: dict[str, tuple[int, str]] = {}
    for path, x, each in zip(paths, leaves, names, strict=True):
        for size, name in zip(x.shape, each, strict=True):
            if name is None:
                continue
            count, where = first.setdefault(name, (size, path))
            if count != size:
                raise ValueError(
                    f'stream {name!r}: has {size} features in {path}, and {count} in {where}'
                )
    return {name: count for name, (count, _) in first.items()}
