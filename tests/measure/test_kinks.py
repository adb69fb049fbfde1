import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import nnx

from zerojax import models
from zerojax.measure import kinks


def counts(function, *args):
    found = kinks.count(kinks.margins(function, *args))
    return {name: int(number) for name, number in found.items()}


class TwoLayers(nn.Module):
    """Not zerojax's: two ReLU layers and one leaky one."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(5, name='first')(x))
        x = Inner(name='inner')(x)
        return nn.leaky_relu(x)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(4, name='second')(x))


def small_integers(rng, shape):
    return jnp.asarray(rng.integers(-2, 3, shape), jnp.float32)


def test_inputs_exactly_at_the_kink_are_counted_in_each_layer():
    """Whole numbers are multiplied exactly, so NumPy finds the same zeros."""
    rng = np.random.default_rng(0)
    x = small_integers(rng, (16, 3))
    model = TwoLayers()
    params = {
        'first': {'kernel': small_integers(rng, (3, 5)), 'bias': jnp.zeros(5)},
        'inner': {'second': {'kernel': small_integers(rng, (5, 4)), 'bias': jnp.zeros(4)}},
    }
    first = np.asarray(x) @ np.asarray(params['first']['kernel'])
    second = np.maximum(first, 0) @ np.asarray(params['inner']['second']['kernel'])
    expected = {
        'TwoLayers/relu': (first == 0).sum(),
        'TwoLayers/inner/relu': (second == 0).sum(),
        'TwoLayers/leaky_relu': (second <= 0).sum(),
    }
    assert all(number > 0 for number in expected.values())

    def apply(params):
        return model.apply({'params': params}, x)

    assert counts(apply, params) == expected
    jitted = quick.jit(lambda params: kinks.count(kinks.margins(apply, params)))(params)
    assert {name: int(number) for name, number in jitted.items()} == expected


@pytest.mark.parametrize(
    'function,at_kink',
    [
        (nn.relu, 0.0), (nn.leaky_relu, 0.0), (jnp.abs, 0.0), (nn.relu6, 6.0), (nn.relu6, 0.0),
        (nn.hard_tanh, 1.0), (lambda x: jnp.where(x > 2, x, 0), 2.0),
        (lambda x: jnp.clip(x, -3, 4), -3.0), (lambda x: jnp.clip(x, -3, 4), 4.0),
        (lambda x: jax.lax.clamp(-3.0, x, 4.0), -3.0),
        (lambda x: jax.lax.clamp(-3.0, x, 4.0), 4.0),
        (jax.checkpoint(nn.relu), 0.0), (jax.jit(jax.vmap(nn.relu)), 0.0), (nn.elu, 0.0),
    ],
)  # fmt: skip
def test_any_piecewise_operation_has_kinks(function, at_kink):
    x = jnp.array([at_kink, -7.5, 7.5, at_kink])
    assert max(counts(function, x).values()) == 2


@pytest.mark.parametrize('function', [jnp.tanh, nn.gelu, nn.softplus, jnp.square])
def test_smooth_functions_have_none(function):
    assert set(counts(function, jnp.array([-1.0, 0.5, 1.0])).values()) <= {0}


def test_a_reduction_by_any_function_is_not_looked_into():
    """Its body is called with pairs of numbers, and not with the arrays."""
    x = jnp.array([[0.0, 1.0], [0.0, 0.0]])
    found = kinks.margins(
        lambda x: jax.lax.reduce(nn.relu(x), 0.0, lambda a, b: jnp.maximum(a, b) + 1, (1,)), x
    )
    assert [margin.shape for margin in found.values()] == [(2, 2)]


def test_layers_inside_a_scan_are_counted_over_all_iterations():
    x = jnp.array([[0.0, 1.0], [0.0, 0.0], [-1.0, 0.0]])

    def function(x):
        return jax.lax.scan(lambda carry, row: (carry + row, nn.relu(row)), x[0], x)

    found = kinks.margins(function, x)
    assert [margin.shape for margin in found.values()] == [(3, 2)]
    assert counts(function, x) == {'relu': 4}


def test_a_scan_is_told_its_constants_carries_and_rows_apart():
    """As a loop over the rows has it, whatever there is of each."""
    weights, bias = jnp.array([[1.0, -2.0], [0.5, 1.0]]), jnp.array([-1.0, 0.25])
    rows, scales = jnp.arange(6.0).reshape(3, 2), jnp.array([1.0, -1.0, 2.0])

    def iteration(carry, each):
        mean, number = carry
        row, scale = each
        out = nn.relu(scale * (row @ weights) + bias - mean)
        return (mean + out, number + 1), (out, number)

    def scan(rows, scales):
        carry, (outs, numbers) = jax.lax.scan(iteration, (bias, 0), (rows, scales))
        return nn.relu(outs - carry[0][None]) * numbers[:, None]

    inside, outside = kinks.margins(scan, rows, scales).values()
    carry, expected, outs = (bias, 0), [], []
    for each in zip(rows, scales, strict=True):
        expected.append(each[1] * (each[0] @ weights) + bias - carry[0])
        carry, (out, _) = iteration(carry, each)
        outs.append(out)
    np.testing.assert_array_equal(inside, jnp.stack(expected))
    np.testing.assert_array_equal(outside, jnp.stack(outs) - carry[0][None])


def test_nnx_models_have_no_scopes_but_an_order():
    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)) for _ in range(1)])

        def __call__(self, x):
            return nnx.relu(nnx.relu(self.layers[0](x)))

    graph, state = nnx.split(Model())
    state = jax.tree.map(jnp.ones_like, state)
    x = jnp.array([[-1.0, 0.0], [-1.0, -1.0]])
    found = counts(lambda state: nnx.merge(graph, state)(x), state)
    assert found == {'relu': 3, 'relu_1': 6}


def test_crossings_are_inputs_that_a_perturbation_moves_over_the_kink():
    x = jnp.array([0.0, 0.1, -0.2, 3.0, 0.0])
    tangent = jnp.array([1.0, -1.0, 1.0, 1.0, 0.0])

    def crossed(epsilon):
        return int(kinks.crossings(nn.relu, x, tangent, epsilon)['relu'])

    assert [crossed(epsilon) for epsilon in (0.0, 0.05, 0.15, 0.25)] == [1, 1, 2, 3]


def test_a_relus_own_derivative_at_its_kink_is_kept():
    """JAX takes it as 0: what comes behind is not moved."""
    found = kinks.crossings(lambda x: nn.relu(nn.relu(x)), jnp.zeros(3), jnp.ones(3), epsilon=0.0)
    assert {name: int(number) for name, number in found.items()} == {'relu': 3, 'relu_1': 0}


@pytest.mark.parametrize('shortcut', ['pre_relu', 'post_relu'])
def test_constnet_starts_at_the_last_relus_kink_where_the_shortcut_reads_behind_a_relu(shortcut):
    model = models.create('constnet', depth=7, width=1, shortcut=shortcut, convolution='patches')
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    variables = quick.jit(lambda: model.init(jax.random.key(1), x, train=False))()

    @quick.jit
    def count(variables):
        def apply(variables):
            return model.apply(variables, x, train=True, mutable=['batch_stats'])

        return kinks.count(kinks.margins(apply, variables))

    found = {name: int(number) for name, number in count(variables).items() if number}
    if shortcut == 'pre_relu':
        assert found == {}
    else:
        assert set(found) == {'ConstNet/relu'}
        assert found['ConstNet/relu'] % 64 == 0  # all features of a position alike


@pytest.mark.parametrize('epsilon', [0.0, 0.5, 1.0, 2.0, -1.0])
@pytest.mark.parametrize(
    'function,kink',
    [
        (nn.relu, 0), (nn.leaky_relu, 0), (jnp.abs, 0), (lambda x: jnp.minimum(x, 3.0), 3),
        (lambda x: jnp.maximum(2.0, x), 2), (lambda x: jnp.where(x < 1.0, 0.0, x), 1),
    ],
)  # fmt: skip
def test_crossings_are_those_of_the_moved_inputs_themselves(function, kink, epsilon):
    """Before and after on whole numbers: not the same strict side; away from the kink is none."""
    x, rate = (grid.ravel().astype(np.float32) for grid in np.mgrid[-6:7, -4:5])
    before, after = x - kink, x - kink + epsilon * rate
    expected = np.sum((rate != 0) & ((before == 0) | (before * after <= 0)))
    (found,) = kinks.crossings(function, jnp.asarray(x), jnp.asarray(rate), epsilon).values()
    assert int(found) == expected > 0


def test_an_input_that_moves_away_from_the_kink_does_not_cross_it():
    found = kinks.crossings(nn.relu, jnp.array([0.5, -0.5]), jnp.array([1.0, -1.0]), epsilon=1.0)
    assert int(found['relu']) == 0
