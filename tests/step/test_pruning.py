import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from zerojax import models
from zerojax.step import pruning

RNG = np.random.default_rng(0)


@pytest.fixture(scope='module')
def params():
    model = models.create('constnet', depth=7, width=1, init='random')

    @quick.jit
    def init():
        return model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)['params']

    return init()


def kept(mask):
    return {path: float(jnp.mean(x)) for path, x in jax.tree_util.tree_flatten_with_path(mask)[0]}


@pytest.mark.parametrize('fraction', [0.0, 0.5, 0.85])
def test_the_smallest_weights_of_each_layer_go(params, fraction):
    mask = pruning.magnitude_mask(params, fraction)
    for path in (('stem',), ('block1_0', 'conv'), ('block3_0', 'conv')):
        weights, keep = params, mask
        for name in path:
            weights, keep = weights[name], keep[name]
        weights, keep = np.abs(weights['kernel']), np.asarray(keep['kernel'])
        assert keep.size - keep.sum() == int(fraction * keep.size)
        if fraction > 0:
            assert weights[~keep].max() <= weights[keep].min()


def test_shortcuts_normalisation_and_head_are_kept(params):
    for path, share in kept(pruning.magnitude_mask(params, 0.5)).items():
        name = jax.tree_util.keystr(path)
        chosen = 'stem' in name or "['conv']" in name
        assert (share < 1) == chosen, name


def test_a_random_mask_removes_as_many_but_others(params):
    magnitude = pruning.magnitude_mask(params, 0.7)
    first = pruning.random_mask(params, 0.7, jax.random.key(0))
    again = pruning.random_mask(params, 0.7, jax.random.key(0))
    other = pruning.random_mask(params, 0.7, jax.random.key(1))
    assert kept(first) == kept(magnitude) == kept(other)
    same = jax.tree.map(lambda x, y: bool((x == y).all()), first, again)
    assert all(jax.tree.leaves(same))
    for mask in (magnitude, other):
        assert (mask['block1_0']['conv']['kernel'] != first['block1_0']['conv']['kernel']).any()
    # Removed whatever their size: the removed are as large as the kept.
    weights = np.abs(params['block3_0']['conv']['kernel'])
    keep = np.asarray(first['block3_0']['conv']['kernel'])
    assert weights[~keep].mean() == pytest.approx(weights[keep].mean(), rel=0.1)


def test_layers_are_chosen_by_pattern(params):
    shares = kept(pruning.magnitude_mask(params, 0.5, layers='block2_0/shortcut'))
    assert [jax.tree_util.keystr(path) for path, share in shares.items() if share < 1] == [
        "['block2_0']['shortcut']['kernel']"
    ]


def test_any_pytree_is_pruned_as_nested_dictionaries_of_its_paths():
    x, y = RNG.normal(size=(2, 6, 5)).astype(np.float32)
    tree, nested = {'conv': [x, (y,)]}, {'conv': {'0': x, '1': {'0': y}}}
    for prune in (
        lambda params: pruning.magnitude_mask(params, 0.4, 'conv/1'),
        lambda params: pruning.random_mask(params, 0.4, jax.random.key(0), 'conv'),
    ):
        mask = prune(tree)
        assert jax.tree.structure(mask) == jax.tree.structure(tree)
        for ours, theirs in zip(jax.tree.leaves(mask), jax.tree.leaves(prune(nested)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_64_bit_numbers_change_no_draw(params):
    params = params['stem']  # one shape tells
    usual = pruning.random_mask(params, 0.5, jax.random.key(1), 'kernel')
    with jax.enable_x64(True):
        other = pruning.random_mask(params, 0.5, jax.random.key(1), 'kernel')
    jax.tree.map(np.testing.assert_array_equal, other, usual)
