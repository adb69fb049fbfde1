import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from zerojax import models
from zerojax.models import layers


def variables_of(model, shape=(1, 8, 8, 3)):
    return model.init(jax.random.key(0), jnp.zeros(shape), train=False)


def test_parameter_count_of_the_papers_network():
    """17,115,390 in PyTorch, less the 3 unused numbers ('scale', 'biases') of each of 12 blocks."""
    model = models.create('constnet', depth=16, width=10, num_classes=10)
    shapes = jax.eval_shape(lambda: variables_of(model))['params']
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 17_115_390 - 3 * 12


@pytest.mark.parametrize('convolve', [layers.convolve_direct, layers.convolve_patches])
@pytest.mark.parametrize('size,stride', [(3, 1), (3, 2), (1, 1), (1, 2)])
@pytest.mark.parametrize('side', [7, 8])
def test_convolution_is_the_sum_over_taps(convolve, size, stride, side):
    """Against the definition, in float64; padding k // 2 on both sides as in PyTorch."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, side, side, 3)), rng.normal(size=(size, size, 3, 5))
    pad = size // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    out = (side + 2 * pad - size) // stride + 1
    expected = np.zeros((2, out, out, 5))
    for i in range(out):
        for j in range(out):
            window = padded[:, i * stride : i * stride + size, j * stride : j * stride + size]
            expected[:, i, j] = np.einsum('bhwc,hwcd->bd', window, kernel)
    with jax.enable_x64(True):
        actual = convolve(jnp.asarray(x), jnp.asarray(kernel), stride)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)


NETWORKS = {
    'constnet': {'name': 'constnet', 'depth': 10, 'width': 1, 'init': 'random'},
    'constnet, width 2': {'name': 'constnet', 'depth': 7, 'width': 2, 'init': 'random'},
    'leakynet': {'name': 'leakynet', 'depth': 13, 'width': 1, 'init': 'h_hhh_hhh_hhh'},
    'mlp': {'name': 'mlp', 'width': 12, 'init': 'random'},
    'wideresnet': {'name': 'wideresnet', 'depth': 10, 'width': 1, 'init': 'he'},
    'fixup, width 2': {'name': 'wideresnet', 'depth': 16, 'width': 2, 'init': 'fixup'},
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS)
def network(request):
    return models.create(**request.param)


def test_feature_axes_describe_every_variable(network):
    variables = flatten_dict(jax.eval_shape(lambda: variables_of(network)))
    axes = flatten_dict(network.feature_axes())
    assert variables.keys() == axes.keys()
    sizes = {}
    for path, x in variables.items():
        assert x.ndim == len(axes[path])
        for name, size in zip(axes[path], x.shape, strict=True):
            assert name is None or sizes.setdefault(name, size) == size


def test_permuting_the_features_of_one_name_changes_nothing(network):
    """What the declaration means: it names exactly the axes that a permutation must act on."""
    variables = variables_of(network)
    leaves, tree = jax.tree.flatten(variables)
    noise = np.random.default_rng(0)
    variables = jax.tree.unflatten(
        tree, [x + jnp.asarray(noise.uniform(0.1, 0.5, x.shape), x.dtype) for x in leaves]
    )
    images = jnp.asarray(noise.normal(size=(4, 8, 8, 3)), jnp.float32)
    logits = jax.jit(lambda variables: network.apply(variables, images, train=False))
    expected = logits(variables)
    assert np.ptp(expected) > 0.01
    axes = flatten_dict(network.feature_axes())
    for name in {name for names in axes.values() for name in names if name}:
        permuted = {}
        for path, x in flatten_dict(variables).items():
            for axis, its_name in enumerate(axes[path]):
                if its_name == name:
                    x = jnp.flip(x, axis)
            permuted[path] = x
        nested = {'params': {}, 'batch_stats': {}}
        for path, x in permuted.items():
            target = nested
            for key in path[:-1]:
                target = target.setdefault(key, {})
            target[path[-1]] = x
        np.testing.assert_allclose(logits(nested), expected, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize('shape', [(9, 9, 1), (28, 28, 1), (32, 32, 3), (5, 7, 4)])
def test_images_of_any_size_and_number_of_channels(network, shape):
    """The strides halve the size twice, rounding up; the mean over space takes what is left."""
    images = jnp.zeros((2, *shape))
    shapes = jax.eval_shape(
        lambda: network.init_with_output(
            jax.random.key(0), images, train=False, capture_intermediates=True
        )
    )
    logits, variables = shapes
    assert logits.shape == (2, 10)
    if isinstance(network, models.MLP):
        assert variables['params']['hidden']['kernel'].shape == (np.prod(shape), 12)
    else:
        (last,) = variables['intermediates'][network.layers()[-1]]['__call__']
        assert last.shape[1:3] == (-(-shape[0] // 4), -(-shape[1] // 4))


def test_layers_are_the_submodules_in_order(network):
    variables = jax.eval_shape(lambda: variables_of(network))
    assert set(network.layers()) <= variables['params'].keys()
    assert network.layers()[0] in ('stem', 'hidden')


def test_the_noise_axis_lies_between_constnet_and_random_control():
    def kernels(**arguments):
        params = variables_of(models.create('constnet', depth=7, width=1, **arguments))['params']
        return (
            params['stem']['kernel'],
            params['block2_0']['conv']['kernel'],
            params['block2_0']['shortcut']['kernel'],
        )

    stem, conv, shortcut = kernels()
    assert not conv.any()
    noisy_stem, noisy_conv, noisy_shortcut = kernels(sigma_w=0.5)
    np.testing.assert_array_equal(stem, noisy_stem)
    np.testing.assert_array_equal(shortcut, noisy_shortcut)
    variance = 2 * 0.5 / (9 * 32)
    assert np.var(noisy_conv) == pytest.approx(variance, rel=5 * (2 / conv.size) ** 0.5)
    random, half = kernels(init='random'), kernels(init='random', sigma_w=0.25)
    for whole, part in zip(random, half, strict=True):
        np.testing.assert_allclose(part, whole / 2, rtol=1e-6)


def test_a_pair_of_leakynet_blocks_computes_minus_x():
    """Even block, then odd block, before the odd block's BatchNorm."""
    model = models.create('leakynet', depth=10, width=1, init='1_ii_11_11')
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    variables = variables_of(model)
    _, state = model.apply(
        variables, images, train=False, mutable='intermediates', capture_intermediates=True
    )
    captured = state['intermediates']
    (stem,) = captured['stem']['__call__']
    (out,) = captured['block1_1']['__call__']
    # At the start BatchNorm in evaluation mode only divides by sqrt(1 + epsilon).
    np.testing.assert_allclose(out, -stem / np.sqrt(1 + 1e-5), rtol=1e-5, atol=1e-6)


