import contextlib
import dataclasses
import functools
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

from zerojax import perturb, symmetry
from zerojax.perturb import Perturbation, chosen, gaussian, perturb_weights

KEY = jax.random.key(3)


def weights(dtype=jnp.float32):
    return {
        'stem': {'kernel': jnp.ones((3, 3, 4, 16), dtype)},
        'block1_0': {
            'conv': {'kernel': jnp.zeros((3, 3, 16, 64), dtype)},
            'bn': {'scale': jnp.ones(16, dtype), 'bias': jnp.zeros(16, dtype)},
        },
    }


def test_noise_has_the_stated_law():
    """Mean 0 and deviation `scale`, from 9216 zero weights: relative deviation 1 / sqrt(2 n)."""
    noise = np.asarray(quick.jit(gaussian)(weights(), KEY, 1e-3)['block1_0']['conv']['kernel'])
    assert noise.std() == pytest.approx(1e-3, rel=0.03)
    assert abs(noise.mean()) < 4e-3 / np.sqrt(noise.size)
    assert len(np.unique(noise)) > 0.99 * noise.size


def test_only_the_chosen_parameters_change_and_their_noise_is_the_same():
    everywhere = gaussian(weights(), KEY, 1e-2)
    some = gaussian(weights(), KEY, 1e-2, layers='block1_0/(conv|bn/scale)')
    np.testing.assert_array_equal(some['stem']['kernel'], weights()['stem']['kernel'])
    np.testing.assert_array_equal(some['block1_0']['bn']['bias'], jnp.zeros(16))
    for module, name in (('conv', 'kernel'), ('bn', 'scale')):
        actual = some['block1_0'][module][name]
        np.testing.assert_array_equal(actual, everywhere['block1_0'][module][name])
        assert (actual != weights()['block1_0'][module][name]).all()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_same_key_gives_the_same_bits_another_key_others(dtype):
    first, again, other = (
        gaussian(weights(dtype), key, 0.5)['stem']['kernel']
        for key in (KEY, KEY, jax.random.key(4))
    )
    assert first.dtype == dtype
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def changed(before, after):
    """Number of entries that differ in each array, by path."""
    counts = jax.tree.map(lambda x, y: int(np.sum(np.asarray(x) != np.asarray(y))), before, after)
    return {
        '/'.join(str(key.key) for key in path): count
        for path, count in jax.tree_util.tree_flatten_with_path(counts)[0]
        if count
    }


def test_relative_noise_is_relative():
    """And 0 stays 0."""
    params = {'a': jnp.array([1e-6, -1.0, 1e6, 0.0] * 40_000)}
    noisy = quick.jit(lambda params: gaussian(params, KEY, 1e-2, relative=True))(params)['a']
    noisy = np.asarray(noisy).reshape(-1, 4)
    relative = noisy[:, :3] / np.array([1e-6, -1.0, 1e6]) - 1
    np.testing.assert_allclose(relative.std(axis=0), 1e-2, rtol=0.03)
    assert (noisy[:, 3] == 0).all()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_one_noise_serves_all_precisions_and_is_rounded_once(dtype):
    x = jnp.linspace(-2, 2, 999)
    exact = np.asarray(gaussian({'a': x.astype(dtype)}, KEY, 0.1)['a'], np.float64)
    noise = np.asarray(gaussian({'a': jnp.zeros(999)}, KEY, 0.1)['a'])
    expected = jnp.asarray(np.asarray(x.astype(dtype), np.float32) + noise).astype(dtype)
    np.testing.assert_array_equal(exact, np.asarray(expected, np.float64))


def test_float64_keeps_what_float32_would_round_away():
    with jax.enable_x64(True):
        noisy = quick.jit(gaussian)({'a': jnp.ones(100, jnp.float64)}, KEY, 1e-12)['a'] - 1
        assert 0 < float(jnp.abs(noisy).max()) < 1e-11


