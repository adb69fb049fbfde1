import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerojax import models, symmetry
from zerojax.symmetry import Orbits

AXES = {
    'conv': {'kernel': (None, None, 'a', 'b')},
    'bn': {'scale': ('b',), 'bias': ('b',)},
    'head': {'kernel': ('b', None), 'bias': (None,)},
}


def symmetric_tree(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        'conv': {
            'kernel': jnp.asarray(np.tile(rng.normal(size=(3, 3, 1, 1)), (1, 1, 5, 7)), dtype)
        },
        'bn': {'scale': jnp.full(7, 0.3, dtype), 'bias': jnp.zeros(7, dtype)},
        'head': {
            'kernel': jnp.asarray(np.tile(rng.normal(size=(1, 4)), (7, 1)), dtype),
            'bias': jnp.arange(4).astype(dtype),
        },
    }


DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_symmetric_tree_measures_exactly_zero(dtype):
    tree = symmetric_tree(dtype)
    assert symmetry.is_symmetric(tree, AXES)
    assert {k: float(x) for k, x in symmetry.asymmetry(tree, AXES).items()} == {
        'conv': 0.0, 'bn': 0.0, 'head': 0.0,
    }  # fmt: skip
    assert symmetry.unique_features(tree, AXES) == {'conv': 1, 'bn': 1, 'head': 1}


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    'module,name,index',
    [
        ('conv', 'kernel', (0, 2, 0, 6)), ('conv', 'kernel', (0, 2, 4, 0)), ('bn', 'scale', (1,)),
        ('bn', 'bias', (0,)), ('head', 'kernel', (3, 2)),
    ],
)  # fmt: skip
def test_one_bit_in_one_weight_is_seen_and_its_layer_named(dtype, module, name, index):
    tree = symmetric_tree(dtype)
    x = tree[module][name]
    up = jnp.nextafter(x[index], jnp.asarray(jnp.inf, dtype))
    tree[module][name] = x.at[index].set(up)
    assert not symmetry.is_symmetric(tree, AXES)
    asymmetric = {k for k, value in symmetry.asymmetry(tree, AXES).items() if value > 0}
    assert asymmetric == {module}


def test_asymmetry_is_relative_to_the_largest_weight_of_the_same_features():
    """And taken from the first feature."""
    scale = jnp.array([2.0, 2.0, 2.0, 2.0, 2.5, 2.0, 1.0])
    tree = symmetric_tree() | {'bn': {'scale': scale, 'bias': jnp.zeros(7)}}
    tree['head']['kernel'] = jnp.zeros((7, 4)).at[3, 3].set(-1e-3)
    largest = max(float(jnp.max(jnp.abs(tree['conv']['kernel']))), 2.5)
    assert symmetry.asymmetry(tree, AXES)['bn'] == np.float32(1.0 / largest)
    assert symmetry.asymmetry(tree, AXES)['head'] == pytest.approx(1e-3 / largest, rel=1e-6)
    assert symmetry.asymmetry(tree, AXES)['conv'] == 0


def test_axes_without_a_name_do_not_count():
    tree = symmetric_tree()
    tree['head']['bias'] = jnp.arange(4.0) ** 2
    assert symmetry.is_symmetric(tree, AXES)


def test_unique_features_counts_distinct_slices_of_the_last_named_axis():
    tree = symmetric_tree()
    kernel = tree['conv']['kernel']
    tree['conv']['kernel'] = kernel.at[..., 3:5].multiply(2).at[0, 0, 0, 6].multiply(-1)
    tree['head']['kernel'] = jnp.zeros((7, 4)).at[2, 1].set(-0.0).at[5, 0].set(1e-45)
    counts = symmetry.unique_features(tree, AXES)
    assert counts == {'conv': 3, 'bn': 1, 'head': 2}


def test_projection_is_symmetric_idempotent_and_keeps_symmetric_trees_bit_for_bit():
    tree = symmetric_tree()
    noisy = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape, x.dtype), tree)
    projected = symmetry.project(noisy, AXES)
    assert not symmetry.is_symmetric(noisy, AXES)
    assert symmetry.is_symmetric(projected, AXES)
    jax.tree.map(np.testing.assert_array_equal, symmetry.project(projected, AXES), projected)
    jax.tree.map(np.testing.assert_array_equal, symmetry.project(tree, AXES), tree)
    np.testing.assert_array_equal(projected['head']['bias'], noisy['head']['bias'])