def test_leakynet_normalizes_behind_odd_blocks_counted_over_all_stages():
    model = models.create('leakynet', depth=13, width=1, init='1_iii_iii_iii')
    assert set(variables_of(model)['batch_stats']) == {
        'block1_1', 'block2_0', 'block2_2', 'block3_1',
    }  # fmt: skip


@pytest.mark.parametrize(
    'init,message',
    [
        ('1_ii_ix_11', r"init='1_ii_ix_11': block 3, letter 'x': must be one of '1' averaging"),
        ('x_ii_ii_11', r"init='x_ii_ii_11': the stem, letter 'x'"),
        ('1_ii_ii_1', r"init='1_ii_ii_1': has 6 letters; depth=10 needs 7, one for the stem"),
        ('', r"init='': has 0 letters"),
    ],
)
def test_a_bad_init_string_is_refused_letter_by_letter(init, message):
    with pytest.raises(ValueError, match=message):
        models.create('leakynet', depth=10, width=1, init=init)


@pytest.mark.parametrize('unique', [1, 3, None])
def test_the_toy_has_the_chosen_number_of_unique_features_and_keeps_them(unique):
    model = models.create('mlp', width=12, init='random', unique_features=unique)
    images = jax.random.normal(jax.random.key(1), (16, 8, 8, 1))
    params = variables_of(model, images.shape)['params']
    labels = jax.nn.one_hot(jnp.arange(16) % 10, 10)

    def loss(params):
        logits = model.apply({'params': params}, images, train=True)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * labels, axis=1))

    before = loss(params)
    for _ in range(3):
        grads = jax.jit(jax.grad(loss))(params)
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
    assert loss(params) < before
    features = np.concatenate([params['hidden']['kernel'], params['head']['kernel'].T])
    assert len(np.unique(features, axis=1).T) == (unique or 12)