@pytest.mark.parametrize('layers,expected', [('.*', 20), ('block', 8)])
def test_one_weight_changes_one_that_is_not_zero(layers, expected):
    """By its factor; over many keys every such weight is met, as often as any other."""
    params = {
        'stem': jnp.full((3, 4), 2.0),
        'block': {'kernel': jnp.zeros((5, 5)), 'scale': jnp.full(8, 2.0)},
    }
    one_weight = jax.vmap(lambda key: perturb.one_weight(params, key, 0.25, layers))
    hits = quick.jit(one_weight)(jax.random.split(KEY, 1000 * expected))
    first = jax.tree.map(lambda x: np.asarray(x)[0], hits)
    assert sum(changed(params, first).values()) == 1
    assert max(x.max() for x in jax.tree.leaves(first)) == 2.5

    counts = [(np.asarray(x) == 2.5).sum(axis=0).ravel() for x in jax.tree.leaves(hits)]
    met = np.concatenate(counts)
    met = met[met > 0]
    assert len(met) == expected
    assert met.sum() == 1000 * expected
    assert abs(met - 1000).max() < 4 * np.sqrt(1000)


def test_one_weight_of_none_is_none():
    params = {'a': jnp.zeros(5)}
    assert changed(params, quick.jit(perturb.one_weight)(params, KEY, 0.5)) == {}


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('count', [1, 7, 100])
def test_ulp_moves_as_many_weights_to_the_next_number_above(dtype, count):
    values = np.array([1.0, -1.0, 0.0, 3e-5, -7.25] * 8)
    params = {'a': jnp.asarray(values, dtype), 'b': {'c': jnp.zeros((2, 2), dtype)}}
    after = quick.jit(lambda params: perturb.ulp(params, KEY, count))(params)
    assert changed(params, after) == {'a': min(count, 32)}
    above = jnp.nextafter(params['a'], jnp.asarray(jnp.inf, dtype))
    assert ((after['a'] == params['a']) | (after['a'] == above)).all()


def test_dtypes_may_be_mixed():
    params = {'a': jnp.ones(50, jnp.float32), 'b': jnp.ones(50, jnp.bfloat16)}
    for kind in ('gaussian', 'one_weight', 'ulp'):
        p = Perturbation(kind, 0.0 if kind == 'ulp' else 0.5, count=30 if kind == 'ulp' else 1)
        after = quick.jit(lambda params, p=p: perturb_weights(p, params, KEY, jnp.int32(0)))(params)
        assert [after[k].dtype for k in 'ab'] == [jnp.float32, jnp.bfloat16]
        assert changed(params, after)


@pytest.mark.parametrize('count', [1, 3, 20])
def test_unequal_init_leaves_so_many_unique_features(count):
    axes = {'a': {'kernel': (None, 'x')}, 'b': {'kernel': ('x', 'y'), 'bias': ('y',)}}
    params = {
        'a': {'kernel': jnp.ones((4, 8))},
        'b': {'kernel': jnp.ones((8, 9)), 'bias': jnp.zeros(9)},
    }
    after = quick.jit(lambda params: perturb.unequal_init(params, axes, KEY, 0.1, count))(params)
    assert changed(params, after).keys() == {'a/kernel', 'b/kernel', 'b/bias'}
    kernel = np.asarray(after['b']['kernel'])
    assert len(np.unique(kernel, axis=0)) == min(count, 8)
    assert len(np.unique(kernel, axis=1).T) == min(count, 9)
    np.testing.assert_array_equal(kernel, kernel[np.arange(8) % count][:, np.arange(9) % count])
    assert len(np.unique(np.asarray(after['a']['kernel'])[0])) == min(count, 8)


@pytest.mark.parametrize(
    'kind,every,due',
    [
        ('gaussian', None, {5}), ('gaussian', 0, {5}), ('gaussian', 1, set(range(5, 12))),
        ('gaussian', 3, {5, 8, 11}), ('gaussian', 100, {5}),
        ('activation', None, set(range(5, 12))), ('activation', 0, {5}), ('gradient', 4, {5, 9}),
    ],
)  # fmt: skip
def test_it_is_due_exactly_when_it_should_be(kind, every, due):
    perturbation = Perturbation(kind, 1e-3, at_step=5, every=every)
    assert {step for step in range(12) if perturbation.due(jnp.int32(step))} == due


@pytest.mark.parametrize('kind', ['gaussian', 'one_weight'])
def test_each_time_the_noise_is_new_and_between_nothing_changes(kind):
    perturbation = Perturbation(kind, 1e-3, at_step=1, every=2)
    step_weights = quick.jit(lambda step: perturb_weights(perturbation, weights(), KEY, step))
    seen = [bytes(np.asarray(step_weights(step)['stem']['kernel'])) for step in range(6)]
    plain = bytes(np.asarray(weights()['stem']['kernel']))
    assert [each == plain for each in seen] == [True, False] * 3
    assert len({seen[1], seen[3], seen[5]}) == 3


