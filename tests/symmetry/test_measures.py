import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees

from zerojax import symmetry

AXES = {
    'conv': {'kernel': (None, None, 'a', 'b')},
    'bn': {'scale': ('b',), 'bias': ('b',)},
    'head': {'kernel': ('b', None), 'bias': (None,)},
}
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def symmetric_tree(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    tree = {
        'conv': {'kernel': np.tile(rng.normal(size=(3, 3, 1, 1)), (1, 1, 5, 7))},
        'bn': {'scale': np.full(7, 0.3), 'bias': np.zeros(7)},
        'head': {'kernel': np.tile(rng.normal(size=(1, 4)), (7, 1)), 'bias': np.arange(4)},
    }
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def all_measures(orbits):
    """tree -> symmetric, asymmetry and distance, for a tree with the axes of `trees`."""

    def largest(by_layer):
        return jnp.max(jnp.stack(list(by_layer.values())))

    return lambda tree: (
        symmetry.is_symmetric(tree, trees.AXES, orbits),
        largest(symmetry.asymmetry(tree, trees.AXES, orbits)),
        largest(symmetry.distance(tree, trees.AXES, orbits)),
    )


@jax.jit
def measured(tree):
    return symmetry.is_symmetric(tree, AXES), symmetry.asymmetry(tree, AXES)


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_symmetric_tree_measures_exactly_zero(dtype):
    tree = symmetric_tree(dtype)
    assert measured(tree) == (True, {'conv': 0.0, 'bn': 0.0, 'head': 0.0})
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
    """Also where it makes a 0 the smallest subnormal number."""
    tree = trees.changed(symmetric_tree(dtype), module, name, index, trees.next_above)
    symmetric, asymmetry = measured(tree)
    assert not symmetric
    assert {layer for layer, value in asymmetry.items() if value > 0} == {module}
    by_stream = symmetry.is_symmetric_by_stream(tree, AXES)
    assert by_stream == {stream: stream not in AXES[module][name] for stream in 'ab'}


def test_asymmetry_is_relative_to_the_largest_weight_of_the_same_features():
    """And taken from the first feature."""
    tree = symmetric_tree()
    tree['bn']['scale'] = np.float32([2, 2, 2, 2, 2.5, 2, 1])
    tree['head']['kernel'] = np.zeros((7, 4), np.float32)
    tree['head']['kernel'][3, 3] = -1e-3
    weight = max(np.abs(tree['conv']['kernel']).max(), 2.5)
    _, asymmetry = measured(tree)
    assert asymmetry['bn'] == np.float32(1.0 / weight)
    assert asymmetry['head'] == pytest.approx(1e-3 / weight, rel=1e-6)
    assert asymmetry['conv'] == 0


def test_a_stream_is_asymmetric_along_its_own_axes_alone():
    """A kernel between two streams tells of each along its own axis; every stream has a value."""
    axes = {'one': {'kernel': ('a', 'b')}, 'two': {'kernel': ('b', None)}}
    rng = np.random.default_rng(0)
    of_a, of_b = rng.normal(size=(3, 1)), rng.normal(size=(1, 4))
    ones, two = np.ones((3, 4)), np.ones((4, 2))

    def measured(kernel, other=two):
        tree = {'one': {'kernel': jnp.asarray(kernel)}, 'two': {'kernel': jnp.asarray(other)}}
        by_stream = symmetry.asymmetry_by_stream(tree, axes)
        by_layer = symmetry.asymmetry(tree, axes)
        assert max(by_stream.values()) == max(by_layer.values())
        equal = {name: not value for name, value in by_stream.items()}
        assert symmetry.is_symmetric_by_stream(tree, axes) == equal
        assert symmetry.is_symmetric(tree, axes) == all(equal.values())
        distances = symmetry.distance_by_stream(tree, axes)
        assert {name: not value for name, value in distances.items()} == equal
        counts = symmetry.unique_features_by_stream(tree, axes)
        assert {name: count == 1 for name, count in counts.items()} == equal
        return {name: float(value) for name, value in by_stream.items()}

    assert measured(ones) == {'a': 0, 'b': 0}
    found = measured(ones + of_a)
    assert found['a'] > 0 and found['b'] == 0
    found = measured(ones + of_b)
    assert found['a'] == 0 and found['b'] > 0
    found = measured(ones, two + of_b.T)
    assert found['a'] == 0 and found['b'] > 0
    expected = np.abs(of_a - of_a[0]).max() / max(1, np.abs(1 + of_a).max())
    assert measured(ones + of_a)['a'] == pytest.approx(expected, rel=1e-6)


def test_axes_without_a_name_do_not_count():
    symmetric, _ = measured(trees.changed(symmetric_tree(), 'head', 'bias', 3, lambda _: 9.0))
    assert symmetric


def test_unique_features_counts_distinct_slices_of_the_last_named_axis():
    tree = symmetric_tree()
    tree['conv']['kernel'][..., 3:5] *= 2
    tree['conv']['kernel'][0, 0, 0, 6] *= -1
    tree['head']['kernel'] = np.zeros((7, 4), np.float32)
    tree['head']['kernel'][2, 1], tree['head']['kernel'][5, 0] = -0.0, 1e-45
    counts = symmetry.unique_features(tree, AXES)
    assert counts == {'conv': 3, 'bn': 1, 'head': 2}


def test_features_of_a_stream_differ_in_any_weight_along_any_of_its_axes():
    """By bits, but 0.0 equals -0.0; weights of other streams do not tell them apart."""
    axes = {'in': {'kernel': (None, 'a')}, 'on': {'kernel': ('a', 'a')}, 'out': {'bias': ('b',)}}
    tree = {
        'in': {'kernel': np.zeros((2, 6), np.float32)},
        'on': {'kernel': np.zeros((6, 6), np.float32)},
        'out': {'bias': np.arange(4, dtype=np.float32)},
    }

    def counted():
        counts = symmetry.unique_features_by_stream(tree, axes)
        assert counts['b'] == 4
        return counts['a']

    assert counted() == 1
    tree['in']['kernel'][1, 0] = -0.0
    assert counted() == 1
    tree['in']['kernel'][1, 0] = 1e-45
    assert counted() == 2
    tree['on']['kernel'][1] = 1.0  # alone along the first of its two axes
    assert counted() == 3
    tree['on']['kernel'][:, 2] = -1.0
    assert counted() == 4
    tree['on']['kernel'][:, 3] = -1.0
    assert counted() == 4


def test_projection_is_symmetric_idempotent_and_keeps_symmetric_trees_bit_for_bit():
    tree = symmetric_tree()
    rng = np.random.default_rng(1)
    noisy = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(x.dtype), tree)
    project = jax.jit(lambda tree: symmetry.project(tree, AXES))
    projected = project(noisy)
    assert not measured(noisy)[0]
    assert measured(projected)[0]
    jax.tree.map(np.testing.assert_array_equal, project(projected), projected)
    jax.tree.map(np.testing.assert_array_equal, project(tree), tree)
    np.testing.assert_array_equal(projected['head']['bias'], noisy['head']['bias'])


