"""What each operation of a jaxpr does to the axes of its operands.

A rule is a function (follower, equation, axes of each operand) -> axes of each result. It is sound
if the operation commutes with every permutation that the united and pinned identities still allow:
permuting the operands' axes permutes those of the results. To pin all axes of all operands is
always sound; that is what becomes of an operation without a rule.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from zerojax.symmetry.identities import Axes, Axis, Identities, equal_along, is_equal_along, length


class Follower(Protocol):
    """What rules know of the one who follows a jaxpr, see `following`."""

    ids: Identities

    def place(self, eqn: Any) -> str:
        """The operation and where it stands in the source, in parentheses."""

    def writes(self, axes: Sequence[Axis]) -> None:
        """Takes down that features along these axes are put out here."""


Rule = Callable[..., list[Axes]]


def shape_of(atom: Any) -> tuple[int, ...]:
    """Shape of an operand or result; () of what is no array."""
    return tuple(getattr(atom.aval, 'shape', ()))


def stopped(f: Follower, axis: Axis, size: int, reason: str) -> Axis:
    """The axis [size] of a result of an operation along `axis` that is not symmetric in it."""
    f.ids.pin(axis, reason)
    return () if size == 1 else f.ids.new_pinned(size, reason)


def unknown(f: Follower, eqn: Any, *operands: Axes) -> list[Axes]:
    """Pins all."""
    reason = f'it cannot be followed through this operation {f.place(eqn)}'
    for axes in operands:
        for axis in axes:
            f.ids.pin(axis, reason)
    return [
        tuple(stopped(f, (), size, reason) for size in shape_of(result)) for result in eqn.outvars
    ]


def no_results(f: Follower, eqn: Any, *operands: Axes) -> list[Axes]:
    """Of an operation that only tells the user something."""
    return []


def each_by_itself(f: Follower, eqn: Any, *operands: Axes) -> list[Axes]:
    """Results are the operands."""
    return list(operands)


def elementwise(f: Follower, eqn: Any, *operands: Axes) -> list[Axes]:
    """Axes that meet are united; one of length 1 may be repeated, and scalars have none."""
    shape = shape_of(eqn.outvars[0])
    meeting = [
        (axes, shape_of(operand))
        for axes, operand in zip(operands, eqn.invars, strict=True)
        if shape_of(operand) != ()
    ]
    if any(len(axes) != len(shape) for axes, _ in meeting):
        return unknown(f, eqn, *operands)
    joined = [equal_along(size) for size in shape]
    for axes, sizes in meeting:
        for i, axis in enumerate(axes):
            joined[i] = _spread_and_align(f, eqn, joined[i], axis, sizes[i], shape[i])
    return [tuple(joined) for _ in eqn.outvars]


def _spread_and_align(
    f: Follower, eqn: Any, joined: Axis, axis: Axis, size: int, spread: int
) -> Axis:
    if size == spread:
        return f.ids.align(joined, axis, f.place(eqn))
    f.ids.pin(axis, f'its only position is repeated {f.place(eqn)}')
    return joined


def broadcast_in_dim(f: Follower, eqn: Any, operand: Axes, *sizes: Axes) -> list[Axes]:
    """New axes are equal along."""
    if sizes:
        return unknown(f, eqn, operand, *sizes)
    shape = shape_of(eqn.outvars[0])
    axes = [equal_along(size) for size in shape]
    old = shape_of(eqn.invars[0])
    for i, new in enumerate(eqn.params['broadcast_dimensions']):
        axes[new] = _spread_and_align(f, eqn, axes[new], operand[i], old[i], shape[new])
    return [tuple(axes)]


def reduction(f: Follower, eqn: Any, operand: Axes) -> list[Axes]:
    """Sums, maxima and the like do not depend on the order of what they are over."""
    gone = eqn.params['axes']
    return [tuple(axis for i, axis in enumerate(operand) if i not in gone)]


def index_reduction(f: Follower, eqn: Any, operand: Axes) -> list[Axes]:
    """argmax and argmin return positions."""
    for i in eqn.params['axes']:
        f.ids.pin(operand[i], f'its positions are told by number {f.place(eqn)}')
    return reduction(f, eqn, operand)


def dot_general(f: Follower, eqn: Any, lhs: Axes, rhs: Axes) -> list[Axes]:
    """Unites what is contracted, and what is batched."""
    (left_gone, right_gone), (left_batch, right_batch) = eqn.params['dimension_numbers']
    place = f.place(eqn)
    for i, j in zip(left_gone, right_gone, strict=True):
        f.ids.align(lhs[i], rhs[j], place)
    batch = [
        f.ids.align(lhs[i], rhs[j], place) for i, j in zip(left_batch, right_batch, strict=True)
    ]
    free = [axis for i, axis in enumerate(lhs) if i not in (*left_gone, *left_batch)]
    free += [axis for i, axis in enumerate(rhs) if i not in (*right_gone, *right_batch)]
    f.writes(free)
    return [(*batch, *free)]


def convolution(f: Follower, eqn: Any, lhs: Axes, rhs: Axes) -> list[Axes]:
    """As a product over features; one to one where each is convolved by itself."""
    if eqn.params['batch_group_count'] != 1:
        return unknown(f, eqn, lhs, rhs)
    left, right, out = eqn.params['dimension_numbers']
    shape, place = shape_of(eqn.outvars[0]), f.place(eqn)
    axes: list[Axis] = [()] * len(shape)
    axes[out[0]] = lhs[left[0]]
    kernel_in, kernel_out = rhs[right[1]], rhs[right[0]]
    if eqn.params['feature_group_count'] == 1:
        f.ids.align(lhs[left[1]], kernel_in, place)
        axes[out[1]] = kernel_out
    elif shape_of(eqn.invars[0])[left[1]] == eqn.params['feature_group_count'] == shape[out[1]]:
        f.ids.pin(kernel_in, f'each feature is convolved by itself {place}')
        axes[out[1]] = f.ids.align(kernel_out, lhs[left[1]], place)
    else:
        reason = f'its positions are convolved in groups {place}'
        for axis in (lhs[left[1]], kernel_in):
            f.ids.pin(axis, reason)
        axes[out[1]] = stopped(f, kernel_out, shape[out[1]], reason)
    f.writes([kernel_out])
    for i, j, k in zip(left[2:], right[2:], out[2:], strict=True):
        reason = f'it is space, over which a convolution moves {place}'
        f.ids.pin(rhs[j], reason)
        axes[k] = stopped(f, lhs[i], shape[k], reason)
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
    if sizes or eqn.params['dimensions'] is not None:
        return unknown(f, eqn, operand, *sizes)
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if old == new:
        return [operand]
    # What stays in front needs no regrouping, so that an axis of length 1 stays where it is.
    factors = [factor for axis in operand for factor in axis]
    return [f.ids.regroup(factors, new, f.place(eqn))]


def partly(description: str) -> Rule:
    """Rule of an operation of one result that is not symmetric in those axes whose length changes,
    and leaves the others as they are; further operands are scalars."""

    def rule(f: Follower, eqn: Any, operand: Axes, *others: Axes) -> list[Axes]:
        sizes = zip(operand, shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]), strict=True)
        reason = f'{description} {f.place(eqn)}'
        return [tuple(axis if a == b else _part(f, axis, b, reason) for axis, a, b in sizes)]

    return rule


def _part(f: Follower, axis: Axis, size: int, reason: str) -> Axis:
    return equal_along(size) if is_equal_along(axis) else stopped(f, axis, size, reason)


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


def along(parameter: str, description: str) -> Rule:
    """Rule of an elementwise operation that is not symmetric along the axes it names."""

    def rule(f: Follower, eqn: Any, *operands: Axes) -> list[Axes]:
        named = eqn.params[parameter]
        named = (named,) if isinstance(named, int) else named
        reason = f'{description} {f.place(eqn)}'
        joined = list(elementwise(f, eqn, *operands)[0])
        for i in named:
            joined[i] = stopped(f, joined[i], length(joined[i]), reason)
        return [tuple(joined) for _ in eqn.outvars]

    return rule


def reverse(f: Follower, eqn: Any, operand: Axes) -> list[Axes]:
    """Equal numbers are equal in reverse."""
    reason = f'its order is reversed {f.place(eqn)}'
    return [
        tuple(
            _part(f, axis, size, reason) if i in eqn.params['dimensions'] else axis
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


def random_numbers(f: Follower, eqn: Any, *operands: Axes) -> list[Axes]:
    """Differ from position to position."""
    reason = f'random numbers differ along it {f.place(eqn)}'
    return (
        unknown(f, eqn, *operands)
        if any(operands)
        else [
            tuple(stopped(f, (), size, reason) for size in shape_of(result))
            for result in eqn.outvars
        ]
    )


ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
clz complex conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp
exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log
log1p logistic lt lt_to max min mul name ne neg nextafter not or polygamma population_count pow real
reduce_precision regularized_incomplete_beta rem round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh xor zeta
""".split()  # noqa: SIM905

REDUCTIONS = [f'reduce_{name}' for name in ('and', 'max', 'min', 'or', 'prod', 'sum', 'xor')]

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(('argmax', 'argmin'), index_reduction),
    **dict.fromkeys(
        ('cumlogsumexp', 'cummax', 'cummin', 'cumprod', 'cumsum'),
        along('axis', 'it is gone through in order'),
    ),
    **dict.fromkeys(('random_bits', 'random_split', 'random_seed'), random_numbers),
    **dict.fromkeys(('optimization_barrier', 'device_put'), each_by_itself),
    **dict.fromkeys(('debug_callback', 'debug_print'), no_results),
    'broadcast_in_dim': broadcast_in_dim,
    'concatenate': concatenate,
    'conv_general_dilated': convolution,
    'dot_general': dot_general,
    'dynamic_slice': partly('a part of it is taken'),
    'gather': gather,
    'iota': iota,
    'pad': pad,
    'reshape': reshape,
    'rev': reverse,
    'sort': along('dimension', 'it is sorted'),
    'slice': partly('a part of it is taken'),
    'squeeze': squeeze,
    'transpose': transpose,
}
