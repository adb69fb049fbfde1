"""From anyone's function and weights to the onset of training, in whatever library."""

import pathlib
import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from zerojax import own_model, symmetry
from zerojax.measure import prediction
from zerojax.measure.stability import predict_onset

STEPS = 40
CONSTANT = nn.initializers.constant


@pytest.fixture(autouse=True)
def standard_promotion():
    """As users have it."""
    with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
        yield


def batches(count=STEPS):
    rng = np.random.default_rng(3)
    means, labels = rng.normal(0, 1, (3, 4)), rng.integers(0, 3, 64)
    x = rng.normal(means[labels], 0.5).astype(np.float32)
    return [(x, labels)] * count


def loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Net(nn.Module):
    a: int = 11
    b: int = 14

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(self.a, kernel_init=CONSTANT(0.3), name='first')(x))
        x = nn.tanh(nn.Dense(self.b, kernel_init=CONSTANT(0.2), name='second')(x))
        return nn.Dense(3, kernel_init=nn.initializers.zeros, name='head')(x)


def make(counts):
    return Net(counts['params/first'], counts['params/second']).apply


def linen(tx=None, **arguments):
    variables = Net().init(jax.random.key(0), batches()[0][0])
    tx = tx or optax.sgd(0.2, momentum=0.9)
    return own_model.Model(
        Net().apply, variables, tx, loss, batches(arguments.pop('steps', STEPS)), **arguments
    )


def equinox():
    mlp = eqx.nn.MLP(4, 3, width_size=16, depth=1, activation=jnp.tanh, key=jax.random.key(0))
    params, rest = eqx.partition(mlp, eqx.is_array)
    params = jax.tree.map(lambda x: jnp.full_like(x, 0.1 if x.ndim == 2 else 0.0), params)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, rest))(x)

    return own_model.Model(apply, params, optax.adam(1e-2, eps=1e-3), loss, batches())


def nnx_linear():
    graph, params = nnx.split(
        nnx.Sequential(
            nnx.Linear(4, 16, kernel_init=CONSTANT(0.3), rngs=nnx.Rngs(0)),
            nnx.tanh,
            nnx.Linear(16, 3, kernel_init=CONSTANT(0.1), rngs=nnx.Rngs(0)),
        )
    )
    return own_model.Model(
        lambda params, x: nnx.merge(graph, params)(x),
        params,
        optax.adamw(1e-2, eps=1e-3),
        loss,
        batches(),
    )


@pytest.mark.parametrize('make_model', [linen, equinox, nnx_linear])
def test_the_linear_prediction_is_what_small_noise_comes_to(make_model):
    """Of a model in any library, from its function alone, as long as the noise is small."""
    model = make_model()
    assert (
        sorted(model.streams.values())
        == {linen: [11, 14], equinox: [16], nnx_linear: [16]}[make_model]
    )
    assert model.report
    predicted = own_model.predict(model, scales=(1e-6,), steps=20).linear[1e-6]
    measured = own_model.measure(model, 1e-6, steps=20)
    for stream in model.streams:
        small = predicted[stream] < np.log(0.01)
        off = (np.log(measured[stream]) - predicted[stream])[small]
        assert small.sum() > 5
        assert np.abs(off).max() < 0.15, 'where two parts are as large they may add up'
        assert np.median(np.abs(off)) < 0.1


@pytest.mark.parametrize('make_model', [linen, equinox, nnx_linear])
def test_without_noise_equal_features_stay_equal(make_model):
    for asymmetry in own_model.measure(make_model(), steps=10).values():
        assert asymmetry.shape == (11,) and not asymmetry.any()


