import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from zerojax import models


def variables_of(model, shape=(1, 8, 8, 3)):
    return model.init(jax.random.key(0), jnp.zeros(shape), train=False)


def test_parameter_count_of_the_papers_network():
    """17,115,390 in PyTorch, less the 3 unused numbers ('scale', 'biases') of each of 12 blocks."""
    model = models.create('constnet', depth=16, width=10, num_classes=10)
    shapes = jax.eval_shape(lambda: variables_of(model))['params']
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 17_115_390 - 3 * 12


@pytest.mark.parametrize('convolve', [models.convolve_direct, models.convolve_patches])
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


@pytest.mark.parametrize('width', [1, 2])
@pytest.mark.parametrize('depth', [7, 10])
def test_feature_axes_describe_every_variable(depth, width):
    model = models.create('constnet', depth=depth, width=width)
    variables = flatten_dict(variables_of(model))
    axes = flatten_dict(model.feature_axes())
    assert variables.keys() == axes.keys()
    sizes = {}
    for path, x in variables.items():
        assert x.ndim == len(axes[path])
        for name, size in zip(axes[path], x.shape, strict=True):
            assert name is None or sizes.setdefault(name, size) == size


@pytest.mark.parametrize('width', [1, 2])
def test_permuting_the_features_of_one_name_changes_nothing(width):
    """What the declaration means: it names exactly the axes that a permutation must act on."""
    model = models.create('constnet', depth=7, width=width, init='random')
    variables = variables_of(model)
    leaves, tree = jax.tree.flatten(variables)
    noise = np.random.default_rng(0)
    variables = jax.tree.unflatten(
        tree, [x + jnp.asarray(noise.uniform(0.1, 0.5, x.shape), x.dtype) for x in leaves]
    )
    images = jnp.asarray(noise.normal(size=(4, 8, 8, 3)), jnp.float32)
    expected = model.apply(variables, images, train=False)
    axes = flatten_dict(model.feature_axes())
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
        np.testing.assert_allclose(
            model.apply(nested, images, train=False), expected, rtol=2e-5, err_msg=name
        )


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
        ('dropout', -0.1), ('dropout', float('nan')), ('init', 'he'), ('shortcut', 'relu'),
        ('convolution', 'fft'), ('name', 'resnet'),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named_with_its_value(argument, value):
    arguments = {'name': 'constnet', argument: value}
    with pytest.raises(ValueError, match=f'^{argument}={value!r}: '):
        models.create(**arguments)