def test_kind_none_returns_the_weights_themselves():
    params = weights()
    assert perturb_weights(Perturbation(), params, KEY, jnp.int32(0)) is params


def test_chosen_lists_paths():
    assert chosen(weights(), 'stem|.*bias') == ['block1_0/bn/bias', 'stem/kernel']


# Two streams of the same weights, and what neither indexes.
AIMED_AXES = {
    'first': {'kernel': (None, None, 'x')},
    'between': {'kernel': (None, 'x', 'y'), 'bias': ('y',)},
    'second': {'kernel': ('y', 'z')},
    'none': {'kernel': ('z', None), 'bias': (None,)},
}
AIMED_SHAPES = {
    'first': {'kernel': (3, 3, 6)},
    'between': {'kernel': (5, 6, 7), 'bias': (7,)},
    'second': {'kernel': (7, 4)},
    'none': {'kernel': (4, 2), 'bias': (2,)},
}
AIMED_KINDS = {
    'gaussian': Perturbation('gaussian', 0.5),
    'relative': Perturbation('gaussian', 0.5, relative=True),
    'gradient': Perturbation('gradient', 0.5),
    'unequal_init': Perturbation('unequal_init', 0.5, count=2),
    'one_weight': Perturbation('one_weight', 0.5),
}


def aimed_weights(value):
    return jax.tree.map(lambda shape: jnp.full(shape, value), AIMED_SHAPES, is_leaf=is_tuple)


def is_tuple(x):
    return isinstance(x, tuple)


def perturbed_by(p, params, streams, key=KEY):
    """The weights or gradients that the perturbation makes, aimed at these streams."""
    p = dataclasses.replace(p, streams=streams)
    function = perturb.perturb_gradients if p.kind == 'gradient' else perturb_weights
    return _jitted(function, p)(params, key)


@functools.cache
def _jitted(function, p):
    return quick.jit(lambda x, key: function(p, x, key, jnp.int32(0), AIMED_AXES))


@pytest.mark.parametrize('name', AIMED_KINDS)
@pytest.mark.parametrize('streams', [('x',), ('y',), ('z', 'x'), ('x', 'y', 'z')])
def test_aimed_noise_is_the_mean_over_all_other_streams(name, streams):
    """Of the noise that is drawn for all, in every array that the streams index, and in no other.

    Within an array it is one number for all features of another stream.
    """
    p, params = AIMED_KINDS[name], aimed_weights(1.0)
    whole, aimed = perturbed_by(p, params, ()), perturbed_by(p, params, streams)
    if name == 'one_weight':  # of the arrays that are left
        layers = '|'.join(perturb.chosen_but(params, '.*', '', streams, AIMED_AXES))
        whole = perturbed_by(dataclasses.replace(p, layers=rf'({layers})\Z'), params, ())
    for path, x, names in symmetry.named_axes(params, AIMED_AXES):
        full, mean = (np.asarray(tree[path[0]][path[1]], np.float64) - x for tree in (whole, aimed))
        if not set(streams) & set(names.values()):
            assert not mean.any()
            continue
        others = tuple(axis for axis, stream in names.items() if stream not in streams)
        np.testing.assert_allclose(
            mean, np.broadcast_to(full.mean(others, keepdims=True), x.shape), rtol=0, atol=5e-7
        )
        for axis in others:
            assert (mean == np.take(mean, [0], axis)).all()
        if not others:
            np.testing.assert_array_equal(mean, full)


@pytest.mark.parametrize('name', AIMED_KINDS)
def test_aimed_at_all_streams_it_is_what_it_was_wherever_there_are_features(name):
    p, params = AIMED_KINDS[name], aimed_weights(1.0)
    whole = perturbed_by(dataclasses.replace(p, layers='(?!none/bias)'), params, ())
    aimed = perturbed_by(p, params, ('z', 'y', 'x'))
    assert changed(whole, aimed) == {}
    assert changed(params, whole)


