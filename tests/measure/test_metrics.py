"""Measurements against NumPy and against their definitions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from zerojax import models
from zerojax.measure import metrics

RNG = np.random.default_rng(0)

mean_correlation = quick.jit(metrics.mean_correlation)
effective_width = quick.jit(metrics.effective_width)
count_unique_features = quick.jit(metrics.count_unique_features)


def paper_correlation(rows):
    """The paper's definition, by NumPy: NaN (a row without variance) counts as 1."""
    with np.errstate(invalid='ignore'):
        correlations = np.corrcoef(rows)
    correlations[np.isnan(correlations)] = 1.0
    n = len(rows)
    return np.tril(correlations, -1).sum() / (n * (n - 1) / 2)


@quick.jit
def correlations(kernel, transposed):
    return metrics.forward_correlation(kernel), metrics.backward_correlation(transposed)


@pytest.mark.parametrize('shape', [(3, 3, 5, 7), (1, 1, 16, 4), (11, 6), (3, 3, 2, 2)])
@pytest.mark.parametrize('constant', [0, 1, 2])
@pytest.mark.parametrize('scale', [1.0, 1e-30])
def test_correlations_are_numpys_with_nan_as_1(shape, constant, scale):
    kernel = RNG.normal(size=shape) * scale
    kernel[..., :constant] = scale
    with jax.enable_x64(True):
        forward, backward = correlations(kernel, kernel.swapaxes(-1, -2))
    rows = np.moveaxis(kernel, -1, 0).reshape(shape[-1], -1)
    assert float(forward) == pytest.approx(paper_correlation(rows), abs=1e-13)
    assert float(backward) == pytest.approx(paper_correlation(rows), abs=1e-13)


def test_correlation_in_float32_of_weights_whose_squares_underflow():
    rows = RNG.normal(size=(6, 50))
    actual = mean_correlation(jnp.asarray(rows * 1e-30, jnp.float32))
    assert float(actual) == pytest.approx(paper_correlation(rows), abs=1e-6)


def test_correlation_of_equal_and_of_opposite_features():
    row = RNG.normal(size=(1, 20)).astype(np.float32)
    equal = jnp.asarray(np.repeat(row, 64, axis=0))
    assert float(mean_correlation(equal)) == pytest.approx(1, abs=1e-6)
    opposite = jnp.asarray(np.concatenate([row, -row]))
    assert float(mean_correlation(opposite)) == pytest.approx(-1, abs=1e-6)
    assert float(mean_correlation(jnp.zeros((4, 9)))) == 1
    assert float(mean_correlation(jnp.zeros((50_000, 2)))) == 1, 'n² is no int32'
    with pytest.raises(ValueError, match='needs two'):
        mean_correlation(equal[:1])


def test_diversity():
    c = np.array([0.0, 0.3, -0.9])
    expected = np.log(np.sqrt(1 - c**2)).sum()
    assert float(metrics.diversity(jnp.asarray(c, jnp.float32))) == pytest.approx(
        expected, rel=1e-5
    )
    assert float(metrics.diversity(jnp.array([0.5, 1.0]))) == -np.inf


def test_feature_variance_is_that_of_the_papers_code():
    """torch: t - mean over channels, squared, averaged over everything."""
    t = RNG.normal(size=(4, 5, 6, 7))
    expected = ((t - t.mean(-1, keepdims=True)) ** 2).mean()
    with jax.enable_x64(True):
        assert float(metrics.feature_variance(jnp.asarray(t))) == pytest.approx(expected, rel=1e-12)
        assert float(metrics.second_moment(jnp.asarray(t))) == pytest.approx(
            (t**2).mean(), rel=1e-12
        )
    assert float(metrics.feature_variance(jnp.full((3, 8), 0.1))) < 1e-15


@pytest.mark.parametrize('scale', [1.0, 1e-30, 1e30])
def test_effective_width_is_the_participation_ratio_of_singular_values(scale):
    t = RNG.normal(size=(3, 10, 6)) * np.array([1, 2, 3, 4, 5, 0.1])
    s = np.linalg.svd(t.reshape(-1, 6), compute_uv=False)
    expected = (s**2).sum() ** 2 / (s**4).sum()
    actual = effective_width(jnp.asarray(t * scale, jnp.float32))
    assert float(actual) == pytest.approx(expected, rel=1e-5)


