"""Permuting features changes no function, and weight matching undoes it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from zerojax import models, perturb
from zerojax.compare import similarity
from zerojax.symmetry import alignment
from zerojax.symmetry.orbits import feature_counts

NETWORKS = [
    {'name': 'constnet', 'depth': 10, 'width': 1},
    {'name': 'constnet', 'depth': 7, 'width': 2, 'shortcut': 'pre_relu'},
    {'name': 'leakynet', 'depth': 10, 'width': 1, 'init': '1_ii_i1_11'},
    {'name': 'wideresnet', 'depth': 10, 'width': 1, 'init': 'he'},
    {'name': 'wideresnet', 'depth': 16, 'width': 1, 'init': 'fixup'},
    {'name': 'mlp', 'width': 40, 'init': 'random'},
]


def any_variables(model, seed):
    """Variables as a trained network has them: every array of other numbers, variances above 0."""
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    )
    rng = np.random.default_rng(seed)
    return {
        name: jax.tree.map(lambda x: rng.uniform(0.1, 0.5, x.shape), shapes.get(name, {}))
        for name in ('params', 'batch_stats')
    }


def initial_params(model):
    return quick.jit(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)['params']
    )()


def random_permutations(tree, axes, seed=0):
    rng = np.random.default_rng(seed)
    counts = feature_counts(tree, axes)
    return {name: rng.permutation(count) for name, count in counts.items()}


def permute_all(variables, axes, permutations):
    return {k: alignment.permute(x, axes[k], permutations) for k, x in variables.items()}


@pytest.mark.parametrize('network', NETWORKS)
def test_permuted_features_compute_the_same_function(network):
    model = models.create(**network)
    variables, axes = any_variables(model, 0), model.feature_axes()
    permutations = random_permutations(variables['params'], axes['params'])
    permuted = permute_all(variables, axes, permutations)
    with jax.enable_x64(True):
        images = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8, 8, 1)))
        apply = quick.jit(lambda x: model.apply(x, images, train=False))
        logits, after = apply(variables), apply(permuted)
    np.testing.assert_allclose(after, logits, rtol=1e-12)
    assert similarity.l2_distance(variables, permuted) > 1


@pytest.mark.parametrize('network', NETWORKS)
@pytest.mark.parametrize('seed', range(3))
def test_weight_matching_finds_the_permutations(network, seed):
    model = models.create(**network)
    variables, axes = any_variables(model, seed), model.feature_axes()
    permutations = random_permutations(variables['params'], axes['params'], seed)
    permuted = permute_all(variables, axes, permutations)
    found = alignment.weight_matching(variables['params'], permuted['params'], axes['params'])
    back = permute_all(permuted, axes, found)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_features_that_hardly_differ_are_told_apart(dtype):
    model = models.create('constnet', depth=10, width=1)
    axes = model.feature_axes()['params']
    params = initial_params(model)
    params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)
    noise = 4 * float(jnp.finfo(dtype).eps)
    params = quick.jit(perturb.gaussian)(params, jax.random.key(1), noise)
    params = jax.device_get(params)
    permuted = alignment.permute(params, axes, random_permutations(params, axes))
    found = alignment.weight_matching(params, permuted, axes)
    jax.tree.map(np.testing.assert_array_equal, alignment.permute(permuted, axes, found), params)


def test_one_name_is_matched_as_well_as_any_permutation_could():
    model = models.create('mlp', width=6, init='random')
    axes = model.feature_axes()['params']
    a, b = (any_variables(model, seed)['params'] for seed in (0, 1))
    distances = [
        similarity.l2_distance(a, alignment.permute(b, axes, {'hidden': np.array(order)}))
        for order in itertools.permutations(range(6))
    ]
    found = alignment.permute(b, axes, alignment.weight_matching(a, b, axes))
    assert similarity.l2_distance(a, found) == pytest.approx(min(distances), rel=1e-14)


def test_matching_brings_independent_networks_closer_and_repeats():
    model = models.create('constnet', depth=10, width=1)
    axes = model.feature_axes()['params']
    a, b = (any_variables(model, seed)['params'] for seed in (0, 1))
    found = alignment.weight_matching(a, b, axes)
    aligned = alignment.permute(b, axes, found)
    assert similarity.l2_distance(a, aligned) < 0.99 * similarity.l2_distance(a, b)
    jax.tree.map(np.testing.assert_array_equal, alignment.weight_matching(a, b, axes), found)
    again = alignment.weight_matching(a, aligned, axes)
    assert similarity.l2_distance(a, alignment.permute(aligned, axes, again)) <= (
        similarity.l2_distance(a, aligned)
    )


def test_features_that_are_equal_stay_where_they_are():
    model = models.create('constnet', depth=10, width=1)
    axes = model.feature_axes()['params']
    params = initial_params(model)
    other = any_variables(model, 0)['params']
    for name, order in alignment.weight_matching(other, params, axes).items():
        np.testing.assert_array_equal(order, np.arange(len(order)), name)


def test_any_dictionary_will_do_and_what_is_not_permuted_stays():
    tree = {'in': np.arange(6.0).reshape(2, 3), 'out': {'w': np.arange(3, dtype=np.float32)}}
    axes = {'in': (None, 'h'), 'out': {'w': ('h',)}}
    permuted = alignment.permute(tree, axes, {'h': np.array([2, 0, 1])})
    np.testing.assert_array_equal(permuted['in'], [[2, 0, 1], [5, 3, 4]])
    np.testing.assert_array_equal(permuted['out']['w'], [2, 0, 1])
    assert permuted['out']['w'].dtype == np.float32
    same = alignment.permute(tree, axes, {})
    jax.tree.map(np.testing.assert_array_equal, same, tree)


def test_trees_that_do_not_fit_are_refused():
    tree, axes = {'w': np.zeros((2, 3))}, {'w': ('a', 'b')}
    with pytest.raises(ValueError, match='differ in v'):
        alignment.permute(tree, axes | {'v': ('a',)}, {})
    with pytest.raises(ValueError, match='differ in their numbers of features'):
        alignment.weight_matching(tree, {'w': np.zeros((2, 4))}, axes)