def test_fixup_starts_as_its_skip_connections():
    """Rule 1: the last convolution of each branch is 0, so a branch adds nothing."""
    model = models.create('wideresnet', depth=10, width=1, init='fixup')
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    _, state = model.apply(
        variables_of(model), images, train=True, mutable='intermediates', capture_intermediates=True
    )
    captured = state['intermediates']
    np.testing.assert_array_equal(
        captured['block1_0']['__call__'][0], captured['stem']['__call__'][0]
    )


@pytest.mark.parametrize('name,init', [('leakynet', '1_1_1_1'), ('wideresnet', 'he')])
def test_dropout_acts_in_every_network_that_has_it(name, init):
    depth = {'leakynet': 7, 'wideresnet': 10}[name]
    model = models.create(name, depth=depth, width=1, init=init, dropout=0.5)
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    variables = variables_of(model)
    variables['params']['head']['kernel'] += jax.random.normal(jax.random.key(2), (64, 10))

    def logits(seed):
        rngs = {'dropout': jax.random.key(seed)}
        return model.apply(variables, images, train=True, mutable=['batch_stats'], rngs=rngs)[0]

    assert (logits(0) == logits(0)).all()
    assert (logits(0) != logits(1)).any()


def test_dropout_behind_the_stem_only():
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))

    def zeros(dropout_at):
        model = models.create('constnet', depth=7, width=1, dropout=0.5, dropout_at=dropout_at)
        _, state = model.apply(
            variables_of(model),
            images,
            train=True,
            mutable=['batch_stats', 'intermediates'],
            capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
            rngs={'dropout': jax.random.key(0)},
        )
        return {
            path[:-1]: float(jnp.mean(output[0] == 0))
            for path, output in flatten_dict(state['intermediates']).items()
        }

    assert zeros('stem') == {('Dropout_0',): pytest.approx(0.5, abs=0.05)}
    assert {path[0] for path in zeros('blocks')} == {'block1_0', 'block2_0', 'block3_0'}


def test_logits_are_zero_and_features_constant_at_the_start():
    model = models.create('constnet', depth=10, width=1)
    variables = variables_of(model)
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    logits, state = model.apply(
        variables,
        images,
        train=True,
        mutable=['batch_stats', 'intermediates'],
        capture_intermediates=True,
    )
    assert (logits == 0).all()
    for path, (output,) in flatten_dict(state['intermediates']).items():
        if output.ndim == 4:
            assert (output == output[..., :1]).all(), path


def test_shortcut_reads_before_or_after_the_relu():
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))

    def shortcut_output(shortcut):
        model = models.create('constnet', depth=7, width=1, shortcut=shortcut)
        _, state = model.apply(
            variables_of(model),
            images,
            train=True,
            mutable=['batch_stats', 'intermediates'],
            capture_intermediates=True,
        )
        return state['intermediates']['block2_0']

    after, before = shortcut_output('post_relu'), shortcut_output('pre_relu')
    normalized = before['bn']['__call__'][0]
    np.testing.assert_allclose(
        before['shortcut']['__call__'][0][..., 0], normalized[:, ::2, ::2, 0], atol=1e-6
    )
    np.testing.assert_allclose(
        after['shortcut']['__call__'][0][..., 0],
        np.maximum(normalized[:, ::2, ::2, 0], 0),
        atol=1e-6,
    )


def test_dropout_acts_in_training_only():
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    model = models.create('constnet', depth=7, width=1, init='random', dropout=0.5)
    variables = variables_of(model)
    variables['params']['head']['kernel'] += 1.0

    def logits(seed):
        rngs = {'dropout': jax.random.key(seed)}
        return model.apply(variables, images, train=True, mutable=['batch_stats'], rngs=rngs)[0]

    assert (logits(0) == logits(0)).all()
    assert (logits(0) != logits(1)).any()
    plain = models.create('constnet', depth=7, width=1, init='random')
    np.testing.assert_array_equal(
        model.apply(variables, images, train=False), plain.apply(variables, images, train=False)
    )


