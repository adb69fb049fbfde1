import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerojax import models, symmetry

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
