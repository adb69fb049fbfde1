"""A true declaration passes, a wrong one is named, and an axis that was overlooked is noticed."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from zerojax import models, symmetry

NETWORKS = [
    {'name': 'constnet', 'depth': 7},
    {'name': 'constnet', 'depth': 10, 'shortcut': 'pre_relu', 'convolution': 'patches'},
    {'name': 'leakynet', 'depth': 7, 'init': '1_1_1_1'},
    {'name': 'mlp', 'width': 12, 'init': 'averaging'},
    {'name': 'wideresnet', 'depth': 10, 'init': 'he'},
]


@pytest.mark.parametrize('network', NETWORKS, ids=lambda network: network['name'])
@pytest.mark.parametrize('train', [False, True])
def test_every_shipped_networks_declaration_is_true(network, train):
    """Of the parameters in training, and of the statistics too, which act in evaluation."""
    model = models.create(**{'width': 1} | network)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    variables = model.init(jax.random.key(0), images, train=False)
    axes = model.feature_axes()
    if train:
        statistics = variables.get('batch_stats', {})

        def apply(params, images):
            variables = {'params': params, 'batch_stats': statistics}
            return model.apply(variables, images, train=True, mutable=['batch_stats'])[0]

        variables, axes = variables['params'], axes['params']
    else:
        axes = {name: axes[name] for name in variables}

        def apply(variables, images):
            return model.apply(variables, images, train=False)

    found = symmetry.check_feature_axes(apply, variables, images, axes)
    assert found.streams.keys() == set(symmetry.stream_names(axes))
    assert not found.unseen and not found.unnamed and not found.not_finite
    assert max(found.differences.values()) < 1e-10


class Net(nn.Module):
    """Streams a and b, of as many features; what it returns says so in two of three classes."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(6, name='first')(x))
        x = nn.tanh(nn.Dense(6, name='second')(x))
        return nn.Dense(3, name='head')(x)


AXES = {
    'first': {'kernel': (None, 'a'), 'bias': ('a',)},
    'second': {'kernel': ('a', 'b'), 'bias': ('b',)},
    'head': {'kernel': ('b', None), 'bias': (None,)},
}
X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def apply(params, x):
    return Net().apply({'params': params}, x)


def params():
    return Net().init(jax.random.key(0), X)['params']


def changed(path, names):
    return unflatten_dict(flatten_dict(AXES, sep='/') | {path: names}, sep='/')


def test_a_true_declaration_is_told_in_lines():
    before = jax.config.jax_enable_x64
    found = symmetry.check_feature_axes(apply, params(), X, AXES)
    assert found.streams == {'a': 6, 'b': 6}
    lines = str(found).splitlines()
    assert lines[0] == 'streams that may be permuted: a (6), b (6)'
    assert all(f'{what} ' in lines[1] for what in ('outputs', 'gradients', 'SGD', 'Adam'))
    assert len(lines) == 2
    assert jax.config.jax_enable_x64 == before and jnp.zeros(1).dtype == jnp.float32


@pytest.mark.parametrize(
    'path,names,mended',
    [
        ('second/kernel', ('b', 'a'), r"second/kernel were \('a', .*\), not \('b', 'a'\)"),
        ('second/kernel', (None, 'b'), r"second/kernel were \('a', 'b'\), not \(None, 'b'\)"),
        ('first/bias', (None,), r"first/bias were \('a',\), not \(None,\)"),
        ('first/bias', ('b',), r'first/bias were'),
        ('second/kernel', ('a', 'a'), r"second/kernel were \('a', None\), not \('a', 'a'\)"),
    ],
)
def test_a_wrong_declaration_names_the_stream_and_the_parameter(path, names, mended):
    with pytest.raises(ValueError, match=f"^stream '[ab]': permuting its features .*{mended}"):
        symmetry.check_feature_axes(apply, params(), X, changed(path, names))


def test_an_axis_along_which_the_function_is_not_symmetric_cannot_be_named():
    message = "stream 'classes': permuting its features changes the outputs, most of all the gra"
    wrong = changed('head/bias', ('classes',))
    with pytest.raises(ValueError, match=message):
        symmetry.check_feature_axes(apply, params(), X, wrong)


def test_features_that_are_sliced_are_no_stream():
    """Of a hidden layer only some features are read on."""

    def sliced(params, x):
        return jnp.tanh(x @ params['in'])[:, :4] @ params['out']

    weights = {'in': np.ones((4, 6), np.float32), 'out': np.ones((4, 2), np.float32)}
    axes = {'in': (None, 'h'), 'out': (None, None)}
    with pytest.raises(ValueError, match="stream 'h': permuting its features changes the outputs"):
        symmetry.check_feature_axes(sliced, weights, X, axes)
    # But these may be permuted, by themselves, in both.
    weights['in'] = weights['in'][:, :4]
    assert symmetry.check_feature_axes(sliced, weights, X, {'in': (None, 'h'), 'out': ('h', None)})


