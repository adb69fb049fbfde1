"""Distances against their definitions and the invariances they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerojax.compare import similarity

RNG = np.random.default_rng(0)


def test_distance_and_angle():
    a = {'x': np.array([3.0, 0.0]), 'y': {'z': np.array([[4.0]])}}
    b = {'x': np.array([0.0, 12.0]), 'y': {'z': np.array([[4.0]])}}
    assert similarity.l2_distance(a, b) == pytest.approx(np.sqrt(9 + 144), rel=1e-15)
    cosine = 16 / (5 * np.sqrt(160))
    assert similarity.angle(a, b) == pytest.approx(np.degrees(np.arccos(cosine)), rel=1e-14)
    doubled = jax.tree.map(lambda x: 2 * x, a)
    assert similarity.angle(a, doubled) == 0
    assert similarity.angle(a, jax.tree.map(np.negative, a)) == pytest.approx(180, rel=1e-15)
    assert np.isnan(similarity.angle(a, jax.tree.map(np.zeros_like, a)))


def test_the_distance_of_a_stream_is_over_the_arrays_that_it_indexes():
    axes = {'x': (None, 'a'), 'y': ('a', 'b'), 'z': ('b', 'b'), 'other': (None,)}
    a = {name: RNG.normal(size=(3,) * len(names)) for name, names in axes.items()}
    b = jax.tree.map(lambda x: x + RNG.normal(size=x.shape), a)
    squares = {name: np.sum((a[name] - b[name]) ** 2) for name in axes}
    expected = {
        'a': np.sqrt(squares['x'] + squares['y']), 'b': np.sqrt(squares['y'] + squares['z'])
    }  # fmt: skip
    assert similarity.l2_by_stream(a, b, axes) == pytest.approx(expected, rel=1e-14)


def test_small_angles_are_not_lost_in_the_cosine():
    a, b = np.array([1.0, 0.0]), np.array([1.0, 1e-10])
    assert similarity.angle(a, b) == pytest.approx(np.degrees(1e-10), rel=1e-9)


def test_disagreement():
    assert similarity.disagreement(np.array([0, 1, 2, 3]), np.array([0, 1, 1, 3])) == 0.25


def debiased_cka(a, b):
    """Of features [N, ...]."""
    return similarity.debiased_cka(np.asarray(similarity.gram(a)), np.asarray(similarity.gram(b)))


def hsic_1(k, m):
    """Equation 5 of Song et al., 2012, term by term."""
    n, ones = len(k), np.ones(len(k))
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    means = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + means - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))


@pytest.mark.parametrize('n', [4, 5, 30])
def test_debiased_cka_is_that_of_its_definition(n):
    x = RNG.normal(size=(n, 7)) + 2
    y = np.concatenate([x[:, :3] ** 2, RNG.normal(size=(n, 4))], axis=1)
    k, m = x @ x.T, y @ y.T
    expected = hsic_1(k, m) / np.sqrt(hsic_1(k, k) * hsic_1(m, m))
    with jax.enable_x64(True):
        actual = debiased_cka(jnp.asarray(x), jnp.asarray(y))
    assert actual == pytest.approx(expected, rel=1e-10)
    assert similarity.debiased_cka(k, m) == pytest.approx(expected, rel=1e-10), 'centred or not'


@pytest.mark.parametrize('examples,features', [(6, 3), (20, 20), (30, 2000), (100, 10)])
def test_independent_features_have_no_debiased_cka_in_the_mean(examples, features):
    """However many there are; the usual estimate says they are alike."""
    found = []
    for _ in range(200):
        a, b = RNG.normal(size=(2, examples, features))
        grams = [x @ x.T for x in (a - a.mean(0), b - b.mean(0))]
        usual = np.vdot(*grams) / np.prod([np.linalg.norm(each) for each in grams])
        found.append((similarity.debiased_cka(*grams), usual))
    debiased, biased = np.transpose(found)
    assert abs(debiased.mean()) < 4 * debiased.std() / np.sqrt(len(found))
    assert debiased.std() < 0.6
    assert biased.mean() > 10 * biased.std() / np.sqrt(len(found))
    if features > 50 * examples:
        assert biased.mean() > 0.95


def test_debiased_cka_does_not_see_rotation_scale_or_shift():
    x, y = RNG.normal(size=(20, 3, 2)), RNG.normal(size=(20, 5))
    rotation = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    turned = 1e3 * (x.reshape(20, 6) @ rotation) + RNG.normal(size=(1, 6))
    with jax.enable_x64(True):
        x, y, turned = jnp.asarray(x), jnp.asarray(y), jnp.asarray(turned)
        assert debiased_cka(x, turned) == pytest.approx(1, abs=1e-12)
        assert debiased_cka(turned, y) == pytest.approx(debiased_cka(x, y), rel=1e-10)
        stretched = x * jnp.array([[[1.0, 1.0]] * 2 + [[5.0, 5.0]]])
        assert debiased_cka(x, stretched) < 0.95, 'but it sees any other linear map'


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('scale', [1.0, 1e-30, 1e30])
def test_debiased_cka_with_itself_is_1_at_any_scale(dtype, scale):
    x = jnp.asarray(RNG.normal(size=(16, 40)) * scale, dtype)
    assert debiased_cka(x, x) == pytest.approx(1, abs=1e-12)


def test_debiased_cka_where_nothing_is_left_to_compare_is_nan():
    """Constant features, examples all equally far apart, and fewer than four of them."""
    x = jnp.asarray(RNG.normal(size=(9, 4)), jnp.float32)
    for other in (jnp.ones((9, 4)), jnp.full((9, 4), 0.1), jnp.eye(9)):
        assert np.isnan(debiased_cka(x, other))
    assert np.isnan(debiased_cka(x[:3], x[:3]))
