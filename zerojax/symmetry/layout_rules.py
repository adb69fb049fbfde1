"""Rules of what moves numbers without computing: reshapes, parts, gathers. See `axis_rules`."""

from typing import Any

from zerojax.symmetry.axis_rules import (
    Follower,
    Rule,
    each_by_itself,
    part,
    shape_of,
    silent,
    spread_and_align,
    stopped,
    unknown,
)
from zerojax.symmetry.identities import Axes, equal_along


def broadcast_in_dim(f: Follower, eqn: Any, operand: Axes, *sizes: Axes) -> list[Axes]:
    """New axes are equal along."""
    if sizes:
        return unknown(f, eqn, operand, *sizes)
    shape = shape_of(eqn.outvars[0])
    axes = [equal_along(size) for size in shape]
    old = shape_of(eqn.invars[0])
    for i, new in enumerate(eqn.params['broadcast_dimensions']):
        axes[new] = spread_and_align(f, eqn, axes[new], operand[i], old[i], shape[new])
    return [tuple(axes)]


def transpose(f: Follower, eqn: Any, operand: Axes) -> list[Axes]:
    """Axes in a new order."""
    return [tuple(operand[i] for i in eqn.params['permutation'])]


def squeeze(f: Follower, eqn: Any, operand: Axes) -> list[Axes]:
    """Axes of length 1 go."""
    gone = eqn.params['dimensions']
    for i in gone:
        f.ids.pin(operand[i], f'its only position is taken away {f.place(eqn)}')
    return [tuple(axis for i, axis in enumerate(operand) if i not in gone)]


def reshape(f: Follower, eqn: Any, operand: Axes, *sizes: Axes) -> list[Axes]:
    """Axes are merged and taken apart."""
    if sizes or eqn.params.get('dimensions') is not None:
        return unknown(f, eqn, operand, *sizes)
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if old == new:
        return [operand]
    factors = [factor for axis in operand for factor in axis]
    return [f.ids.regroup(factors, new, f.place(eqn))]


def partly(f: Follower, eqn: Any, operand: Axes, *starts: Axes) -> list[Axes]:
    """Axes that are taken as a whole stay."""
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    reason = f'a part of it is taken {f.place(eqn)}'
    from_where = [None] * len(old)  # that of a `dynamic_slice` is computed
    if 'start_indices' in eqn.params and set(eqn.params['strides'] or (1,)) == {1}:
        from_where = eqn.params['start_indices']
    return [
        tuple(
            axis if a == b else part(f, axis, b, reason, start)
            for axis, a, b, start in zip(operand, old, new, from_where, strict=True)
        )
    ]


def pad(f: Follower, eqn: Any, operand: Axes, value: Axes) -> list[Axes]:
    """Padded axes are stopped, also if negative padding keeps the length."""
    reason = f'it is padded {f.place(eqn)}'
    shape = shape_of(eqn.outvars[0])
    return [
        tuple(
            axis if config == (0, 0, 0) else stopped(f, axis, size, reason)
            for axis, size, config in zip(operand, shape, eqn.params['padding_config'], strict=True)
        )
    ]


def reverse(f: Follower, eqn: Any, operand: Axes) -> list[Axes]:
    """Equal numbers are equal in reverse."""
    reason = f'its order is reversed {f.place(eqn)}'
    return [
        tuple(
            part(f, axis, size, reason) if i in eqn.params['dimensions'] else axis
            for i, (axis, size) in enumerate(zip(operand, shape_of(eqn.invars[0]), strict=True))
        )
    ]


def concatenate(f: Follower, eqn: Any, *operands: Axes) -> list[Axes]:
    """Arrays of one length make an axis of two factors; of others, one that is stopped."""
    if len(operands) == 1:
        return list(operands)
    dimension, place = eqn.params['dimension'], f.place(eqn)
    reason = f'it is joined to others {place}'
    sizes = [shape_of(operand)[dimension] for operand in eqn.invars]
    joined = list(operands[0])
    for axes in operands[1:]:
        for i, axis in enumerate(axes):
            if i != dimension or len(set(sizes)) == 1:
                joined[i] = f.ids.align(joined[i], axis, place)
    if len(set(sizes)) == 1:
        joined[dimension] = (*f.ids.new_pinned(len(operands), reason), *joined[dimension])
    else:
        for axes in operands:
            f.ids.pin(axes[dimension], reason)
        joined[dimension] = f.ids.new_pinned(sum(sizes), reason)
    return [tuple(joined)]


def iota(f: Follower, eqn: Any, *operands: Axes) -> list[Axes]:
    """Numbers along one axis."""
    reason = f'its positions are numbered {f.place(eqn)}'
    return [
        tuple(
            stopped(f, (), size, reason) if i == eqn.params['dimension'] else equal_along(size)
            for i, size in enumerate(shape_of(eqn.outvars[0]))
        )
    ]


def gather(f: Follower, eqn: Any, operand: Axes, indices: Axes) -> list[Axes]:
    """Axes that no index chooses from, and those of the indices, stay."""
    numbers, taken = eqn.params['dimension_numbers'], eqn.params['slice_sizes']
    sizes, shape, place = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]), f.place(eqn)
    reason = f'positions are chosen from it by number {place}'
    f.ids.pin(indices[-1], f'it holds the coordinates of positions {place}')
    batch = list(indices[:-1])
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    for i, j in pairs:
        batch[j] = f.ids.align(batch[j], operand[i], place)
    kept = []
    for i, axis in enumerate(operand):
        if i in numbers.operand_batching_dims:
            continue
        whole = taken[i] == sizes[i] and i not in numbers.start_index_map
        kept_axis = axis if whole else stopped(f, axis, taken[i], reason)
        if i not in numbers.collapsed_slice_dims:
            kept.append(kept_axis)
        elif whole:
            f.ids.pin(axis, f'its only position is taken away {place}')
    f.writes([axis for axis in kept if axis])
    batch_iterator, kept_iterator = iter(batch), iter(kept)
    return [
        tuple(
            next(kept_iterator) if i in numbers.offset_dims else next(batch_iterator)
            for i in range(len(shape))
        )
    ]


