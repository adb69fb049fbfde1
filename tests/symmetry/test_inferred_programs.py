"""No program, however it is composed, gets a name for an axis that may not be permuted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from tests.symmetry.permuting import broken_streams

PARAMS = {'a': (4, 4), 'b': (4, 4), 'c': (2, 4), 'd': (4, 2), 'e': (2, 2), 'f': (8, 2),
          'v': (4,), 'w': (2,)}  # fmt: skip
PARAMS = {name: jax.ShapeDtypeStruct(shape, np.float64) for name, shape in PARAMS.items()}
INPUTS = np.random.default_rng(7).normal(size=(3, 4))
"""No axis of the parameters has the length 3 of the batch, many have those of others."""


def axis_of(x, i):
    return i % x.ndim


def contract(x, y, i, j):
    i, j = axis_of(x, i), axis_of(y, j)
    return jnp.tensordot(x, y, axes=(i, j)) if x.shape[i] == y.shape[j] else None


def batched(x, y, i, j):
    i, j = axis_of(x, i), axis_of(y, j)
    if x.shape[i] != y.shape[j]:
        return None
    return jax.vmap(lambda p, q: jnp.sum(p) * q, (i, j), 0)(x, y)


def meet(x, y, i, j):
    operation = (jnp.add, jnp.multiply, jnp.maximum, lambda p, q: jnp.where(p > 0, p, q))[j % 4]
    if x.ndim < y.ndim:
        x, y = y, x
    if x.ndim > y.ndim:
        y = jnp.expand_dims(
            y, tuple(k for k in range(x.ndim) if k != axis_of(x, i))[-(x.ndim - y.ndim) :]
        )
    if any(p != q and 1 not in (p, q) for p, q in zip(x.shape, y.shape, strict=True)):
        return None
    return operation(x, y)


def merged(x, y, i, j):
    i = axis_of(x, i)
    return x.reshape(*x.shape[:i], -1, *x.shape[i + 2 :])


def parted(x, y, i, j):
    i = axis_of(x, i)
    if x.shape[i] % 2:
        return None
    parts = ((2, -1), (-1, 2))[j % 2]
    return x.reshape(*x.shape[:i], *parts, *x.shape[i + 1 :])


def reshaped(x, y, i, j):
    return x.reshape(y.shape) if x.size == y.size else None


def reduced(x, y, i, j):
    operation = (jnp.sum, jnp.max, jnp.mean, jax.nn.logsumexp)[j % 4]
    return operation(x, axis=axis_of(x, i), keepdims=bool(j // 4 % 2))


def one_by_one(x, y, i, j):
    """Along an axis, the order counts."""
    operation = (jnp.cumsum, jnp.sort, jnp.flip, lambda p, axis: jnp.roll(p, 1, axis))[j % 4]
    return operation(x, axis=axis_of(x, i))


def normalized(x, y, i, j):
    return (jax.nn.softmax, jax.nn.standardize)[j % 2](x, axis=axis_of(x, i))


def a_part(x, y, i, j):
    i = axis_of(x, i)
    return lax.slice_in_dim(x, j % 2, x.shape[i] - (j // 2) % 2 or 1, axis=i)


def joined(x, y, i, j):
    i = axis_of(x, i)
    if x.ndim != y.ndim or x.shape[:i] + x.shape[i + 1 :] != y.shape[:i] + y.shape[i + 1 :]:
        return None
    if x.shape == y.shape and j % 2:
        return jnp.stack([x, y], i)
    return jnp.concatenate([x, y], i)


def repeated(x, y, i, j):
    i = axis_of(x, i)
    repetitions = tuple(2 if k == i else 1 for k in range(x.ndim))
    return jnp.tile(x, repetitions) if j % 2 else jnp.repeat(x, 2, i)


def numbered(x, y, i, j):
    i = axis_of(x, i)
    indices = np.arange(x.shape[i])[::-1] // (1 + j % 2)
    if j // 2 % 3 == 0:
        return x * jnp.expand_dims(1.0 + indices, [k for k in range(x.ndim) if k != i])
    if j // 2 % 3 == 1:
        return x * lax.broadcasted_iota(x.dtype, x.shape, i)
    return jnp.take(x, indices, i)


def written(x, y, i, j):
    i = axis_of(x, i)
    return jnp.moveaxis(jnp.moveaxis(x, i, 0).at[j % x.shape[i]].add(0.5), 0, i)


def diagonal(x, y, i, j):
    i, j = axis_of(x, i), axis_of(x, j)
    return jnp.diagonal(x, 0, i, j) if i != j and x.shape[i] == x.shape[j] else None


def transposed(x, y, i, j):
    return jnp.moveaxis(x, axis_of(x, i), axis_of(x, j))


def scanned(x, y, i, j):
    """A loop along an axis, or one that goes round with an operation that keeps the shape."""
    i = axis_of(x, i)
    if j % 3 == 0:
        total, each = lax.scan(
            lambda c, z: (c + z, c * z),
            jnp.zeros(x.shape[:i] + x.shape[i + 1 :]),
            jnp.moveaxis(x, i, 0),
        )
        return total if j // 3 % 2 else each
    if j % 3 == 1:
        return lax.fori_loop(0, 2, lambda _, c: jnp.tanh(c + jnp.flip(c, i)), x)
    if x.ndim != 2 or x.shape[0] != x.shape[1]:
        return None
    return lax.scan(lambda c, _: (c.T @ c, None), x, None, length=2)[0]


def branched(x, y, i, j):
    if x.shape != y.shape:
        return None
    return lax.cond(jnp.sum(x) > 0, lambda p, q: p, lambda p, q: jnp.tanh(q), x, y)


def widened(x, y, i, j):
    return jnp.pad(x, [(int(k == axis_of(x, i)), 0) for k in range(x.ndim)])


OPERATIONS = [
    contract, contract, contract, batched, meet, meet, merged, parted, reshaped, reduced,
    one_by_one, normalized, a_part, joined, repeated, numbered, written, diagonal, transposed,
    scanned, branched, widened,
]  # fmt: skip


def run(program, params, inputs):
    """Each step makes a value of two earlier ones; all values are put out, summed up.

    A sum is the same in any order, so outputs do not forbid a permutation.
    """
    values = [inputs, *(params[name] for name in sorted(params))]
    for operation, first, second, i, j in program:
        x, y = values[-1 - first % len(values)], values[-1 - second % len(values)]
        if x.ndim == 0 or y.ndim == 0:
            continue
        made = OPERATIONS[operation](x, y, i, j)
        if made is None or made.ndim > 4 or not 1 <= made.size <= 512:
            continue
        if made.shape == x.shape:  # so that positions of the one meet those of the other
            made = made + x
        values.append(jnp.tanh(made))
    return [jnp.sum(jnp.sin(value + 1.0)) for value in values]


small = st.integers(0, 11)
steps = st.tuples(st.integers(0, len(OPERATIONS) - 1), small, small, small, small)


def check(program):
    with jax.numpy_rank_promotion('allow'):
        inferred, broken = broken_streams(lambda p, x: run(program, p, x), PARAMS, INPUTS)
    assert not broken, inferred.report


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(steps, min_size=4, max_size=12))
def test_an_axis_with_a_name_may_be_permuted(program):
    """Permuting the features of each inferred stream leaves all outputs as they are."""
    check(program)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(steps, min_size=2, max_size=16))
def test_so_it_may_in_many_more_programs(program):
    """As above, of other programs each time."""
    check(program)
