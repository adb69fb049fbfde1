import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import trees

from zerojax import models, symmetry
from zerojax.symmetry import orbits as orbits_lib


def test_orbits_are_found_from_the_weights():
    found = symmetry.find_orbits(trees.tree_with_orbits(), trees.AXES)
    assert found.counts() == {'a': 2, 'b': 3}
    for name, first in trees.ORBITS.first.items():
        np.testing.assert_array_equal(found.first[name], first)
    assert found.entries == {}


@pytest.mark.parametrize('layer,name,index', [('in', 'kernel', (0, 2)), ('mid', 'kernel', (2, 3))])
def test_one_bit_parts_an_orbit(layer, name, index):
    tree = trees.changed(trees.tree_with_orbits(), layer, name, index, trees.next_above)
    assert symmetry.find_orbits(tree, trees.AXES).counts() != trees.ORBITS.counts()


def test_an_identity_keeps_equal_features_equal_and_different_ones_different():
    tree = trees.identity_tree()
    found = symmetry.find_orbits(tree, trees.AXES)
    assert found.counts() == {'a': 1, 'b': 1}
    assert list(found.entries) == [('mid', 'kernel')]
    tree = trees.changed(tree, 'in', 'kernel', (0, 1), lambda _: 5.0)
    assert symmetry.find_orbits(tree, trees.AXES).counts() == {'a': 2, 'b': 2}


@pytest.mark.parametrize(
    'arguments,channels,counts',
    [
        ({'name': 'constnet', 'depth': 7, 'width': 1}, 3, {1}),
        ({'name': 'constnet', 'depth': 7, 'width': 1, 'init': 'random'}, 3, {16, 32, 64}),
        ({'name': 'leakynet', 'depth': 7, 'width': 1, 'init': '1111'}, 3, {1}),
        ({'name': 'leakynet', 'depth': 7, 'width': 1, 'init': '1iii'}, 3, {1}),
        ({'name': 'leakynet', 'depth': 7, 'width': 1, 'init': 'iiii'}, 3, {3}),
        ({'name': 'mlp', 'width': 24, 'init': 'random', 'unique_features': 5}, 1, {5}),
    ],
)
def test_networks_start_with_as_many_orbits_as_their_initialisation_says(
    arguments, channels, counts
):
    model = models.create(**arguments)
    axes = model.feature_axes()['params']

    @quick.jit
    def init():
        return model.init(jax.random.key(0), jnp.zeros((1, 8, 8, channels)), train=False)['params']

    params = init()
    found = symmetry.find_orbits(params, axes)
    assert set(found.counts().values()) == counts

    @quick.jit
    def measures(params):
        asymmetry, distance = (
            jnp.max(jnp.stack(list(measure(params, axes, found).values())))
            for measure in (symmetry.asymmetry, symmetry.distance)
        )
        symmetric, alike = (symmetry.is_symmetric(params, axes, each) for each in (found, None))
        return symmetric, asymmetry, distance, alike

    *measured, alike = measures(params)
    assert measured == [True, 0.0, 0.0]
    if arguments['name'] == 'constnet':
        assert alike == (counts == {1})
        assert (set(symmetry.unique_features(params, axes).values()) == {1}) == alike


def test_the_features_that_kernels_put_out():
    axes = trees.AXES | {'head': {'kernel': ('b', None), 'bias': (None,)}}
    assert symmetry.output_axes(axes) == {'head/kernel': None, 'in/kernel': 'a', 'mid/kernel': 'b'}


def test_a_declaration_that_does_not_fit_is_refused():
    tree, axes = {'w': np.zeros((2, 3))}, {'w': ('a', 'b')}
    with pytest.raises(ValueError, match='feature_axes and tree differ in v'):
        list(symmetry.named_axes(tree, axes | {'v': ('a',)}))
    with pytest.raises(ValueError, match=r"w: \('a',\) does not fit shape \(2, 3\)"):
        list(symmetry.named_axes(tree, {'w': ('a',)}))


def test_axes_of_one_name_must_have_one_length():
    tree = trees.tree_with_orbits() | {'in': {'kernel': np.zeros((4, 2))}}
    for refused in (orbits_lib.feature_counts, symmetry.find_orbits):
        with pytest.raises(ValueError, match="mid/kernel: axis 'a' has 3 features, elsewhere 2"):
            refused(tree, trees.AXES)