def test_effective_width_at_its_ends():
    assert float(effective_width(jnp.eye(8))) == pytest.approx(8)
    rank_one = jnp.asarray(np.outer(RNG.normal(size=20), RNG.normal(size=9)), jnp.float32)
    assert float(effective_width(rank_one)) == pytest.approx(1, rel=1e-6)
    assert float(effective_width(jnp.zeros((5, 4)))) == 0


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_unique_features_counts_bits(dtype):
    t = np.repeat(RNG.normal(size=(2, 5, 1)), 9, axis=2)
    t[0, 0, 3] = np.nextafter(t[0, 0, 3], 9, dtype=np.float64)
    x = jnp.asarray(t, dtype)
    assert int(count_unique_features(x)) == 1, 'the difference is below the precision'
    bits = {jnp.float32: jnp.uint32, jnp.bfloat16: jnp.uint16}[dtype]
    one_ulp = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(x[1, 4, 5], bits) + bits(1), dtype
    )
    assert int(count_unique_features(x.at[1, 4, 5].set(one_ulp))) == 2
    assert int(count_unique_features(x.at[..., 2].set(0.0).at[..., 7].set(-0.0))) == 2
    subnormal = jnp.zeros((3, 2), dtype).at[0, 0].set(jnp.finfo(dtype).smallest_subnormal)
    assert int(count_unique_features(subnormal)) == 2
    random = RNG.normal(size=(4, 30))
    assert int(count_unique_features(jnp.asarray(random, jnp.float32))) == 30


class Chain(nn.Module):
    """tanh(x a) b, as anyone's model."""

    @nn.compact
    def __call__(self, x):
        hidden = jnp.tanh(nn.Dense(5, name='first')(x))
        return nn.Dense(2, use_bias=False, name='second')(hidden)


def test_layer_outputs_are_activations_and_gradients_of_any_model():
    x = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
    variables = Chain().init(jax.random.key(0), x)

    def loss():
        return jnp.sum(Chain().apply(variables, x) ** 2)

    activations, gradients = quick.jit(lambda: metrics.layer_outputs(loss, ['first', 'second']))()
    weights = variables['params']
    first = x @ weights['first']['kernel'] + weights['first']['bias'][None]
    second = jnp.tanh(first) @ weights['second']['kernel']
    np.testing.assert_allclose(activations['first'], first, rtol=1e-6)
    np.testing.assert_allclose(activations['second'], second, rtol=1e-5)
    np.testing.assert_allclose(gradients['second'], 2 * second, rtol=1e-5)
    back = (2 * second @ weights['second']['kernel'].T) * (1 - jnp.tanh(first) ** 2)
    np.testing.assert_allclose(gradients['first'], back, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"layers=\['third'\]: no submodules"):
        metrics.layer_outputs(loss, ['first', 'third'])


def test_a_symmetric_network_has_one_feature_a_layer_by_every_measure():
    model = models.create('constnet', depth=7, width=1)
    images = jnp.asarray(RNG.normal(size=(4, 8, 8, 3)), jnp.float32)
    variables = quick.jit(lambda: model.init(jax.random.key(0), images, train=False))()
    variables['params']['head']['kernel'] += 0.1

    @quick.jit
    def measure(variables):
        def loss():
            logits, _ = model.apply(variables, images, train=True, mutable=['batch_stats'])
            return jnp.mean(logits[:, 0] ** 2)

        measured = metrics.of_layer_outputs(*metrics.layer_outputs(loss, model.layers()))
        return measured, metrics.of_kernels(variables['params'])

    measured, of_kernels = measure(variables)
    assert measured['signal'].keys() == set(model.layers())
    for layer in model.layers():
        assert int(measured['unique_activations'][layer]) == 1
        assert float(measured['effective_width'][layer]) == pytest.approx(1, rel=1e-5)
        assert measured['feature_variance'][layer] < 1e-12 * measured['signal'][layer]
        assert measured['gradient'][layer] > 0
        assert measured['gradient_variance'][layer] < 1e-12 * measured['gradient'][layer]
    for name in ('forward_correlation', 'backward_correlation'):
        for layer, value in of_kernels[name].items():
            assert float(value) == pytest.approx(1, abs=1e-6), layer
    kernels = metrics.kernels_by_layer(variables['params'])
    assert of_kernels['backward_correlation'].keys() == kernels.keys()


def test_a_row_with_a_nan_counts_as_1_and_an_infinity_gives_nan():
    rows = RNG.normal(size=(5, 12)).astype(np.float32)
    rows[1, 3] = np.nan
    actual = float(metrics.mean_correlation(jnp.asarray(rows)))
    assert actual == pytest.approx(paper_correlation(rows.astype(float)), abs=1e-6)
    rows[1, 3] = np.inf
    assert np.isnan(float(metrics.mean_correlation(jnp.asarray(rows))))


def test_no_kernel_of_a_layer_hides_another():
    params = {'attention': {'query': np.ones((2, 3)), 'value': np.eye(3), 'bias': np.ones(3)}}
    found = metrics.kernels_by_layer(params | {'dense': {'kernel': np.ones((4, 1))}})
    assert {name: x.shape for name, x in found.items()} == {
        'attention/query': (2, 3), 'attention/value': (3, 3), 'dense': (4, 1),
    }  # fmt: skip