@pytest.mark.parametrize(
    'argument,value',
    [
        ('depth', 11), ('depth', 4), ('width', 0), ('num_classes', 0), ('dropout', 1.0),
        ('dropout', -0.1), ('dropout', float('nan')), ('init', 'hee'), ('shortcut', 'relu'),
        ('convolution', 'fft'), ('name', 'resnet'), ('sigma_w', -1.0), ('negative_slope', 0.2),
        ('unique_features', 3), ('dropout_at', 'head'),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named_with_its_value(argument, value):
    arguments = {'name': 'constnet', argument: value}
    with pytest.raises(ValueError, match=f'^{argument}={value!r}: '):
        models.create(**arguments)


LEAKY = {'name': 'leakynet', 'init': '1_1_1_1', 'depth': 7}


@pytest.mark.parametrize(
    'arguments,message',
    [
        ({**LEAKY, 'negative_slope': 1.0}, 'negative_slope=1.0: must be 0, or from 1e-6'),
        ({**LEAKY, 'sigma_w': 0.1}, 'sigma_w=0.1: leakynet with init'),
        ({'name': 'mlp', 'init': 'random', 'width': 4, 'unique_features': 5}, 'unique_features=5'),
        ({'name': 'mlp', 'init': 'he'}, "init='he': must be one of averaging, random"),
        ({'name': 'mlp', 'dropout': 0.1}, 'dropout=0.1: mlp with init'),
        ({'name': 'wideresnet', 'init': 'he', 'depth': 13}, r'depth=13: must be 6n \+ 4'),
        ({'name': 'wideresnet', 'depth': 10}, "init='averaging': must be one of he, fixup"),
        ({'name': 'constnet', 'init': 'he', 'sigma_w': 0.1}, 'sigma_w=0.1: constnet with init'),
    ],
)  # fmt: skip
def test_what_a_network_has_no_use_for_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        models.create(**arguments)


@pytest.mark.parametrize('name', ['constnet', 'leakynet', 'wideresnet', 'fixup'])
def test_mixed_precision_keeps_parameters_statistics_and_logits_in_float32(name):
    """And every convolution, forward and backward, computes in bfloat16."""
    arguments = {
        'constnet': {'name': 'constnet', 'depth': 7},
        'leakynet': {'name': 'leakynet', 'depth': 10, 'init': '1_ii_ii_hh'},
        'wideresnet': {'name': 'wideresnet', 'depth': 10, 'init': 'he'},
        'fixup': {'name': 'wideresnet', 'depth': 10, 'init': 'fixup'},
    }[name]
    images = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)
    single = models.create(**arguments, width=1)
    mixed = models.create(**arguments, width=1, dtype='bfloat16')

    def loss(params, model, batch_stats):
        logits, updated = model.apply(
            {'params': params, 'batch_stats': batch_stats}, images, train=True,
            mutable=['batch_stats'],
        )  # fmt: skip
        return jnp.sum(logits**2), (logits, updated)

    with jax.numpy_dtype_promotion('standard'):  # Flax's BatchNorm mixes bfloat16 and float32
        init = jax.jit(functools.partial(mixed.init, train=False))
        variables = init(jax.random.key(0), images)
        params, batch_stats = variables['params'], variables.get('batch_stats', {})
        params['head']['kernel'] += jax.random.normal(jax.random.key(1), (64, 10))
        gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
        grads, (logits, updated) = gradient(params, mixed, batch_stats)
        _, (expected, _) = gradient(params, single, batch_stats)
        jaxpr = str(jax.make_jaxpr(lambda p: gradient(p, mixed, batch_stats))(params))
    for x in jax.tree.leaves((params, grads, logits, updated)):
        assert x.dtype == np.float32
    convolutions = re.findall(r'(\w+)\[[\d,]+\] = conv_general_dilated', jaxpr)
    assert len(convolutions) > 9
    assert set(convolutions) == {'bf16'}
    # bfloat16 rounds to 2^-9, once in each of at most 10 layers.
    scale = np.abs(expected).max()
    assert 0 < np.abs(logits - expected).max() < 10 * 2**-9 * scale