def test_a_declaration_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match='bn/bias'):
        symmetry.is_symmetric(symmetric_tree(), AXES | {'bn': {'scale': ('b',)}})


def test_within_its_orbits_a_tree_is_symmetric_and_otherwise_not():
    tree = trees.tree_with_orbits()
    measure = jax.jit(all_measures(trees.ORBITS))
    assert measure(tree) == (True, 0.0, 0.0)
    symmetric, asymmetry, distance = jax.jit(all_measures(None))(tree)
    assert not symmetric and asymmetry > 0 and distance > 0
    for layer, name, index in (('in', 'kernel', (0, 2)), ('mid', 'kernel', (2, 3))):
        changed = trees.changed(tree, layer, name, index, trees.next_above)
        symmetric, asymmetry, _ = measure(changed)
        assert not symmetric and asymmetry > 0


def test_projection_keeps_orbits_apart():
    tree = trees.tree_with_orbits()
    project = jax.jit(lambda tree: symmetry.project(tree, trees.AXES, trees.ORBITS))
    jax.tree.map(np.testing.assert_array_equal, project(tree), tree)
    rng = np.random.default_rng(1)
    noisy = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(x.dtype), tree)
    projected = project(noisy)
    assert symmetry.is_symmetric(projected, trees.AXES, trees.ORBITS)
    assert symmetry.find_orbits(projected, trees.AXES).counts() == trees.ORBITS.counts()