def test_a_declaration_that_does_not_fit_is_refused():
    tree = symmetric_tree()
    with pytest.raises(ValueError, match='bn/bias'):
        symmetry.is_symmetric(tree, AXES | {'bn': {'scale': ('b',)}})
    with pytest.raises(ValueError, match=r'bn/scale: .* does not fit shape \(7,\)'):
        symmetry.is_symmetric(tree, AXES | {'bn': {'scale': ('b', None), 'bias': ('b',)}})


def test_constnet_starts_symmetric_and_its_random_control_does_not():
    for init, symmetric in (('averaging', True), ('random', False)):
        model = models.create('constnet', depth=7, width=1, init=init)
        params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)['params']
        axes = model.feature_axes()['params']
        assert symmetry.is_symmetric(params, axes) == symmetric
        assert (set(symmetry.unique_features(params, axes).values()) == {1}) == symmetric


# Orbits: of three features at 'a' (two and one), five at 'b' (two, two, one).
ORBITS = Orbits({'a': np.array([0, 1, 0]), 'b': np.array([0, 1, 0, 1, 4])}, {})
SMALL_AXES = {'in': {'kernel': (None, 'a')}, 'mid': {'kernel': ('a', 'b'), 'bias': ('b',)}}


def tree_with_orbits():
    """Features of one orbit are equal, those of different orbits are not."""
    rng = np.random.default_rng(0)
    tree = {
        'in': {'kernel': rng.normal(size=(4, 3))[:, ORBITS.first['a']]},
        'mid': {
            'kernel': rng.normal(size=(3, 5))[ORBITS.first['a']][:, ORBITS.first['b']],
            'bias': rng.normal(size=5)[ORBITS.first['b']],
        },
    }
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def identity_tree():
    """An identity between hidden layers: weights differ, features do not."""
    kernel = np.tile([[1.0], [2.0]], (1, 4))
    tree = {'in': {'kernel': kernel}, 'mid': {'kernel': np.eye(4), 'bias': np.zeros(4)}}
    axes = SMALL_AXES | {'mid': {'kernel': ('a', 'b'), 'bias': ('b',)}}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree), axes


def all_measures(tree, axes, orbits):
    return (
        bool(symmetry.is_symmetric(tree, axes, orbits)),
        max(float(x) for x in symmetry.asymmetry(tree, axes, orbits).values()),
        max(float(x) for x in symmetry.distance(tree, axes, orbits).values()),
    )


def test_orbits_are_found_from_the_weights():
    found = symmetry.find_orbits(tree_with_orbits(), SMALL_AXES)
    assert found.counts() == {'a': 2, 'b': 3}
    for name, first in ORBITS.first.items():
        np.testing.assert_array_equal(found.first[name], first)
    assert found.entries == {}


def test_within_its_orbits_a_tree_is_symmetric_and_otherwise_not():
    tree = tree_with_orbits()
    assert all_measures(tree, SMALL_AXES, ORBITS) == (True, 0.0, 0.0)
    symmetric, asymmetry, distance = all_measures(tree, SMALL_AXES, None)
    assert not symmetric and asymmetry > 0 and distance > 0
    for layer, name, index in (('in', 'kernel', (0, 2)), ('mid', 'kernel', (2, 3))):
        up = jnp.nextafter(tree[layer][name][index], jnp.float32(jnp.inf))
        changed = tree | {layer: tree[layer] | {name: tree[layer][name].at[index].set(up)}}
        symmetric, asymmetry, _ = all_measures(changed, SMALL_AXES, ORBITS)
        assert not symmetric and asymmetry > 0
        assert symmetry.find_orbits(changed, SMALL_AXES).counts() != ORBITS.counts()


