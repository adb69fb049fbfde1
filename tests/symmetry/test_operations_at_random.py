"""Each operation with shapes and settings at random: what gets a name may be permuted.

A generator draws shapes of parameters and a function of them. Its result is multiplied by a
parameter of the same shape and summed, so that a name of an axis of that parameter claims that the
operation passes features on to that axis of its result.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.symmetry.permuting import broken_streams

TIMES = 8  # for each generator


def sizes(rng, number, among=(2, 3, 4)):
    return tuple(int(x) for x in rng.choice(among, number))


def order(rng, number):
    return tuple(int(x) for x in rng.permutation(number))


def product(rng):
    batch, gone = sizes(rng, rng.integers(3)), sizes(rng, rng.integers(3))
    shapes, batched, contracted = [], [], []
    for _ in range(2):
        free = sizes(rng, rng.integers(3))
        axes = order(rng, len(batch + gone + free))  # old axis of each new one
        shapes.append(tuple((batch + gone + free)[i] for i in axes))
        batched.append([axes.index(i) for i in range(len(batch))])
        contracted.append([axes.index(len(batch) + i) for i in range(len(gone))])
    numbers = (contracted, batched)
    return shapes, lambda x, y: lax.dot_general(x, y, numbers)


def convolution(rng):
    groups, number = int(rng.choice([1, 1, 2, 6])), int(rng.integers(1, 3))
    specs = [order(rng, number + 2) for _ in range(3)]
    unordered = (
        (2, 6, *sizes(rng, number)),
        (int(rng.choice([6, 12])), 6 // groups, *sizes(rng, number, (1, 2, 3))),
    )
    shapes = [
        tuple(shape[spec.index(i)] for i in range(number + 2))
        for shape, spec in zip(unordered, specs, strict=False)
    ]
    strides, numbers = sizes(rng, number, (1, 2)), lax.ConvDimensionNumbers(*specs)
    return shapes, lambda x, y: lax.conv_general_dilated(
        x, y, strides, 'SAME', dimension_numbers=numbers, feature_group_count=groups
    )  # fmt: skip


def factors(rng, total):
    found = []
    while total > 1:
        found.append(int(rng.choice([x for x in range(1, total + 1) if total % x == 0])))
        total //= found[-1]
    return tuple(found[i] for i in order(rng, len(found))) or (1,)


def reshapes(rng):
    first = shape = sizes(rng, rng.integers(1, 5), (1, 2, 3, 4, 6))
    steps = []
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.4:
            axes = order(rng, len(shape))
            shape = tuple(shape[i] for i in axes)
            steps.append(lambda x, axes=axes: lax.transpose(x, axes))
        else:
            shape = factors(rng, int(np.prod(shape)))
            steps.append(lambda x, shape=shape: lax.reshape(x, shape))

    def function(x, y):
        for step in steps:
            x = step(x)
        return x * y

    return [first, tuple(size if rng.random() < 0.7 else 1 for size in shape)], function


def index(rng, shape):
    chosen = []
    for size in shape:
        number = int(rng.integers(size))
        kinds = (
            slice(None), slice(None), slice(None, None, -1), slice(number, None, 2), number,
            rng.integers(size, size=2),
        )  # fmt: skip
        chosen.append(kinds[rng.integers(len(kinds))])
    if rng.random() < 0.3:
        chosen.insert(int(rng.integers(len(shape))), None)
    return tuple(chosen)


def reading(rng):
    shape = sizes(rng, 3)
    where = index(rng, shape)
    return [shape], lambda x: x[where]


def writing(rng):
    shape = sizes(rng, 3)
    where, adds = index(rng, shape), rng.random() < 0.5
    written = np.zeros(shape)[where].shape
    return [shape, written], lambda x, y: x.at[where].add(y) if adds else x.at[where].set(y)


def along_an_axis(rng):
    shape, axis = sizes(rng, 3), int(rng.integers(3))
    taken = [size if rng.random() < 0.6 else 1 for size in shape]
    taken[axis] = 2
    where = rng.integers(shape[axis], size=taken)
    if rng.random() < 0.5:
        where[:] = 1
    return [shape], lambda x: jnp.take_along_axis(x, jnp.asarray(where), axis)


def part(rng):
    shape = sizes(rng, 3)
    size = tuple(x if rng.random() < 0.6 else int(rng.integers(1, x + 1)) for x in shape)
    start = [int(rng.integers(x - y + 1)) for x, y in zip(shape, size, strict=True)]
    if rng.random() < 0.5:
        return [shape], lambda x: lax.dynamic_slice(x, start, size)
    return [shape, size], lambda x, y: lax.dynamic_update_slice(x, y, start)


def padding(rng):
    config = [tuple(int(x) for x in rng.integers((-1, 0, 0), 2)) for _ in range(3)]
    config = [each if rng.random() < 0.5 else (0, 0, 0) for each in config]
    return [sizes(rng, 3), ()], lambda x, y: lax.pad(x, y, config)


def going_along(rng):
    axis = int(rng.integers(3))
    functions = jnp.flip, jnp.cumsum, jnp.sort, lambda x, axis: jnp.roll(x, 1, axis)
    function = functions[rng.integers(len(functions))]
    return [sizes(rng, 3, (3, 4))], lambda x: function(x, axis=axis)


def joining(rng):
    shape, axis, number = list(sizes(rng, 3)), int(rng.integers(3)), int(rng.integers(1, 4))
    if rng.random() < 0.3:
        return [tuple(shape)] * number, lambda *xs: jnp.stack(xs, axis)
    if rng.random() < 0.5:
        return [tuple(shape)] * number, lambda *xs: lax.concatenate(xs, axis)
    shapes = [(*shape[:axis], *sizes(rng, 1), *shape[axis + 1 :]) for _ in range(number)]
    return shapes, lambda *xs: lax.concatenate(xs, axis)


def pooling(rng):
    window, strides = sizes(rng, 3, (1, 1, 2)), sizes(rng, 3, (1, 1, 2))
    return [sizes(rng, 3)], lambda x: lax.reduce_window(x, 0.0, lax.add, window, strides, 'SAME')


def repeating(rng):
    axis, repetitions = int(rng.integers(3)), sizes(rng, 3, (1, 2))
    functions = (
        lambda x: jnp.tile(x, repetitions),
        lambda x: jnp.tile(x, (2, 1, 1)).reshape(2, *x.shape),
        lambda x: jnp.tile(x, (2, 1, 1)).reshape(x.shape[0], 2, *x.shape[1:]),
        lambda x: jnp.repeat(x, 2, 0).reshape(x.shape[0], 2, *x.shape[1:]),
        lambda x: jnp.repeat(x, 2, axis),
        lambda x: jnp.stack(jnp.unstack(x, axis=axis)[::-1], axis=2),
        lambda x: sum((i + 1) * y for i, y in enumerate(jnp.split(x, x.shape[axis], axis))),
    )
    return [sizes(rng, 3)], functions[rng.integers(len(functions))]


def spreading(rng):
    shape, axes = sizes(rng, 2, (1, 2, 3)), sorted(order(rng, 4)[:2])
    spread = [2, 3, 3, 2]
    for axis, size in zip(axes, shape, strict=True):
        spread[axis] = size if size > 1 else spread[axis]
    return [shape], lambda x: lax.broadcast_in_dim(x, spread, axes)


def mapping(rng):
    shape, i, j = sizes(rng, 3), int(rng.integers(3)), int(rng.integers(2))
    functions = (
        lambda x, y: jax.vmap(lambda p, q: p * jnp.sum(q), (i, 0), j)(x, y),
        lambda x, y: jax.vmap(lambda p, k: p[k], (i, 0), j)(x, jnp.arange(x.shape[i]) % 2),
        lambda x, y: lax.scan(
            lambda c, z: (c + z[0], c * jnp.sum(z[1])), jnp.zeros_like(jnp.take(x, 0, i)),
            (jnp.moveaxis(x, i, 0), y),
        )[1],
    )  # fmt: skip
    return [shape, (shape[i], 2)], functions[rng.integers(len(functions))]


GENERATORS = [
    product, convolution, reshapes, reading, writing, along_an_axis, part, padding, going_along,
    joining, pooling, repeating, spreading, mapping,
]  # fmt: skip


@pytest.mark.parametrize('seed', range(TIMES))
@pytest.mark.parametrize('generator', GENERATORS, ids=lambda x: x.__name__)
def test_what_gets_a_name_may_be_permuted(generator, seed):
    """Of the parameters that an operation reads, and of those that its result meets."""
    shapes, function = generator(np.random.default_rng(seed))

    def apply(params, scale):
        result = function(*params[:-1])
        return jnp.sum(jnp.sin(result * params[-1]) + params[-1] ** 2) * scale

    with jax.enable_x64(True), jax.numpy_rank_promotion('allow'):
        params = [jax.ShapeDtypeStruct(shape, np.float64) for shape in shapes]
        params.append(jax.eval_shape(function, *params))
        inferred, broken = broken_streams(apply, params, np.float64(1.0))
    assert not broken, inferred.report