def test_an_identity_between_equal_features_is_symmetric():
    tree = trees.identity_tree()
    orbits = symmetry.find_orbits(tree, trees.AXES)
    measure = jax.jit(all_measures(orbits))
    assert measure(tree) == (True, 0.0, 0.0)
    assert symmetry.unique_features(tree, trees.AXES, orbits) == {'in': 1, 'mid': 1}
    assert symmetry.unique_features_by_stream(tree, trees.AXES, orbits) == {'a': 1, 'b': 1}
    assert symmetry.is_symmetric_by_stream(tree, trees.AXES, orbits) == {'a': True, 'b': True}
    assert symmetry.distance_by_stream(tree, trees.AXES, orbits) == {'a': 0.0, 'b': 0.0}
    projected = symmetry.project(tree, trees.AXES, orbits)
    jax.tree.map(np.testing.assert_array_equal, projected, tree)
    for index in ((0, 1), (2, 2)):
        changed = trees.changed(tree, 'mid', 'kernel', index, lambda x: x + 1e-3)
        symmetric, asymmetry, distance = measure(changed)
        assert not symmetric and asymmetry > 0 and distance > 0
        assert symmetry.unique_features(changed, trees.AXES, orbits)['mid'] == 2
        # A class of its own has no axis: it tells of both streams.
        assert symmetry.unique_features_by_stream(changed, trees.AXES, orbits) == {'a': 2, 'b': 2}
        by_stream = symmetry.is_symmetric_by_stream(changed, trees.AXES, orbits)
        assert by_stream == {'a': False, 'b': False}


def squared_distance(x, axes, orbits, entries):
    """From the mean over every class of weights that must be equal, in float64."""
    index = entries
    if index is None:
        index = np.arange(x.size).reshape(x.shape)
        for axis, name in enumerate(axes):
            if name is not None:
                index = np.take(index, orbits.first[name], axis)
    return sum(
        ((x[index == each] - x[index == each].mean()) ** 2).sum() for each in np.unique(index)
    )


@pytest.mark.parametrize('tree', [trees.tree_with_orbits(), trees.identity_tree()])
def test_distance_is_that_to_the_nearest_symmetric_tree(tree):
    """No symmetric tree is nearer than the mean; of a stream, none that is symmetric in it alone
    (weights that stand in a class of their own count whole for each of its streams)."""
    orbits = symmetry.find_orbits(tree, trees.AXES)
    rng = np.random.default_rng(2)
    noisy = jax.tree.map(lambda x: x + rng.normal(size=x.shape), tree)
    by_layer = dict.fromkeys(noisy, 0.0)
    by_stream = dict.fromkeys('ab', 0.0)
    for layer, arrays in noisy.items():
        for name, x in arrays.items():
            axes, entries = trees.AXES[layer][name], orbits.entries.get((layer, name))
            by_layer[layer] += squared_distance(x, axes, orbits, entries)
            for stream in set(axes) - {None}:
                own = [axis if axis == stream else None for axis in axes]
                by_stream[stream] += squared_distance(x, own, orbits, entries)
    with jax.enable_x64(True):
        measured = jax.jit(
            lambda tree: (
                symmetry.distance(tree, trees.AXES, orbits),
                symmetry.distance_by_stream(tree, trees.AXES, orbits),
            )
        )(noisy)
    for found, squares in zip(measured, (by_layer, by_stream), strict=True):
        assert found == pytest.approx({k: np.sqrt(x) for k, x in squares.items()}, rel=1e-13)