def test_one_weight_shares_its_scale_among_all_that_must_stay_equal():
    """By 1 + scale / n each; those that are 0 stay so and none of them is met."""
    params = aimed_weights(2.0)
    params['between']['kernel'] = params['between']['kernel'].at[:, 1:].set(0)
    p = Perturbation('one_weight', 0.5, layers='between/kernel', streams=('x',))
    for key in jax.random.split(KEY, 5):
        kernel = np.asarray(perturbed_by(p, params, ('x',), key)['between']['kernel'])
        assert (kernel[:, 1:] == 0).all()
        assert sorted(np.unique(kernel[:, 0]).tolist()) == [2.0, np.float32(2 * (1 + 0.5 / 7))]
        assert (kernel[:, 0] != 2).sum() == 7


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_features_of_several_orbits_stay_equal_within_each(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), aimed_weights(1.0))
    orbit = jnp.array([1, 1, 3, 3, 1, 0, 3], dtype)
    params['between']['kernel'] *= orbit[None, None, :]
    for name in ('gaussian', 'relative', 'gradient'):
        kernel = np.asarray(perturbed_by(AIMED_KINDS[name], params, ('x',))['between']['kernel'])
        for alike in ([0, 1, 4], [2, 3, 6]):
            assert (kernel[..., alike] == kernel[..., alike[:1]]).all()
        assert (kernel[:, 0] != kernel[:, 1]).any()


def test_streams_are_refused_where_they_cannot_be_told():
    params, streams = aimed_weights(1.0), ('x', 'w')
    message = r"streams=\('x', 'w'\): 'w' is no stream of this network; must be of x, y, z, or"
    for p in AIMED_KINDS.values():
        with pytest.raises(ValueError, match=message):
            perturbed_by(p, params, streams)
    p = Perturbation('gaussian', 0.1, streams=('x',), at_step=1)
    message = r"streams=\('x',\): needs feature_axes"
    with pytest.raises(ValueError, match=message):
        perturb_weights(p, params, KEY, jnp.int32(0))
    with pytest.raises(ValueError, match=message):
        perturb.as_transformation(p)
    p = dataclasses.replace(p, kind='gradient')
    with pytest.raises(ValueError, match=message):
        perturb.perturb_gradients(p, params, KEY, jnp.int32(0))
    perturb.as_transformation(Perturbation(streams=('x',)))


@pytest.mark.parametrize('kind', ['gaussian', 'gradient'])
def test_in_an_optax_chain_streams_are_chosen_too(kind):
    p = Perturbation(kind, 0.1, at_step=1, streams=('y',))
    tx = perturb.as_transformation(p, seed=4, feature_axes=AIMED_AXES)
    params = aimed_weights(1.0)
    update = quick.jit(tx.update)
    updates, state = update(params, tx.init(params), params)
    if kind == 'gradient':
        updates, state = update(params, state, params)
    moved = changed(params, updates)
    assert moved.keys() == {'between/kernel', 'between/bias', 'second/kernel'}
    broken = symmetry.asymmetry_by_stream(updates, AIMED_AXES)
    assert {name for name, value in broken.items() if value > 0} == {'y'}