def test_growth_onsets_and_lines():
    model = linen()
    found = own_model.predict(model, scales=(1e-8, 1e-2), steps=30)
    assert found.linear.keys() == {1e-8, 1e-2} and found.reduced == {}
    difference = found.linear[1e-2]['params/first'] - found.linear[1e-8]['params/first']
    np.testing.assert_allclose(difference, 6 * np.log(10))
    curves = found.linear[1e-2]
    assert found.onset(1e-2, 'params/first') == predict_onset(curves['params/first'])
    assert found.onset(1e-2) == predict_onset(np.max(list(curves.values()), axis=0))
    lines = str(found).splitlines()
    assert lines[0].split()[-2:] == ['1e-08', '0.01']
    assert [line.split()[0] for line in lines[1:4]] == ['params/first', 'params/second', 'any']
    assert max(map(len, lines)) <= 100


def test_each_streams_own_part_of_the_noise_moves_no_other():
    noise = jax.tree.map(
        lambda x: np.random.default_rng(0).normal(size=x.shape), jax.device_get(linen().params)
    )
    model = linen()
    parts, owners = own_model._tangents(noise, model.axes)
    assert owners == ['params/first', 'params/second', None]
    for i, owner in enumerate(owners):
        part = jax.tree.map(lambda x, i=i: x[i], parts)
        sizes = symmetry.asymmetry_by_stream(part, model.axes)
        if owner is not None:
            others = {name: size for name, size in sizes.items() if name != owner}
            assert sizes[owner] > 0.1 and max(others.values()) < 1e-6
    # Together they are the noise, but for what is the same for all features.
    rest = jax.tree.map(lambda x, parts: np.asarray(x - parts.sum(0), np.float32), noise, parts)
    assert max(symmetry.asymmetry_by_stream(rest, model.axes).values()) < 1e-5


def test_the_reduced_prediction_goes_on_where_the_linear_one_ends():
    """Of each seed's own noise, within a tenth of the onset."""
    model = linen(steps=120, make=make)
    found = own_model.predict(model, scales=(1e-3,), steps=120, features=6, seeds=2)
    assert len(found.reduced[1e-3]) == 2
    for seed, curves in enumerate(found.reduced[1e-3]):
        measured = own_model.measure(model, 1e-3, steps=120, seed=seed)
        for stream, curve in curves.items():
            onset = int(np.argmax(measured[stream] >= 0.1))
            assert onset > 5
            assert abs(predict_onset(curve) - onset) <= 0.1 * onset


class Normalised(nn.Module):
    a: int = 12

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.tanh(nn.Dense(self.a, kernel_init=CONSTANT(0.3), name='first')(x)))
        return nn.Dense(3, name='head', kernel_init=CONSTANT(0.1))(x)


def test_a_small_network_that_is_another_one_is_a_sentence():
    variables = Normalised().init(jax.random.key(0), batches()[0][0])
    model = own_model.Model(
        Normalised().apply, variables, optax.sgd(0.1), loss, batches(),
        make=lambda counts: Normalised(*counts.values()).apply,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r'make: the network .* something else .* but their last'):
        own_model.predict(model, steps=3, features=5)
    with pytest.raises(ValueError, match=r'make: what it gives for .* fails'):
        own_model.predict(linen(make=lambda counts: Net().apply), steps=3)