@pytest.mark.parametrize(
    'arrays,expected',
    [
        # (array, names of its axes): features are those of the largest array's last named axis
        ([(np.ones((3, 5)), ('a', 'b')), (np.arange(3.0), ('a',))], 1),
        ([(np.arange(3.0), ('a',)), (np.ones((3, 5)), ('a', 'b'))], 1),
        ([(np.ones((3, 5)), ('a', 'b')), (np.arange(5.0), ('b',))], 5),
        ([(np.arange(15.0).reshape(3, 5), ('a', 'b')), (np.ones(3), ('a',))], 5),
        ([(np.ones((3, 5)), ('a', None)), (np.arange(3.0), ('a',)), (np.arange(5.0), ('b',))], 3),
        ([(np.ones((2, 3, 5)), (None, None, None)), (np.arange(4.0), ('a',))], 4),
        ([(np.ones((3, 5)), ('a', 'b')), (np.arange(15.0).reshape(5, 3), ('b', 'a'))], 1),
    ],
)
def test_features_of_a_layer_are_those_of_one_axis_name(arrays, expected):
    """Whatever the order of the arrays; slices of others do not mix with theirs."""
    names = 'pqr'[: len(arrays)]
    tree = {'layer': {name: x for name, (x, _) in zip(names, arrays, strict=True)}}
    axes = {'layer': {name: each for name, (_, each) in zip(names, arrays, strict=True)}}
    assert symmetry.unique_features(tree, axes) == {'layer': expected}
    turned = {'layer': dict(reversed(axes['layer'].items()))}
    assert symmetry.unique_features(tree, turned) == {'layer': expected}


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_equal_if_their_bits_are(dtype, value):
    """Equal ones are no asymmetry, one alone is an infinite one; no measure is NaN."""
    tree = symmetric_tree(dtype)
    distance = jax.jit(lambda tree: symmetry.distance(tree, AXES))
    by_stream = jax.jit(
        lambda tree: (
            symmetry.is_symmetric_by_stream(tree, AXES),
            symmetry.distance_by_stream(tree, AXES),
        )
    )
    for name in ('scale', 'bias'):
        tree['bn'][name] = np.full_like(tree['bn'][name], value)
    assert measured(tree) == (True, {'conv': 0.0, 'bn': 0.0, 'head': 0.0})
    assert distance(tree) == {'conv': 0.0, 'bn': 0.0, 'head': 0.0}
    assert symmetry.unique_features(tree, AXES) == {'conv': 1, 'bn': 1, 'head': 1}
    assert symmetry.unique_features_by_stream(tree, AXES) == {'a': 1, 'b': 1}
    assert by_stream(tree) == ({'a': True, 'b': True}, {'a': 0.0, 'b': 0.0})

    for index in (0, 3):
        tree = trees.changed(symmetric_tree(dtype), 'bn', 'scale', index, lambda _: value)
        symmetric, asymmetry = measured(tree)
        assert not symmetric
        assert asymmetry == {'conv': 0.0, 'bn': np.inf, 'head': 0.0}
        assert distance(tree) == {'conv': 0.0, 'bn': np.inf, 'head': 0.0}
        assert symmetry.unique_features(tree, AXES) == {'conv': 1, 'bn': 2, 'head': 1}
        assert symmetry.unique_features_by_stream(tree, AXES) == {'a': 1, 'b': 2}
        assert by_stream(tree) == ({'a': True, 'b': False}, {'a': 0.0, 'b': np.inf})
        assert np.isnan(np.asarray(symmetry.transverse(tree, AXES)['bn']['scale'], float)).all()


def test_a_weight_that_is_not_finite_hides_no_asymmetry_of_another_layer():
    """It is left out of the size that deviations are relative to."""
    noisy = trees.changed(symmetric_tree(), 'head', 'kernel', (3, 2), lambda x: x + 0.5)
    _, expected = measured(noisy)
    for value in (np.nan, np.inf):
        _, asymmetry = measured(trees.changed(noisy, 'bn', 'bias', 2, lambda _, x=value: x))
        assert asymmetry['head'] == expected['head'] > 0
        assert asymmetry['bn'] == np.inf


MEASURES = [
    symmetry.is_symmetric, symmetry.is_symmetric_by_stream, symmetry.asymmetry,
    symmetry.asymmetry_by_stream, symmetry.distance, symmetry.distance_by_stream,
    symmetry.transverse, symmetry.project,
]  # fmt: skip


@pytest.mark.parametrize('measure', MEASURES)
def test_float64_is_measured_as_it_is_or_not_at_all(measure):
    """Features that differ by less than float32 can tell are not equal."""
    tree, axes = {'layer': {'w': np.array([1.0, 1.0 + 1e-12])}}, {'layer': {'w': ('h',)}}
    assert symmetry.unique_features(tree, axes) == {'layer': 2}
    with pytest.raises(ValueError, match=r'layer/w is float64, which JAX would round, and .*x64'):
        measure(tree, axes)
    with jax.enable_x64(True):
        found = jax.device_get(jax.tree.leaves(measure(tree, axes)))
    if measure is symmetry.project:
        assert (found[0] == 1.0).all()
    elif measure is symmetry.transverse:
        np.testing.assert_allclose(found[0], [-5e-13, 5e-13], rtol=1e-3)
    elif found[0].dtype == bool:
        assert not found[0]
    else:
        assert 5e-13 < found[0] < 2e-12


@pytest.mark.parametrize('measure', MEASURES)
@pytest.mark.parametrize('dtype', ['int32', 'complex64', 'bool'])
def test_what_is_no_real_float_is_refused(measure, dtype):
    tree = {'layer': {'w': np.ones(3, dtype)}}
    with pytest.raises(ValueError, match=f'layer/w is {dtype}; what features have must be real'):
        measure(tree, {'layer': {'w': ('h',)}})
    # Arrays without features, such as a number of steps or a key, may be anything.
    others = {'w': jnp.ones(3, dtype), 'keys': jax.random.split(jax.random.key(0), 3)}
    measure({'layer': others}, {'layer': {'w': (None,), 'keys': (None,)}})