def test_shifts_alone_are_no_permutations():
    def shifted(params, x):
        h = jnp.tanh(x @ params['in'])
        return jnp.sum(h * jnp.roll(h, 1, axis=1), axis=1)

    with pytest.raises(ValueError, match="stream 'h'"):
        symmetry.check_feature_axes(shifted, {'in': X.T[:, :4]}, X, {'in': (None, 'h')})


def test_axes_that_could_be_named_are_noticed():
    """Alone, and those of one length together."""
    nameless = {
        name: {kind: (None,) * len(names) for kind, names in layer.items()}
        for name, layer in AXES.items()
    }
    found = symmetry.check_feature_axes(apply, params(), X, nameless)
    a = [('first/bias', 0), ('first/kernel', 1), ('second/kernel', 0)]
    b = [('head/kernel', 0), ('second/bias', 0), ('second/kernel', 1)]
    assert sorted(found.unnamed) == [a, b]
    assert 'could have a name: first/bias axis 0, first/kernel axis 1, second' in str(found)

    def pooled(params, x):
        return jnp.sum(jnp.tanh(x @ params['in']), axis=1)

    found = symmetry.check_feature_axes(pooled, {'in': X.T}, X, {'in': (None, None)})
    assert found.unnamed == [[('in', 1)]]


def test_what_chooses_one_of_equals_is_found_at_equal_features():
    """Which is symmetric at all weights whose features differ."""

    def first_largest(params, x):
        h = jnp.tanh(x @ params['in'])
        return jnp.take_along_axis(h, jnp.argmax(h, axis=1)[:, None], axis=1)

    message = "stream 'h': where its features are equal, the gradients of in along axis 1 are not"
    with pytest.raises(ValueError, match=message):
        symmetry.check_feature_axes(first_largest, {'in': X.T}, X, {'in': (None, 'h')})

    def largest(params, x):  # which hands its gradient to all of them alike
        return jnp.max(jnp.tanh(x @ params['in']), axis=1)

    assert symmetry.check_feature_axes(largest, {'in': X.T}, X, {'in': (None, 'h')}).streams


def test_an_array_without_a_gradient_is_said_to_be_unseen():
    def net(params, x):
        return jnp.tanh(x @ params['in'] + 0 * params['bias'][None]).sum(axis=1)

    weights = {'in': X.T, 'bias': np.ones(5, np.float32)}
    axes = {'in': (None, 'h'), 'bias': ('h',)}
    found = symmetry.check_feature_axes(net, weights, X, axes)
    assert found.unseen == ['bias']
    assert 'gradient 0, seen in outputs only: bias' in str(found)


def test_a_normalisation_without_epsilon_is_not_compared_where_it_is_not_finite():
    def normalised(params, x):
        h = x @ params['in']
        return jnp.sum((h / jnp.std(h, axis=1, keepdims=True)) ** 3, axis=1)

    found = symmetry.check_feature_axes(normalised, {'in': X.T}, X, {'in': (None, 'h')})
    assert found.not_finite == ['h']
    assert 'at equal features of h alone the gradient is not finite' in str(found)


def test_an_embedding_of_words_and_a_model_of_equinox():
    """Integers stay as they are, and a tree of any structure is a tree."""
    mlp = eqx.nn.MLP(8, 3, width_size=7, depth=2, key=jax.random.key(0))
    arrays, rest = eqx.partition(mlp, eqx.is_array)
    table = jnp.ones((11, 8))

    def apply(params, words, mask):
        x = jnp.where(mask[:, None], params['table'][words].sum(axis=1), 0.0)
        return jax.vmap(eqx.combine(params['mlp'], rest))(x)

    def layer(out, source):
        return {'weight': (out, source), 'bias': (out,)}

    layers = [layer('h0', 'c'), layer('h1', 'h0'), layer(None, 'h1')]
    declared = eqx.tree_at(
        lambda mlp: [x for each in mlp.layers for x in (each.weight, each.bias)],
        arrays,
        [each[kind] for each in layers for kind in ('weight', 'bias')],
    )
    inputs = np.arange(12).reshape(4, 3), np.array([True, False, True, True])
    found = symmetry.check_feature_axes(
        apply, {'table': table, 'mlp': arrays}, inputs, {'table': (None, 'c'), 'mlp': declared}
    )
    assert found.streams == {'h0': 7, 'c': 8, 'h1': 7} and not found.unnamed
    wrong = eqx.tree_at(lambda mlp: mlp.layers[0].bias, declared, ('h1',))
    with pytest.raises(ValueError, match='mlp/layers/0/bias were'):
        symmetry.check_feature_axes(
            apply, {'table': table, 'mlp': arrays}, inputs, {'table': (None, 'c'), 'mlp': wrong}
        )