def test_projection_keeps_orbits_apart():
    tree = tree_with_orbits()
    jax.tree.map(np.testing.assert_array_equal, symmetry.project(tree, SMALL_AXES, ORBITS), tree)
    noisy = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape), tree)
    projected = symmetry.project(noisy, SMALL_AXES, ORBITS)
    assert symmetry.is_symmetric(projected, SMALL_AXES, ORBITS)
    assert symmetry.find_orbits(projected, SMALL_AXES).counts() == ORBITS.counts()


def test_an_identity_between_equal_features_is_symmetric():
    tree, axes = identity_tree()
    orbits = symmetry.find_orbits(tree, axes)
    assert orbits.counts() == {'a': 1, 'b': 1}
    assert list(orbits.entries) == [('mid', 'kernel')]
    assert all_measures(tree, axes, orbits) == (True, 0.0, 0.0)
    assert symmetry.unique_features(tree, axes, orbits) == {'in': 1, 'mid': 1}
    jax.tree.map(np.testing.assert_array_equal, symmetry.project(tree, axes, orbits), tree)
    for index in ((0, 1), (2, 2)):
        tree['mid']['kernel'] = jnp.eye(4).at[index].add(1e-3)
        symmetric, asymmetry, distance = all_measures(tree, axes, orbits)
        assert not symmetric and asymmetry > 0 and distance > 0
        assert symmetry.unique_features(tree, axes, orbits)['mid'] == 2


def test_an_identity_between_different_features_keeps_them_different():
    tree, axes = identity_tree()
    tree['in']['kernel'] = tree['in']['kernel'].at[0, 1].set(5.0)
    assert symmetry.find_orbits(tree, axes).counts() == {'a': 2, 'b': 2}


@pytest.mark.parametrize('identity', [False, True])
def test_distance_is_that_to_the_nearest_symmetric_tree(identity):
    """In float64 against the mean over every class of weights that must be equal; and no symmetric
    tree is nearer than the mean."""
    tree, axes = identity_tree() if identity else (tree_with_orbits(), SMALL_AXES)
    orbits = symmetry.find_orbits(tree, axes)
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        noisy = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + rng.normal(size=x.shape)), tree)
        measured = symmetry.distance(noisy, axes, orbits)
        for layer, arrays in noisy.items():
            square = 0.0
            for name, x in arrays.items():
                index = orbits.entries.get((layer, name))
                if index is None:
                    index = np.arange(x.size).reshape(x.shape)
                    for axis, axis_name in enumerate(axes[layer][name]):
                        if axis_name is not None:
                            index = np.take(index, orbits.first[axis_name], axis)
                flat = np.asarray(x).ravel()
                for each in np.unique(index):
                    members = flat[index.ravel() == each]
                    square += ((members - members.mean()) ** 2).sum()
            assert float(measured[layer]) == pytest.approx(np.sqrt(square), rel=1e-13)


@pytest.mark.parametrize(
    'arguments,channels,orbits',
    [
        ({'name': 'constnet', 'depth': 7, 'width': 1}, 3, {1}),
        ({'name': 'leakynet', 'depth': 7, 'width': 1, 'init': '1111'}, 3, {1}),
        ({'name': 'leakynet', 'depth': 7, 'width': 1, 'init': '1iii'}, 3, {1}),
        ({'name': 'leakynet', 'depth': 7, 'width': 1, 'init': 'iiii'}, 3, {3}),
        ({'name': 'mlp', 'width': 24, 'init': 'random', 'unique_features': 5}, 1, {5}),
    ],
)
def test_networks_start_with_as_many_orbits_as_their_initialisation_says(
    arguments, channels, orbits
):
    model = models.create(**arguments)
    images = jnp.zeros((1, 8, 8, channels))
    params = model.init(jax.random.key(0), images, train=False)['params']
    axes = model.feature_axes()['params']
    found = symmetry.find_orbits(params, axes)
    assert set(found.counts().values()) == orbits
    assert all_measures(params, axes, found) == (True, 0.0, 0.0)


def test_axes_of_one_name_must_have_one_length():
    tree = tree_with_orbits()
    tree['in']['kernel'] = jnp.zeros((4, 2))
    with pytest.raises(ValueError, match="mid/kernel: axis 'a' has 3 features, elsewhere 2"):
        symmetry.find_orbits(tree, SMALL_AXES)