@pytest.mark.parametrize(
    'change,message',
    [
        ({'batches': iter(batches())}, r'batches: must be a list of \(inputs, targets\), one for'),
        ({'batches': []}, 'batches: must be a list'),
        ({'batches': [np.zeros((3, 4))]}, 'batches: number 0 is ndarray; each must be'),
        ({'batches': [*batches(1), (0, 1, 2)]}, 'batches: number 1 is a tuple of 3; each must be'),
        (
            {'params': {'w': np.zeros((4, 0))}},
            r'params: w has the shape \(4, 0\), so is empty; leave',
        ),
        (
            {'loss': lambda outputs, targets: outputs[0].astype(int)},
            'loss: returns int.*; must be a',
        ),
        ({'tx': optax.lbfgs()}, r'tx: fails \(TypeError: .*value.*\); must be an optimizer of O'),
        (
            {'tx': None},
            r'tx: fails \(AttributeError: .*\); must be an optimizer of O',
        ),
        ({'params': {'w': np.zeros(3, int)}}, 'params: w is int64; must be floats'),
        ({'axes': {'v': (None, 'h')}}, 'axes: lacks w; has v, which params lacks'),
        ({'axes': {'w': ('h',)}}, r"axes: w is \('h',\), which does not fit the shape"),
        ({'loss': lambda outputs, targets: outputs}, 'loss: returns .*; must be a scalar'),
        ({'params': {'w': 'x'}}, 'params: w is str; must be floats'),
        ({'apply': lambda params, x: x @ params['w'].cumsum(1)}, 'axes: no axis has a name'),
    ],
)
def test_what_is_no_model_is_a_sentence(change, message):
    arguments = {
        'apply': lambda params, x: jnp.tanh(x @ params['w']).sum(axis=1),
        'params': {'w': np.ones((4, 5), np.float32)},
        'tx': optax.sgd(0.1),
        'loss': lambda outputs, targets: jnp.mean((outputs - targets) ** 2),
        'batches': batches(),
    }
    with pytest.raises(ValueError, match=message):
        own_model.Model(**arguments | change)


def test_features_that_start_unequal_are_named():
    variables = Net().init(jax.random.key(0), batches()[0][0])
    variables['params']['second']['bias'] = variables['params']['second']['bias'].at[3].set(1.0)
    model = own_model.Model(Net().apply, variables, optax.sgd(0.1), loss, batches())
    with pytest.raises(ValueError, match='params/second has 2 different ones; make the initial'):
        own_model.predict(model)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_weights_of_less_precision_have_a_linear_prediction(dtype):
    """To the rounding of what they are trained in, that of the same weights in float32."""

    def of(dtype):
        params = jax.tree.map(lambda x: x.astype(dtype), linen().restored(linen().params))
        data = [(x.astype(dtype), labels) for x, labels in batches(3)]
        model = own_model.Model(Net().apply, params, optax.sgd(0.2), loss, data)
        return own_model.predict(model, scales=(1e-2,)).linear[1e-2]

    low, exact = of(dtype), of('float32')
    for stream, curve in exact.items():
        np.testing.assert_allclose(low[stream], curve, atol=0.1)


def test_a_stream_of_one_feature_stays_symmetric():
    """There is none that it could differ from."""
    params = {'w': np.ones((4, 1), np.float32), 'v': np.ones((1, 3), np.float32)}
    model = own_model.Model(
        lambda p, x: jnp.tanh(x @ p['w']) @ p['v'], params, optax.sgd(0.1), loss, batches(3)
    )
    predicted = own_model.predict(model)
    assert model.streams == predicted.streams == {'w': 1}
    assert predicted.growth == {'w': None}
    assert predicted.onset(1e-6) is None


@pytest.mark.parametrize(
    'arguments,message',
    [
        ({'scales': (0.0,)}, r'scales=\(0.0,\): must be above 0'),
        ({'steps': 0}, 'steps=0: must be at least 1'),
        ({'seeds': 0}, 'seeds=0: must be at least 1'),
        ({'features': 3}, 'features=3: must be at least 4'),
    ],
)
def test_a_number_that_is_too_small_is_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        own_model.predict(linen(make=make), **arguments)


def test_an_optimizer_without_a_derivative_is_a_sentence():
    """Adam's where a gradient is 0, as that of all layers but the head is at first."""
    with pytest.raises(ValueError, match=r'step 1: the linearised step .* eps_root > 0'):
        own_model.predict(linen(optax.adam(1e-3)), steps=3)