def attention():
    """Of two heads, in Flax, with LayerNorm and a residual branch."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(6)(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
            return nn.Dense(3)(nn.LayerNorm()(x))

    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    return Block().apply, Block().init(jax.random.key(0), x), x, [2, 3, 3, 6]


def convolutions():
    """In Flax, with BatchNorm, a grouped convolution and a maximum."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Conv(6, (3, 3))(x))
            x = nn.Conv(6, (3, 3), feature_group_count=6)(nn.relu(x))
            return nn.Dense(3)(nn.max_pool(x, (2, 2), (2, 2)).mean(axis=(1, 2)))

    x = np.random.default_rng(0).normal(size=(2, 6, 6, 2)).astype(np.float32)
    variables = Network().init(jax.random.key(0), x)

    def apply(params, x):
        variables_of = {**variables, 'params': params}
        return Network().apply(variables_of, x, mutable=['batch_stats'])[0]

    return apply, variables['params'], x, [6]


def equinox():
    mlp = eqx.nn.MLP(4, 3, width_size=7, depth=2, key=jax.random.key(0))
    arrays, rest = eqx.partition(mlp, eqx.is_array)
    return lambda params, x: jax.vmap(eqx.combine(params, rest))(x), arrays, X, [7, 7]


@pytest.mark.parametrize('model', [attention, convolutions, equinox])
def test_what_is_inferred_of_other_peoples_modules_is_true_and_complete(model):
    apply, params, x, sizes = model()
    axes = symmetry.infer_feature_axes(apply, params, x).axes
    with jax.numpy_dtype_promotion('standard'):
        found = symmetry.check_feature_axes(apply, params, x, axes)
    assert sorted(found.streams.values()) == sizes
    assert not found.unnamed and not found.not_finite


@pytest.mark.parametrize(
    'axes,message',
    [
        ({k: v for k, v in AXES.items() if k != 'head'}, 'axes: lacks head/bias, head/kernel$'),
        (AXES | {'tail': (None,)}, 'axes: has tail, which params lacks'),
        (changed('first/kernel', ('a',)), r"first/kernel is \('a',\), which does not fit the sha"),
        (changed('first/kernel', 'xa'), "first/kernel is 'xa'; must be a tuple of names or None"),
        (
            changed('first/kernel', ('a', 'a')),
            "'a': has [46] features in .*, and [46] in first",
        ),
    ],
)
def test_a_declaration_that_does_not_fit_is_a_sentence(axes, message):
    with pytest.raises(ValueError, match=message):
        symmetry.check_feature_axes(apply, params(), X, axes)


@pytest.mark.parametrize(
    'function,message',
    [
        (lambda p, x: (x @ p).astype(jnp.bfloat16), 'apply: rounds to bfloat16, and is checked'),
        (
            lambda p, x: jax.lax.scan(
                lambda c, _: (c + (x @ p).sum(), None), jnp.float32(0), None, 2
            ),
            'apply: fails in float64, in which it is checked',
        ),
        (lambda p, x: jnp.argmax(x @ p, axis=1), 'apply: returns no floats'),
        (lambda p, x: jnp.sqrt(-1 - jnp.square(x @ p)), 'apply: not finite at random weights'),
    ],
)
def test_a_function_that_cannot_be_tried_is_a_sentence(function, message):
    with pytest.raises(ValueError, match=message):
        symmetry.check_feature_axes(function, X.T, X, (None, 'h'))


def test_inputs_may_be_rounded_and_flags_are_not_traced():
    def net(params, x, doubled):
        x = jnp.asarray(x, jnp.float32).astype(jnp.bfloat16)
        h = jnp.tanh(x.astype(params.dtype) @ params).sum(axis=1)
        return 2 * h if doubled else h

    assert symmetry.check_feature_axes(net, X.T, (X, True), (None, 'h')).streams == {'h': 5}


def test_what_is_no_array_is_a_sentence():
    mlp = eqx.nn.MLP(4, 3, width_size=7, depth=1, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r'params: activation is no array but .*partition'):
        symmetry.check_feature_axes(lambda mlp, x: jax.vmap(mlp)(x), mlp, X, mlp)
