import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from crooked import Crooked

from zerojax import models, symmetry
from zerojax.measure import equal_features
from zerojax.measure.noise import noise_floor

AXES = {
    'first': {'kernel': (None, 'first'), 'bias': ('first',)},
    'crooked': {'kernel': ('first', 'crooked')},
    'head': {'kernel': ('crooked', None), 'bias': (None,)},
}


class Net(nn.Module):
    crooked: bool = True

    @nn.compact
    def __call__(self, x_bxc):
        zeros = nn.initializers.zeros
        x = nn.Dense(6, kernel_init=zeros, name='first')(x_bxc)
        # Features are equal, so only unequal terms can tell one order of summation from another.
        x = x * jnp.linspace(1.0, 2.0, 6)[None, :]
        x = Crooked(5, self.crooked, name='crooked')(x)
        return nn.Dense(3, kernel_init=zeros, name='head')(x)


def spreads(net):
    x = jax.random.normal(jax.random.key(1), (64, 7))
    params = equal_features.symmetric_fill(net.init(jax.random.key(0), x)['params'], AXES)

    def loss(params):
        return jnp.mean(net.apply({'params': params}, x) ** 2)

    results = quick.jit(
        lambda params: equal_features.tensors(loss, params, ['first', 'crooked', 'head'])
    )(params)
    value, gradients = quick.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(results['forward']['loss'], value, rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7)
    jax.tree.map(close, results['gradients']['params'], gradients)
    return equal_features.equal_features_of(results, AXES)


def test_a_kernel_that_sums_one_feature_in_another_order_is_found_in_its_layer():
    found = spreads(Net(crooked=True))
    crooked = found['outputs/crooked']
    assert crooked.distinct == 2
    assert crooked.ulps >= 1
    assert 0 < crooked.relative < 1e-6
    assert found['outputs/first'].distinct == 1

    found = spreads(Net(crooked=False))
    assert found['outputs/crooked'].distinct == found['outputs/first'].distinct == 1
    assert found['gradients/crooked/kernel'].magnitude > 0


@pytest.mark.parametrize(
    'model',
    [
        models.create('constnet', depth=7, width=1),
        models.create('leakynet', depth=7, width=1, init='1i1i'),
        models.create('mlp', width=5),
        models.create('wideresnet', depth=10, width=1, init='fixup'),
    ],
    ids=lambda model: type(model).__name__,
)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_filled_weights_are_symmetric_and_tell_something(model, dtype):
    image, key = jnp.zeros((1, 8, 8, 1)), jax.random.key(0)
    shapes = jax.eval_shape(lambda: model.init(key, image, train=False))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), shapes['params'])
    axes = model.feature_axes()['params']
    filled = equal_features.symmetric_fill(params, axes)
    assert all(x.distinct == 1 for x in equal_features.equal_features(filled, axes).values())
    for x in map(np.asarray, jax.tree.leaves(filled)):
        assert x.dtype == dtype
        assert np.all(np.isfinite(x) & (x != 0))
    again, other = (equal_features.symmetric_fill(params, axes, seed=seed) for seed in (0, 1))
    assert all(spread.distinct == 1 for spread in noise_floor([filled, again]).values())
    assert all(spread.distinct == 2 for spread in noise_floor([filled, other]).values())


def test_the_worst_axis_counts():
    tree = {'a': {'kernel': jnp.array([[1.0, 2.0], [1.0, 2.0]])}, 'b': {'bias': jnp.arange(3.0)}}
    axes = {'a': {'kernel': ('x', 'y')}, 'b': {'bias': (None,)}}
    found = equal_features.equal_features(tree, axes)
    assert found.keys() == {'a/kernel'}, 'what no features index is not compared'
    assert (found['a/kernel'].distinct, found['a/kernel'].absolute) == (2, 1.0)


@pytest.mark.parametrize(
    'axes,message',
    [
        ({'a': ('x',), 'b': (None,)}, 'feature_axes and tree differ in b'),
        ({'a': ('x', None)}, r"a: \('x', None\) does not fit shape \(3,\)"),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        equal_features.equal_features({'a': jnp.zeros(3)}, axes)


def filled_within_orbits(model, channels=1):
    image = jnp.zeros((1, 8, 8, channels))
    params = quick.jit(lambda: model.init(jax.random.key(0), image, train=False)['params'])()
    axes = model.feature_axes()['params']
    orbits = symmetry.find_orbits(params, axes)
    return equal_features.symmetric_fill(params, axes, orbits), axes, orbits


def test_identity_layers_are_compared_weight_by_weight():
    """Their weights are a on the diagonal and b elsewhere: every feature sees the same, in another
    order."""
    model = models.create('leakynet', depth=7, width=1, init='1ii1')
    filled, axes, orbits = filled_within_orbits(model)
    found = equal_features.equal_features(filled, axes, orbits)
    assert found.keys() >= {'stem/kernel', 'block1_0/conv/kernel', 'head/kernel'}
    assert all(spread.distinct == 1 for spread in found.values())
    kernel = filled['block1_0']['conv']['kernel'][1, 1]
    assert len(np.unique(kernel)) == 2
    assert len(np.unique(jnp.diagonal(kernel))) == 1

    filled['block1_0']['conv']['kernel'] = (
        filled['block1_0']['conv']['kernel'].at[1, 1, 0, 3].add(1)
    )
    crooked = equal_features.equal_features(filled, axes, orbits)
    assert [name for name in found if crooked[name] != found[name]] == ['block1_0/conv/kernel']
    assert crooked['block1_0/conv/kernel'].distinct == 2


def test_only_features_of_one_orbit_are_compared():
    filled, axes, orbits = filled_within_orbits(
        models.create('mlp', width=6, init='random', unique_features=4)
    )
    kernel = np.asarray(filled['hidden']['kernel'])
    assert len(np.unique(kernel, axis=1).T) == 4
    x = jnp.asarray(kernel)[None]
    for outputs, distinct in ((x, 1), (x.at[0, 0, 5].add(1), 2), (x.at[0, 0, 3].add(1), 1)):
        results = {
            'forward': {'outputs': {'hidden': outputs}},
            'gradients': {'outputs': {'hidden': x}, 'params': filled},
        }
        found = equal_features.equal_features_of(results, axes, orbits)
        assert found['outputs/hidden'].distinct == distinct
        assert found['gradients/hidden/kernel'].distinct == 1

    filled, axes, orbits = filled_within_orbits(
        models.create('mlp', width=4, init='random', unique_features=4)
    )
    assert equal_features.equal_features(filled, axes, orbits) == {}, (
        'no features are meant to be equal'
    )


def test_the_features_of_a_layer_s_output_are_those_of_its_kernels():
    axes = models.create('constnet', depth=10, width=1).feature_axes()['params']
    assert equal_features.output_axis('stem', axes) == 'stem'
    assert equal_features.output_axis('block1_1', axes) == 'stem'
    axes = models.create('constnet', depth=10, width=2).feature_axes()['params']
    assert equal_features.output_axis('block1_1', axes) == 'block1_0'
    for layer in ('head', 'nowhere'):
        with pytest.raises(ValueError, match=f"layer '{layer}': its kernels have"):
            equal_features.output_axis(layer, axes)