class Stack(nn.Module):
    """A model that zerojax does not ship: two convolutions and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), name='first')(x)
        x = nn.Conv(5, (3, 3), name='second')(x)
        return nn.Dense(3, name='head')(x.mean(axis=(1, 2)))


STACK_AXES = {
    'first': {'kernel': (None, None, None, 'a'), 'bias': ('a',)},
    'second': {'kernel': (None, None, 'a', 'b'), 'bias': ('b',)},
    'head': {'kernel': ('b', None), 'bias': (None,)},
}


IMAGES = np.random.default_rng(9).normal(size=(8, 12, 12, 2)).astype(np.float32)


RNG = np.random.default_rng(10)
STACK_PARAMS = {
    'first': {'kernel': RNG.normal(size=(3, 3, 2, 6)), 'bias': RNG.normal(size=6)},
    'second': {'kernel': RNG.normal(size=(3, 3, 6, 5)), 'bias': RNG.normal(size=5)},
    'head': {'kernel': RNG.normal(size=(5, 3)), 'bias': RNG.normal(size=3)},
}
STACK_PARAMS = jax.tree.map(lambda x: np.float32(x / np.sqrt(x[..., 0].size)), STACK_PARAMS)


def stack(params, perturbation=None, key=KEY):
    """Sum of squares of the logits, and the outputs of the layers."""
    context = contextlib.nullcontext()
    if perturbation is not None:
        context = perturb.perturbed_outputs(perturbation, STACK_AXES, key)
    with context:
        logits, captured = Stack().apply(
            {'params': params}, IMAGES, capture_intermediates=True, mutable=['intermediates']
        )
    outputs = {k: v['__call__'][0] for k, v in captured['intermediates'].items() if k != '__call__'}
    return jnp.sum(logits**2), outputs


jitted_stack = quick.jit(stack, static_argnums=1)


def stack_outputs(perturbation=None, key=KEY):
    return jitted_stack(STACK_PARAMS, perturbation, key)[1]


def test_layers_with_output_features_are_found_from_the_declaration():
    assert perturb.output_layers(STACK_AXES) == {
        'first': 'first/kernel', 'second': 'second/kernel',
    }  # fmt: skip


@pytest.mark.parametrize('kind,scale', [('activation', 1e-3), ('dropout', 0.3), ('disout', 0.3)])
def test_only_the_chosen_layer_is_perturbed_and_what_follows_from_it(kind, scale):
    plain = stack_outputs()
    second = stack_outputs(Perturbation(kind, scale, layers='second'))
    assert changed(plain, second).keys() == {'second', 'head'}
    both = stack_outputs(Perturbation(kind, scale))
    assert changed(plain, both).keys() == {'first', 'second', 'head'}
    again = stack_outputs(Perturbation(kind, scale))
    assert changed(both, again) == {}
    other = stack_outputs(Perturbation(kind, scale), key=jax.random.key(5))
    assert changed(both, other)


@pytest.mark.parametrize('kind,scale', [('activation', 1e-3), ('dropout', 0.3), ('disout', 0.3)])
def test_outputs_of_the_chosen_streams_get_what_they_get_in_any_case(kind, scale):
    plain = stack_outputs()
    aimed = stack_outputs(Perturbation(kind, scale, streams=('b',)))
    assert changed(plain, aimed).keys() == {'second', 'head'}
    assert changed(aimed, stack_outputs(Perturbation(kind, scale, layers='second'))) == {}
    both = stack_outputs(Perturbation(kind, scale))
    assert changed(both, stack_outputs(Perturbation(kind, scale, streams=('b', 'a')))) == {}
    with pytest.raises(ValueError, match='is no stream of this network; must be of a, b, or'):
        stack_outputs(Perturbation(kind, scale, streams=('first',)))


def test_a_kind_that_does_not_act_on_outputs_is_refused_for_them():
    with pytest.raises(ValueError, match="kind='gaussian': must be one of activation, dropout"):
        stack_outputs(Perturbation('gaussian', 1.0))


def test_noise_on_activations_has_the_stated_law():
    plain = stack_outputs()
    noisy = stack_outputs(Perturbation('activation', 1e-2, layers='second'))
    noise = np.asarray(noisy['second'] - plain['second'])
    assert noise.std() == pytest.approx(1e-2, rel=0.03)
    noisy = stack_outputs(Perturbation('activation', 1e-2, layers='second', relative=True))
    relative = np.asarray(noisy['second'] / plain['second'] - 1)
    assert relative.std() == pytest.approx(1e-2, rel=0.03)


def test_backward_noise_changes_gradients_and_no_output():
    perturbation = Perturbation('activation', 1e-3, layers='first', backward=True)
    gradient = quick.jit(jax.grad(stack, has_aux=True), static_argnums=1)
    plain, outputs = gradient(STACK_PARAMS)
    noisy, same = gradient(STACK_PARAMS, perturbation)
    assert changed(outputs, same) == {}
    assert changed(plain, noisy).keys() == {'first/bias', 'first/kernel'}
    # The bias gets the sum of all gradients of its feature.
    noise = np.asarray(noisy['first']['bias'] - plain['first']['bias'])
    assert 0.2 < noise.std() / (1e-3 * np.sqrt(8 * 12 * 12)) < 3


def test_dropout_drops_its_share_and_keeps_the_mean():
    plain = stack_outputs()
    dropped = stack_outputs(Perturbation('dropout', 0.3, layers='second'))
    kept = np.asarray(dropped['second'] != 0)
    assert kept.mean() == pytest.approx(0.7, abs=0.03)
    np.testing.assert_allclose(
        dropped['second'][kept], np.asarray(plain['second'])[kept] / 0.7, rtol=1e-6
    )


@pytest.mark.parametrize('size,rate', [(16, 0.1), (12, 0.3), (4, 0.2)])
def test_disout_distorts_whole_blocks_by_weak_noise(size, rate):
    shape = (64 * (16 // size) ** 2, size, size, 8)
    x = np.random.default_rng(1).normal(9, 1, shape).astype(np.float32)
    y = np.asarray(quick.jit(perturb.disout)(x, KEY, rate))
    kept_share = 1 - np.mean(y < 1)
    distorted = y < 1
    np.testing.assert_allclose(y[~distorted], x[~distorted] / kept_share, rtol=1e-5)
    assert np.std(y[distorted]) == pytest.approx(0.01 * np.std(x) / kept_share, rel=0.05)
    # Blocks overlap, so the share lies below the rate, and not far.
    assert 0.6 * rate < 1 - kept_share < 1.1 * rate
    # Every distorted place belongs to a distorted block.
    block = min(perturb.DISOUT_BLOCK, size)
    windows = np.lib.stride_tricks.sliding_window_view(distorted, (block, block), axis=(1, 2))
    whole = windows.all(axis=(-1, -2))
    covered = np.zeros_like(distorted)
    for i in range(block):
        for j in range(block):
            covered[:, i : i + whole.shape[1], j : j + whole.shape[2]] |= whole
    np.testing.assert_array_equal(covered, distorted)


def test_disout_without_space_distorts_single_entries_and_rate_0_none():
    x = np.random.default_rng(1).normal(9, 1, (64, 300)).astype(np.float32)
    disout = quick.jit(perturb.disout)
    assert np.mean(np.asarray(disout(x, KEY, 0.2)) < 1) == pytest.approx(0.2, abs=0.01)
    np.testing.assert_array_equal(disout(x, KEY, 0.0), x)


@pytest.mark.parametrize('strength', [0.0, 0.05, 0.5])
def test_disout_has_the_strength_that_is_asked_for(strength):
    x = np.random.default_rng(1).normal(9, 1, (64, 300)).astype(np.float32)
    p = Perturbation('disout', 0.2, strength=strength)
    y = np.asarray(quick.jit(functools.partial(perturb.perturb_output, p))(x, KEY))
    distorted = np.abs(y) < 5
    assert distorted.mean() == pytest.approx(0.2, abs=0.01)
    expected = strength * x.std() / (1 - distorted.mean())
    assert y[distorted].std() == pytest.approx(expected, rel=0.05)


def test_noise_on_gradients_is_relative():
    grads = {'a': jnp.array([1e-6, -1.0, 0.0] * 5000), 'b': jnp.ones(3)}
    p = Perturbation('gradient', 1e-7 * 100, layers='a')
    noisy = quick.jit(lambda grads: perturb.perturb_gradients(p, grads, KEY, jnp.int32(4)))(grads)
    assert changed(grads, noisy).keys() == {'a'}
    relative = np.asarray(noisy['a'] / jnp.where(grads['a'] == 0, 1, grads['a'])).reshape(-1, 3)
    np.testing.assert_allclose(relative[:, :2].std(axis=0), 1e-5, rtol=0.05)
    assert (relative[:, 2] == 0).all()


def test_in_an_optax_chain_weights_are_perturbed_after_so_many_updates():
    """Up to the rounding of the sum, and by the noise of the plain function."""
    p = Perturbation('gaussian', 1e-2, at_step=3)
    tx = optax.chain(optax.sgd(0.1), perturb.as_transformation(p, seed=4))
    plain = optax.sgd(0.1)
    params = plain_params = {'a': jnp.linspace(-1, 1, 50)}
    state, plain_state = tx.init(params), plain.init(params)
    for step in range(1, 6):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
        updates, plain_state = plain.update(plain_params, plain_state, plain_params)
        plain_params = optax.apply_updates(plain_params, updates)
        if step < 3:
            np.testing.assert_array_equal(params['a'], plain_params['a'])
        if step == 3:
            expected = perturb_weights(p, plain_params, jax.random.key(4), jnp.int32(3))
            np.testing.assert_allclose(params['a'], expected['a'], atol=1e-7)
            plain_params = params
    np.testing.assert_array_equal(params['a'], plain_params['a'])


def test_in_an_optax_chain_gradients_are_perturbed_before_all_else():
    p = Perturbation('gradient', 1e-3)
    tx = optax.chain(perturb.as_transformation(p, seed=4), optax.sgd(0.1))
    grads = {'a': jnp.ones(50)}
    updates, _ = tx.update(grads, tx.init(grads), grads)
    expected = perturb.perturb_gradients(p, grads, jax.random.key(4), jnp.int32(0))
    np.testing.assert_array_equal(updates['a'], -0.1 * expected['a'])


class Layer(typing.NamedTuple):
    kernel: jax.Array
    bias: jax.Array


def pytrees():
    """Trees of all kinds of containers, each with the nested dictionaries of the same paths."""
    x, y = jnp.linspace(1, 2, 12).reshape(3, 4), jnp.linspace(-2, -1, 4)
    return {
        'one array': (x, {'': x}),
        'list': ([x, y], {'0': x, '1': y}),
        'tuple': ((y, (x,)), {'0': y, '1': {'0': x}}),
        'named tuple': (Layer(x, y), {'kernel': x, 'bias': y}),
        'mixed': (
            {'b': [Layer(x, y), None], 'a': {}, 'c': (y,)},
            {'b': {'0': {'kernel': x, 'bias': y}}, 'c': {'0': y}},
        ),
        'keys in another order': ({'a-1': x, 'a': [y]}, {'a-1': x, 'a': {'0': y}}),
    }


@pytest.mark.parametrize('name', pytrees())
@pytest.mark.parametrize(
    'p',
    [
        Perturbation('gaussian', 0.5, at_step=1), Perturbation('one_weight', 0.5, at_step=1),
        Perturbation('ulp', at_step=1, count=5), Perturbation('gradient', 0.5, at_step=0),
        Perturbation('gaussian', 0.5, at_step=1, layers='(b/)?(0|kernel)'),
    ],
    ids=lambda p: f'{p.kind}-{p.layers}',
)  # fmt: skip
def test_any_pytree_is_perturbed_as_nested_dictionaries_of_its_paths(name, p):
    """In a chain, by bits; the tree keeps its form."""
    tree, nested = pytrees()[name]
    updated = []
    for params in (tree, nested):
        tx = perturb.as_transformation(p, seed=2)
        updates, _ = tx.update(params, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        updated.append(dict(zip(perturb.paths_of(updates), jax.tree.leaves(updates), strict=True)))
    assert updated[0].keys() == updated[1].keys()
    for path, x in updated[0].items():
        np.testing.assert_array_equal(x, updated[1][path])
    assert perturb.chosen(tree, '.*') == perturb.chosen(nested, '.*')
    matches = perturb.is_chosen(tree, '.*(0|kernel)$')
    assert jax.tree.structure(matches) == jax.tree.structure(tree)


@pytest.mark.parametrize('kind', perturb.WEIGHT_KINDS)
@pytest.mark.parametrize('layers,frozen', [('.*', 'b/(kernel|x)'), ('b|c', '.*kernel')])
def test_what_is_frozen_is_not_perturbed_and_the_rest_as_if_nothing_were(kind, layers, frozen):
    params = {
        'a': {'kernel': jnp.ones((3, 4))}, 'b': {'kernel': jnp.ones((3, 4)), 'bias': jnp.ones(4)},
        'c.': {'kernel': jnp.ones(4)}, 'c': {'bias': jnp.ones(5)},
    }  # fmt: skip
    axes = jax.tree.map(lambda x: (None,) * x.ndim, params)
    scale = {} if kind == 'ulp' else {'scale': 0.5}
    p = Perturbation(
        kind, layers=layers, count=50 if kind in ('ulp', 'unequal_init') else 1, **scale
    )
    perturbed = [
        perturb_weights(p, params, KEY, jnp.int32(0), axes, frozen=each) for each in ('', frozen)
    ]
    held = perturb.is_chosen(params, frozen)
    found = changed(params, perturbed[1])
    assert found and not found.keys() & set(perturb.chosen(params, frozen))
    if kind != 'one_weight':  # where another one takes its place
        expected = jax.tree.map(lambda h, x, y: x if h else y, held, params, perturbed[0])
        jax.tree.map(np.testing.assert_array_equal, perturbed[1], expected)


@pytest.mark.parametrize(
    'p,message',
    [
        (Perturbation('dropout', 0.1), "kind='dropout': acts on outputs"),
        (Perturbation('order'), "kind='order': acts within layers; use step.order.reordered_sums"),
        (Perturbation('gaussian', 0.1), 'at_step=0: the initial weights come before'),
    ],
)
def test_what_a_chain_cannot_do_is_refused(p, message):
    with pytest.raises(ValueError, match=message):
        perturb.as_transformation(p)


@pytest.mark.parametrize(
    'field,arguments',
    [
        ('kind', {'kind': 'ulps'}), ('scale', {'scale': -1.0}), ('scale', {'scale': float('nan')}),
        ('scale', {'scale': float('inf')}), ('scale', {'kind': 'dropout', 'scale': 1.0}),
        ('scale', {'kind': 'ulp', 'scale': 1e-3}), ('at_step', {'at_step': -1}),
        ('at_step', {'kind': 'unequal_init', 'at_step': 1}), ('every', {'every': -1}),
        ('every', {'kind': 'unequal_init', 'every': 1}), ('layers', {'layers': '('}),
        ('relative', {'kind': 'ulp', 'relative': True}), ('count', {'count': 0}),
        ('count', {'kind': 'gaussian', 'count': 2}),
        ('backward', {'kind': 'gradient', 'backward': True}), ('streams', {'streams': 'stem'}),
        ('streams', {'streams': ['stem']}), ('streams', {'streams': (1,)}),
        ('streams', {'kind': 'ulp', 'streams': ('stem',)}),
        ('streams', {'kind': 'order', 'streams': ('stem',)}),
        ('scale', {'kind': 'order', 'scale': 0.1}), ('count', {'kind': 'order', 'count': 2}),
        ('strength', {'kind': 'disout', 'strength': -0.1}),
        ('strength', {'kind': 'gaussian', 'strength': 0.05}),
    ],
)  # fmt: skip
def test_a_bad_field_is_named_with_its_value(field, arguments):
    with pytest.raises(ValueError, match=f'^{field}='):
        Perturbation(**arguments)


DRAWS = {
    'gaussian': Perturbation('gaussian', 0.3),
    'relative': Perturbation('gaussian', 0.3, relative=True),
    'one_weight': Perturbation('one_weight', 0.3),
    'ulp': Perturbation('ulp', count=7),
    'unequal_init': Perturbation('unequal_init', 0.3, count=3),
    'gradient': Perturbation('gradient', 0.3),
    'activation': Perturbation('activation', 0.3),
    'dropout': Perturbation('dropout', 0.3),
    'disout': Perturbation('disout', 0.3),
}


def perturbed(p, scale, x):
    """What the perturbation makes of weights, gradients or an output, with this scale."""
    p = dataclasses.replace(p, scale=scale)
    if p.kind in perturb.OUTPUT_KINDS:
        return [perturb.perturb_output(p, each, KEY) for each in (x, x.reshape(-1, x.shape[-1]))]
    tree, axes = {'kernel': x}, {'kernel': (None, None, 'a', 'b')}
    if p.kind == 'gradient':
        return perturb.perturb_gradients(p, tree, KEY, jnp.int32(0))
    return perturb_weights(p, tree, KEY, jnp.int32(0), axes)


@pytest.mark.parametrize('name', DRAWS)
@pytest.mark.parametrize('traced', [False, True])
def test_64_bit_numbers_change_no_draw(name, traced):
    """Neither where the scale is known nor where a program is handed it in float64."""
    p, x = DRAWS[name], jnp.ones((4, 8, 8, 32))
    function = functools.partial(perturbed, p)
    scales = [p.scale]
    if traced:
        function, scales = quick.jit(function), [np.float32(p.scale), np.float64(p.scale)]
        if p.kind == 'ulp':
            pytest.skip('has no scale')
    usual = function(scales[0], x)
    with jax.enable_x64(True):
        other = function(scales[-1], x)
        wide = function(scales[-1], x.astype(jnp.float64))
    one_float = 1e-6 if traced else 0
    for a, b, c in zip(*map(jax.tree.leaves, (usual, other, wide)), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        assert c.dtype == jnp.float64
        np.testing.assert_array_equal(a == 0, b == 0)
        np.testing.assert_array_equal(a == 1, b == 1)
        np.testing.assert_allclose(a, b, rtol=one_float, atol=0)
        if p.kind != 'ulp':
            np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-7)


def test_disout_keeps_what_float64_has_and_float32_has_not():
    with jax.enable_x64(True):
        x = jnp.full((2, 8, 8, 3), 1 + 1e-12, jnp.float64)
        assert (perturb.disout(x, KEY, 0.0) == x).all()
