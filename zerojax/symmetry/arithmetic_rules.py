"""Rules of what computes: elementwise operations, reductions, products. See `axis_rules`."""

from typing import Any

from zerojax.symmetry.axis_rules import (
    Follower,
    Rule,
    all_stopped,
    shape_of,
    spread_and_align,
    stopped,
    unknown,
)
from zerojax.symmetry.identities import Axes, Axis, equal_along, length


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
            joined[i] = spread_and_align(f, eqn, joined[i], axis, sizes[i], shape[i])
    return [tuple(joined) for _ in eqn.outvars]


def bitcast(f: Follower, eqn: Any, operand: Axes) -> list[Axes]:
    """Elementwise where numbers have as many bits as before."""
    if shape_of(eqn.invars[0]) != shape_of(eqn.outvars[0]):
        return unknown(f, eqn, operand)
    return elementwise(f, eqn, operand)


def reduction(f: Follower, eqn: Any, operand: Axes) -> list[Axes]:
    """Sums, maxima and the like do not depend on the order of what they are over."""
    gone = eqn.params['axes']
    return [tuple(axis for i, axis in enumerate(operand) if i not in gone)]


def index_reduction(f: Follower, eqn: Any, operand: Axes) -> list[Axes]:
    """argmax and argmin return positions."""
    for i in eqn.params['axes']:
        f.ids.pin(operand[i], f'its positions are told by number {f.place(eqn)}')
    return reduction(f, eqn, operand)


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


def window_reduction(f: Follower, eqn: Any, operand: Axes) -> list[Axes]:
    """Pooling stops the axes that its windows are longer than 1 along, or skip along."""
    reason = f'a window moves over it {f.place(eqn)}'
    keys = 'window_dimensions', 'window_strides', 'padding', 'base_dilation', 'window_dilation'
    settings = zip(*(eqn.params[key] for key in keys), strict=True)
    return [
        tuple(
            axis
            if (window, stride, tuple(padding), base) == (1, 1, (0, 0), 1)
            else stopped(f, axis, size, reason)
            for axis, size, (window, stride, padding, base, _) in zip(
                operand, shape_of(eqn.outvars[0]), settings, strict=True
            )
        )
    ]


def fourier(f: Follower, eqn: Any, operand: Axes) -> list[Axes]:
    """The last axes are stopped."""
    reason = f'it is transformed {f.place(eqn)}'
    kept = len(operand) - len(eqn.params['fft_lengths'])
    shape = shape_of(eqn.outvars[0])
    changed = zip(operand[kept:], shape[kept:], strict=True)
    return [(*operand[:kept], *(stopped(f, axis, size, reason) for axis, size in changed))]


def random_numbers(f: Follower, eqn: Any, *operands: Axes) -> list[Axes]:
    """Differ from position to position."""
    return all_stopped(f, eqn, operands, f'random numbers differ along it {f.place(eqn)}')


ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
clz complex conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc
exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma
log log1p log2 logistic lt lt_to max min mul mulhi name ne neg nextafter not one_minus_square or
polygamma polynomial population_count pow real reduce_precision regularized_incomplete_beta rem
round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
square stop_gradient sub tan tanh xor zeta
""".split()  # noqa: SIM905

REDUCTIONS = [f'reduce_{name}' for name in ('and', 'max', 'min', 'or', 'prod', 'sum', 'xor')]
RANDOM = """
random_bits random_clone random_fold_in random_gamma random_seed random_split random_unwrap
random_wrap rng_bit_generator rng_uniform threefry2x32
""".split()  # noqa: SIM905
POOLINGS = ['reduce_window_max', 'reduce_window_min', 'reduce_window_sum']

ARITHMETIC: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(POOLINGS, window_reduction),
    **dict.fromkeys(('argmax', 'argmin'), index_reduction),
    **dict.fromkeys(
        ('cumlogsumexp', 'cummax', 'cummin', 'cumprod', 'cumsum'),
        along('axis', 'it is gone through in order'),
    ),
    **dict.fromkeys(RANDOM, random_numbers),
    'bitcast_convert_type': bitcast,
    'conv_general_dilated': convolution,
    'dot_general': dot_general,
    'fft': fourier,
    'sort': along('dimension', 'it is sorted'),
}
