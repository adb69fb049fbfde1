"""Each operation passes features on where it is symmetric in them, and stops them where not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.symmetry.permuting import broken_streams

PARAMS = {'a': (5, 6), 'b': (6, 6), 'c': (6, 3), 'v': (6,), 'w': (7, 6, 6)}
PARAMS = {name: np.zeros(shape) for name, shape in PARAMS.items()}
INPUTS = np.random.default_rng(0).normal(size=(4, 5))


def between(middle):
    """A network of one hidden layer of features h [4, 6], with something in the middle."""
    return lambda p, x: middle(p, jnp.tanh(x @ p['a'])) @ p['c']


def is_positive(h):
    return jnp.sum(h) > 0


def with_jvp(change, function=jnp.sin):
    """A function with a derivative that is not its own."""
    changed = jax.custom_jvp(function)
    changed.defjvp(lambda primals, tangents: (function(*primals), change(*tangents)))
    return changed


def with_vjp(change, function=jnp.sin):
    changed = jax.custom_vjp(function)
    changed.defvjp(lambda x: (function(x), None), lambda _, cotangent: (change(cotangent),))
    return changed


def through_a_ref(h):
    """As `h[:, ::-1]`."""
    ref = jax.new_ref(jnp.zeros_like(h))
    ref[...] = h[:, ::-1]
    return ref[...]


SIGNED_ZEROS = np.array([0.0, -0.0, 0.0, 0.0, 0.0, 0.0])
REF = jax.new_ref(np.zeros(6))
KEYS = jax.random.split(jax.random.key(0), 6)

FOLLOWED = {
    'nothing': lambda p, h: h,
    'a layer': lambda p, h: jnp.tanh(h @ p['b']),
    'a residual layer': lambda p, h: h + jnp.tanh(h @ p['b']),
    'a layer used twice': lambda p, h: jnp.tanh(h @ p['b']) @ p['b'],
    'a layer and its transpose': lambda p, h: jnp.tanh(h @ p['b']) @ p['b'].T,
    'a symmetric matrix': lambda p, h: h @ (p['b'] + p['b'].T),
    'equal numbers': lambda p, h: h * jnp.full(6, 2.0) + np.ones((4, 6)),
    'softmax': lambda p, h: jax.nn.softmax(h),
    'normalisation': lambda p, h: jax.nn.standardize(h) * p['v'],
    'logsumexp': lambda p, h: h - jax.nn.logsumexp(h, axis=1, keepdims=True),
    'gelu': lambda p, h: jax.nn.gelu(h),
    'comparison': lambda p, h: jnp.where(h > p['v'], h, 0.0).astype(jnp.float32) * (h != 0),
    'pairs of features': lambda p, h: h * jnp.sum(h[:, :, None] > h[:, None, :], 2),
    'merged pairs': lambda p, h: h * (
        jnp.einsum('bi,bj->bij', h, h).reshape(4, 36) @ p['b'].T.reshape(36, 1)
    ),
    'a reshape and back': lambda p, h: h.reshape(24).reshape(4, 6),
    'a transpose': lambda p, h: jnp.swapaxes(h.T[:, None], 0, 2)[:, 0],
    'a repetition': lambda p, h: jnp.repeat(h, 2, 1).reshape(4, 6, 2).sum(2),
    'a tile': lambda p, h: jnp.tile(h, (1, 2)).reshape(4, 2, 6).sum(1),
    'a stack': lambda p, h: jnp.stack([h, h @ p['b']], 1).reshape(4, 12).reshape(4, 2, 6).sum(1),
    'a joint taken apart': lambda p, h: (
        jnp.split(jnp.concatenate([h, h @ p['b']], 1), 2, 1)[1] + jnp.concatenate([h, h], 1)[:, 6:]
    ),
    'a joint and back': lambda p, h: jnp.concatenate([h, h], 1).reshape(4, 2, 6).max(1),
    'joined samples': lambda p, h: jnp.concatenate([h[:2], h[1:2], h[::-1][:1]]),
    'padded samples': lambda p, h: jnp.pad(h, ((1, 0), (0, 0)))[:4],
    'sums over samples': lambda p, h: jnp.cumsum(h, 0) + lax.cummax(h, 0) + jnp.sort(h, 0),
    'samples by number': lambda p, h: h[jnp.asarray([3, 1, 1, 0])],
    'a written sample': lambda p, h: h.at[1].add(p['v']) + jnp.zeros((4, 6)).at[2].set(p['v']),
    'a written part': lambda p, h: lax.dynamic_update_slice(h, p['b'][:2] * 0 + p['v'], (1, 0)),
    'a part of samples': lambda p, h: jnp.tile(lax.dynamic_slice(h, (1, 0), (1, 6)), (4, 1)),
    'sums of samples': lambda p, h: jax.ops.segment_sum(h, jnp.asarray([0, 0, 1, 3]), 4),
    'samples pooled': lambda p, h: lax.reduce_window(h, 0.0, lax.add, (2, 1), (1, 1), 'SAME'),
    'samples transformed': lambda p, h: jnp.fft.fft(h, axis=0).real,
    'noise of samples': lambda p, h: h * jax.random.normal(jax.random.key(0), (4, 1)),
    'a loop': lambda p, h: lax.scan(lambda c, _: (jnp.tanh(c @ p['b']), c), h, length=3)[1].sum(0),
    'a loop from zeros': lambda p, h: lax.fori_loop(0, 3, lambda i, c: c + h / (i + 1), h * 0),
    'a loop over layers': lambda p, h: lax.scan(
        lambda c, w: (c + jnp.tanh(c @ w), None), h, p['w']
    )[0],
    'a loop until': lambda p, h: lax.while_loop(
        lambda c: jnp.max(c) < 3, lambda c: c + 1 + p['v'] ** 2, h
    ),
    'either': lambda p, h: lax.cond(is_positive(h), lambda h: h, lambda h: h @ p['b'], h),
    'samples one by one': lambda p, h: jax.vmap(lambda z: jnp.tanh(p['b'] @ z))(h),
    'features one by one': lambda p, h: jax.vmap(lambda z, s: z * s, (1, 0), 1)(h, p['v']),
    'computed again': lambda p, h: jax.checkpoint(jax.jit(jax.nn.relu))(h),
    'each for itself': lambda p, h: lax.conv_general_dilated(
        h[:, None], jnp.tile(p['v'], (1, 1, 1)), (1,), 'SAME',
        dimension_numbers=('NWC', 'WIO', 'NWC'), feature_group_count=6,
    )[:, 0],
    'a convolution': lambda p, h: lax.conv_general_dilated(
        h[:, None], p['w'], (1,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC')
    )[:, 0],
    'a derivative of its own': lambda p, h: with_jvp(lambda t: t * 2)(h),
    'a gradient of its own': lambda p, h: with_vjp(lambda t: jnp.clip(t, -1, 1))(h),
    'what nobody needs': lambda p, h: (h[:, ::-1], jax.debug.print('{}', h[0, 0]), h)[2],
    'a barrier': lambda p, h: lax.optimization_barrier(h),
}  # fmt: skip

STOPPED = {
    'identity matrix': (lambda p, h: h @ (p['b'] + jnp.eye(6)), 'numbered'),
    'numbers that differ': (lambda p, h: h * np.linspace(1, 2, 6), 'no parameters differ'),
    'zeros of two signs': (
        lambda p, h: jnp.where(1 / jnp.asarray(SIGNED_ZEROS) > 0, h, 0.0), 'no parameters differ'
    ),
    'numbered': (lambda p, h: jnp.where(jnp.arange(6) < 3, h, 0.0), 'positions are numbered'),
    'a mask': (lambda p, h: h @ jnp.tril(p['b']), 'positions are numbered'),
    'a diagonal': (lambda p, h: h * jnp.diagonal(p['b']), 'positions are numbered'),
    'a reversal': (lambda p, h: h[:, ::-1], 'reversed'),
    'a part': (lambda p, h: jnp.tile(h[:, :3], (1, 2)), 'a part of it is taken'),
    'a part across a joint': (
        lambda p, h: jnp.concatenate([h, h], 1)[:, 3:9], 'a part of it is taken'
    ),
    'every other of a joint': (
        lambda p, h: jnp.concatenate([h, h], 1)[:, ::2], 'a part of it is taken'
    ),
    'two halves': (lambda p, h: jnp.tile(jnp.multiply(*jnp.split(h, 2, 1)), (1, 2)), 'apart'),
    'each feature': (lambda p, h: jnp.stack([*jnp.unstack(h, axis=1)], 1), 'taken apart'),
    'a roll': (lambda p, h: jnp.roll(h, 1, 1), 'a part of it is taken'),
    'a part by number': (
        lambda p, h: h * lax.dynamic_slice(h, (0, 1), (4, 1)), 'a part of it is taken'
    ),
    'features by number': (lambda p, h: h[:, jnp.asarray([1, 0, 2, 3, 4, 5])], 'by number'),
    'a written feature': (lambda p, h: h.at[:, 1].set(0.0), 'written by number'),
    'written features': (lambda p, h: jnp.zeros((4, 6)).at[:, jnp.arange(6)].add(h), 'by number'),
    'a written part': (
        lambda p, h: lax.dynamic_update_slice(h, h[:, :2], (0, 1)), 'a part of it is'
    ),
    'added features': (
        lambda p, h: jax.ops.segment_sum(h.T, jnp.asarray([0, 0, 1, 1, 2, 2]), 6).T, 'by number'
    ),
    'an order': (lambda p, h: jnp.sort(h, 1), 'sorted'),
    'an order of others': (lambda p, h: h[:, jnp.argsort(p['v'])], 'number'),
    'the largest': (lambda p, h: jnp.tile(lax.top_k(h, 2)[0], (1, 3)), 'largest are chosen'),
    'the position of the largest': (lambda p, h: h * jnp.argmax(h, 1)[:, None], 'told by number'),
    'a running sum': (lambda p, h: jnp.cumsum(h, 1), 'gone through in order'),
    'a running maximum': (lambda p, h: lax.cummax(h, 1), 'gone through in order'),
    'padding': (lambda p, h: jnp.pad(h, ((0, 0), (1, 0)))[:, :6], 'padded'),
    'padding and cutting': (
        lambda p, h: lax.pad(h, np.zeros((), h.dtype), ((0, 0, 0), (1, -1, 0))), 'padded'
    ),
    'a joint': (lambda p, h: jnp.concatenate([h, h[:, :0], p['b'][:4]], 1)[:, 3:9], 'part|joined'),
    'groups': (lambda p, h: h.reshape(4, 2, 3).max(1).repeat(2, 1), '6 positions .* as 2 x 3'),
    'mixed axes': (lambda p, h: h.reshape(6, 4).T, 'mixes its positions|taken apart'),
    'other mixed axes': (lambda p, h: h.reshape(3, 8).max(1).sum() * h, 'taken apart|mixes'),
    'an inner repetition': (
        lambda p, h: (jnp.tile(h, (1, 2)) * jnp.repeat(h, 2, 1)).reshape(4, 2, 6).sum(1),
        'taken apart',
    ),
    'features pooled': (
        lambda p, h: lax.reduce_window(h, 0.0, lax.add, (1, 2), (1, 1), 'SAME'), 'a window moves'
    ),
    'features as space': (
        lambda p, h: lax.conv_general_dilated(h[:, None], p['b'][:1, None, :3] * 0 + 1, (1,),
                                              'SAME')[:, 0],
        'space',
    ),
    'groups of features': (
        lambda p, h: lax.conv_general_dilated(
            h[:, None], p['w'][:, :2], (1,), 'SAME',
            dimension_numbers=('NWC', 'WIO', 'NWC'), feature_group_count=3,
        )[:, 0],
        'in groups',
    ),
    'a transform': (lambda p, h: jnp.fft.fft(h, axis=1).real, 'transformed'),
    'noise': (lambda p, h: h * jax.random.normal(jax.random.key(0), (6,)), 'random numbers differ'),
    'an inverse': (lambda p, h: h @ jnp.linalg.inv(p['b'] + 3), 'followed .*linear_solve'),
    'a loop along features': (
        lambda p, h: lax.scan(lambda c, z: (c + z, c), jnp.zeros(4), h.T)[1].T, 'a loop goes along'
    ),
    'a loop that reverses': (lambda p, h: lax.fori_loop(0, 3, lambda _, c: c[:, ::-1], h), 'rev'),
    'a loop that regroups': (
        lambda p, h: lax.fori_loop(
            0, 3, lambda _, c: c.reshape(4, 2, 3).swapaxes(1, 2).reshape(4, 6), h
        ),
        'taken apart',
    ),
    'a loop that adds numbers': (
        lambda p, h: h * lax.fori_loop(0, 2, lambda _, c: c + jnp.arange(6.0), jnp.zeros(6)),
        'numbered',
    ),
    'a condition on one feature': (
        lambda p, h: lax.while_loop(lambda c: c[0, 0] < 3, lambda c: c + 1, h), 'a part of it'
    ),
    'either in reverse': (
        lambda p, h: lax.cond(is_positive(h), lambda h: h, lambda h: h[:, ::-1], h), 'reversed'
    ),
    'a derivative in reverse': (lambda p, h: with_jvp(lambda t: t[:, ::-1])(h), 'reversed'),
    'a gradient in reverse': (lambda p, h: with_vjp(lambda t: t[:, ::-1])(h), 'reversed'),
    'a derivative of equal numbers': (
        lambda p, h: h * with_jvp(lambda t: t, lambda z: jnp.ones_like(z))(h)[:, ::-1], 'reversed'
    ),
    'a gradient of equal numbers': (
        lambda p, h: h * with_vjp(lambda t: t, lambda z: jnp.ones_like(z))(h)[:, ::-1], 'reversed'
    ),
    'what a reference held': (lambda p, h: h * through_a_ref(h), 'reversed'),
    'a reference from outside': (lambda p, h: h * REF[...], 'cannot be followed'),
    'keys from outside': (lambda p, h: h * jax.vmap(jax.random.normal)(KEYS), 'random'),
    'a callback': (
        lambda p, h: jax.pure_callback(lambda z: z[:, ::-1], h, h), 'cannot be followed'
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def usual_promotion():
    """Programs as users write them."""
    with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
        yield


@pytest.mark.parametrize('middle', FOLLOWED.values(), ids=FOLLOWED)
def test_features_are_followed(middle):
    """They have a name on both sides, and may be permuted."""
    inferred, broken = broken_streams(between(middle), PARAMS, INPUTS)
    assert not broken
    assert inferred.axes['a'] == (None, 'a'), inferred.report
    assert inferred.axes['c'][0] is not None
    assert inferred.axes['c'][1] is None


@pytest.mark.parametrize(('middle', 'reason'), STOPPED.values(), ids=STOPPED)
def test_features_are_stopped(middle, reason):
    """No axis gets a name that may not be permuted; the report says what stopped which."""
    inferred, broken = broken_streams(between(middle), PARAMS, INPUTS)
    assert not broken
    assert inferred.axes['a'] == (None, None)
    assert inferred.axes['c'] == (None, None)
    (line,) = [line for line in inferred.report.splitlines() if 'a axis 1' in line]
    assert line.startswith('no name for ')
    assert re.search(reason, line.partition(': ')[2])
    assert 'test_axis_rules.py' in line