def scatter(f: Follower, eqn: Any, operand: Axes, indices: Axes, updates: Axes) -> list[Axes]:
    """Axes that are written as a whole stay."""
    numbers = eqn.params['dimension_numbers']
    sizes, written = shape_of(eqn.invars[0]), shape_of(eqn.invars[2])
    place = f.place(eqn)
    reason = f'its positions are written by number {place}'
    if numbers.operand_batching_dims:
        return unknown(f, eqn, operand, indices, updates)
    windows = iter(numbers.update_window_dims)
    axes = []
    for i, axis in enumerate(operand):
        update = None if i in numbers.inserted_window_dims else next(windows)
        by_number = i in numbers.scatter_dims_to_operand_dims
        if update is not None and written[update] == sizes[i] and not by_number:
            axes.append(f.ids.align(axis, updates[update], place))
        else:
            f.ids.pin(() if update is None else updates[update], reason)
            axes.append(stopped(f, axis, sizes[i], reason))
    many = [axis for i, axis in enumerate(updates) if i not in numbers.update_window_dims]
    for axis in (*many, *indices):
        f.ids.pin(axis, f'it goes along what is written by number {place}')
    return [tuple(axes)]


def dynamic_update_slice(
    f: Follower, eqn: Any, operand: Axes, update: Axes, *starts: Axes
) -> list[Axes]:
    """Axes that are written as a whole stay."""
    place = f.place(eqn)
    reason = f'a part of it is written {place}'
    axes = []
    pairs = zip(shape_of(eqn.invars[0]), shape_of(eqn.invars[1]), strict=True)
    for axis, new, (size, written) in zip(operand, update, pairs, strict=True):
        if size == written:
            axes.append(f.ids.align(axis, new, place))
        else:
            f.ids.pin(new, reason)
            axes.append(stopped(f, axis, size, reason))
    return [tuple(axes)]


def take_apart(f: Follower, eqn: Any, operand: Axes) -> list[Axes]:
    """`split` keeps the axis that it goes along in its results, `unstack` does not."""
    along, reason = eqn.params['axis'], f'it is taken apart {f.place(eqn)}'
    others = (*operand[:along], *operand[along + 1 :])
    results: list[Axes] = []
    start = 0
    for result in eqn.outvars:
        shape = shape_of(result)
        kept = len(shape) == len(operand)
        size = shape[along] if kept else 1
        taken = part(f, operand[along], size, reason, start)
        start += size
        results.append((*operand[:along], taken, *operand[along + 1 :]) if kept else others)
    return results


def stack(f: Follower, eqn: Any, *operands: Axes) -> list[Axes]:
    """A new axis of which each operand is a position."""
    along, place = eqn.params['axis'], f.place(eqn)
    joined = operands[0]
    for axes in operands[1:]:
        joined = tuple(f.ids.align(a, b, place) for a, b in zip(joined, axes, strict=True))
    new = stopped(f, (), len(operands), f'arrays are stacked along it {place}')
    return [(*joined[:along], new, *joined[along:])]


def tile(f: Follower, eqn: Any, operand: Axes) -> list[Axes]:
    """Equal along the repetitions, which are a factor of their own."""
    pairs = zip(eqn.params['reps'], operand, strict=True)
    return [tuple((*equal_along(repetitions), *axis) for repetitions, axis in pairs)]


def top_k(f: Follower, eqn: Any, operand: Axes) -> list[Axes]:
    """Positions along the axis are chosen and told by number."""
    along = eqn.params.get('axis', len(operand) - 1)  # always the last one before JAX 0.8
    chosen = stopped(
        f, operand[along], eqn.params['k'], f'its largest are chosen by number {f.place(eqn)}'
    )
    return [(*operand[:along], chosen, *operand[along + 1 :]) for _ in eqn.outvars]


SCATTERS = ('scatter', 'scatter-add', 'scatter-max', 'scatter-min', 'scatter-mul', 'scatter-sub',
            'scatter_add', 'scatter_max', 'scatter_min', 'scatter_mul')  # fmt: skip
TELLING = ('debug_callback', 'debug_print')
LEAVE_ALL = ('device_put', 'layout_constraint', 'optimization_barrier', 'sharding_constraint')

LAYOUT: dict[str, Rule] = {
    **dict.fromkeys(SCATTERS, scatter),
    **dict.fromkeys(LEAVE_ALL, each_by_itself),
    **dict.fromkeys(TELLING, silent),
    **dict.fromkeys(('slice', 'dynamic_slice'), partly),
    **dict.fromkeys(('split', 'unstack'), take_apart),
    'broadcast_in_dim': broadcast_in_dim,
    'concatenate': concatenate,
    'dynamic_update_slice': dynamic_update_slice,
    'gather': gather,
    'iota': iota,
    'pad': pad,
    'reshape': reshape,
    'rev': reverse,
    'squeeze': squeeze,
    'stack': stack,
    'tile': tile,
    'top_k': top_k,
    'transpose': transpose,
}