@pytest.mark.parametrize('tx', [optax.lion(1e-3), optax.sign_sgd(1e-3)])
def test_of_signs_nothing_is_predicted(tx):
    """Their derivative is 0, where a gradient of 0 that is moved becomes a whole step."""
    model = linen(tx, steps=2)
    with pytest.raises(ValueError, match='tx: takes signs of gradients'):
        own_model.predict(model)
    assert max(curve[1] for curve in own_model.measure(model, 1e-6).values()) > 1e-3


def test_the_sign_of_a_second_moment_has_a_prediction():
    """Yogi's, which is no sign of the gradient."""
    model = linen(optax.yogi(1e-2, eps=1e-1))
    predicted = own_model.predict(model, (1e-6,), 20).linear[1e-6]
    measured = own_model.measure(model, 1e-6, 20)
    for stream, curve in predicted.items():
        np.testing.assert_allclose(np.log(measured[stream]), curve, atol=0.15)


def test_where_weights_are_updated_together_no_small_network_stands_for_a_large_one():
    """They have the linear prediction alone."""
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    with pytest.raises(
        ValueError, match='tx: what it does to a weight is random or depends on oth'
    ):
        own_model.predict(linen(clipped, make=make), steps=3)
    assert own_model.predict(linen(clipped), steps=3, features=3, seeds=0).reduced == {}


def test_a_run_that_is_lost_has_no_asymmetry():
    """All weights NaN are equal, and say nothing of the features."""
    for asymmetry in own_model.measure(linen(optax.sgd(np.nan)), 1e-6, steps=2).values():
        assert asymmetry[0] > 0 and np.isnan(asymmetry[1:]).all()


def recurrent(width=12, dtype=None):
    """A scan whose carry has the dtype of the inputs, or a dtype whatever they are; it counts."""

    def apply(params, x, labels):
        def advance(carry, column):
            state, seen = carry
            state = jnp.tanh(state @ params['w'] + column[:, None] * params['u'])
            return (state, seen + labels), None

        start = jnp.zeros((len(x), width), dtype or x.dtype), jnp.zeros(len(x), jnp.int32)
        return jax.lax.scan(advance, start, x.T)[0][0] @ params['v']

    return apply


@pytest.mark.parametrize('dtype', [None, 'float32'])
def test_a_small_network_is_tried_out_in_float64(dtype):
    params = {'w': np.full((12, 12), 0.05), 'u': np.full(12, 0.3), 'v': np.full((12, 3), 0.1)}
    data = [((x, labels), labels) for x, labels in batches(3)]
    model = own_model.Model(
        recurrent(dtype=dtype), jax.tree.map(np.float32, params), optax.sgd(0.1), loss, data,
        make=lambda counts: recurrent(*counts.values(), dtype=dtype),
    )  # fmt: skip
    if dtype is None:
        own_model.check_predictable(model)
    else:
        with pytest.raises(
            ValueError, match=r'apply: fails in float64 \(.*carry.*\), in which `ma'
        ):
            own_model.check_predictable(model)


def test_each_draw_of_the_noise_has_its_own_passive_part():
    """It is most of the asymmetry at first, and nothing of it is in a reduced network."""
    model = linen(make=make)
    found = own_model.predict(model, (1e-4,), 1, features=4, seeds=3).reduced[1e-4]
    for seed, curves in enumerate(found):
        noise = own_model._unit_noise(model, seed)
        passive = prediction.passive_deviations(noise, model.axes)['params/first']
        (size,) = passive.values()
        assert np.exp(curves['params/first'][0]) == pytest.approx(1e-4 * size / 0.3, rel=1e-3)


def test_the_readmes_example_runs_and_has_no_declaration(capsys):
    readme = (pathlib.Path(__file__).parents[2] / 'README.md').read_text()
    blocks = re.findall(r'^```python\n(.*?)^```', readme, re.M | re.S)
    (block,) = [block for block in blocks if 'own_model' in block]
    exec(block, {})
    printed = capsys.readouterr().out
    assert 'layers_0/kernel axis 1' in printed and 'params/layers_0                32' in printed
    assert 'None' not in block
