import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

from zerojax import models, perturb, step, symmetry
from zerojax.measure import stability
from zerojax.step import optimizer


class TanhNet(nn.Module):
    """Not zerojax's: two layers, all features alike at the start."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(6, kernel_init=nn.initializers.constant(0.3), name='first')(x))
        x = nn.tanh(nn.Dense(5, kernel_init=nn.initializers.constant(0.2), name='second')(x))
        return nn.Dense(3, kernel_init=nn.initializers.zeros, name='head')(x)


TANH_AXES = {
    'first': {'kernel': (None, 'a'), 'bias': ('a',)},
    'second': {'kernel': ('a', 'b'), 'bias': ('b',)},
    'head': {'kernel': ('b', None), 'bias': (None,)},
}


@pytest.fixture
def float64():
    # A network computes in the dtype of its parameters; constants in a model need standard rules.
    with jax.enable_x64(True), jax.numpy_dtype_promotion('standard'):
        yield


def as_float64(tree):
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def classification(count, size=4):
    rng = np.random.default_rng(3)
    return [
        {'x': rng.normal(0.5, 1, (8, size)), 'y': np.eye(3)[rng.integers(0, 3, 8)]}
        for _ in range(count)
    ]


def step_of(model, tx):
    def one_step(state, batch):
        params, opt_state = state

        def loss(params):
            logits = model.apply({'params': params}, batch['x'])
            return jnp.mean(optax.softmax_cross_entropy(logits, batch['y']))

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return one_step


def setup(model, tx):
    params = quick.jit(
        lambda: as_float64(model.init(jax.random.key(0), jnp.ones((1, 4)))['params'])
    )()
    return step_of(model, tx), (params, tx.init(params))


tangents_of = quick.jit(stability.gaussian_tangents)


def perturbed(state, tangent, epsilon):
    params = jax.tree.map(lambda w, t: w + epsilon * t, state[0], tangent)
    return params, state[1]


def measured(one_step, state, batches, axes):
    """Asymmetry and distance of the weights at every step."""

    @quick.jit
    def measure(params):
        asymmetries = jnp.stack(list(symmetry.asymmetry(params, axes).values()))
        distances = jnp.stack(list(symmetry.distance(params, axes).values()))
        return jnp.max(asymmetries), jnp.linalg.norm(distances)

    one_step = quick.jit(one_step)
    found = [measure(state[0])]
    for batch in batches:
        state = one_step(state, batch)
        found.append(measure(state[0]))
    return np.array(found).T


def test_growth_is_that_of_two_actual_runs(float64):
    """Also of the second tangent, which the QR method does not push as it stands, and through an
    optimizer state that is not a function of each weight alone."""
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2))
    one_step, state = setup(TanhNet(), tx)
    # Adam's first step divides by the size of the gradient, which must not be 0.
    state[0]['head']['kernel'] += jnp.array([0.5, -0.1, 0.2])[None, :]
    batches = classification(25)
    tangents = tangents_of(state[0], jax.random.split(jax.random.key(1), 2))
    grown = stability.growth(one_step, state, batches, tangents, TANH_AXES)
    for i in range(2):
        tangent = jax.tree.map(lambda x, i=i: x[i], tangents)
        asymmetry, distance = measured(
            one_step, perturbed(state, tangent, 1e-8), batches, TANH_AXES
        )
        # The symmetric part of the perturbation adds an error of second order.
        np.testing.assert_allclose(np.exp(grown.log_asymmetry[:, i]) * 1e-8, asymmetry, rtol=1e-5)
        np.testing.assert_allclose(np.exp(grown.log_distance[:, i]) * 1e-8, distance, rtol=1e-5)
    assert np.ptp(grown.log_distance, axis=0).min() > 0.03


def quadratic(curvatures, symmetric_curvature, learning_rate, momentum):
    """Two features a layer; the transverse direction of layer i has curvature i. Momentum SGD."""

    def loss(params):
        total = jnp.zeros((), jnp.float64)
        for curvature, layer in zip(curvatures, params.values(), strict=True):
            mean, half = jnp.mean(layer['w']), (layer['w'][0] - layer['w'][1]) / 2
            total += symmetric_curvature * mean**2 + curvature * half**2
        return total

    def one_step(state, _):
        params, velocity = state
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, jax.grad(loss)(params))
        return jax.tree.map(lambda w, v: w - learning_rate * v, params, velocity), velocity

    params = {f'layer{i}': {'w': jnp.full(2, 1e-3, jnp.float64)} for i in range(len(curvatures))}
    axes = {f'layer{i}': {'w': (f'f{i}',)} for i in range(len(curvatures))}
    return one_step, (params, jax.tree.map(jnp.zeros_like, params)), axes


def test_exponents_of_momentum_at_a_saddle_are_the_logarithms_of_its_eigenvalues(float64):
    """w' = w - η v', v' = μ v + h w has eigenvalues r with r² - (1 + μ - η h) r + μ = 0. The
    symmetric direction grows faster, but a tangent that starts transverse stays so."""
    rate, momentum = 0.1, 0.9
    one_step, state, axes = quadratic((-0.3, -1.0), -3.0, rate, momentum)
    tangents = tangents_of(state[0], jax.random.split(jax.random.key(0), 2))
    grown = stability.growth(one_step, state, [None] * 200, tangents, axes)
    expected = sorted(
        (np.log(max(np.roots([1, -(1 + momentum - rate * h), momentum]))) for h in (-0.3, -1.0)),
        reverse=True,
    )
    np.testing.assert_allclose(grown.log_stretch[150:].mean(0), expected, rtol=1e-9)
    np.testing.assert_allclose(grown.exponents()[-1], grown.log_stretch.mean(0), rtol=1e-12)
    # What the first steps add is divided by their number.
    late = grown.exponents()[199] * 200 - grown.exponents()[149] * 150
    np.testing.assert_allclose(late / 50, expected, rtol=1e-9)


def test_only_the_transverse_part_counts_and_the_tangents_order_does_not(float64):
    one_step, state = setup(TanhNet(), optax.sgd(0.3, momentum=0.9))
    state[0]['head']['kernel'] += jnp.array([0.5, -0.1, 0.2])[None, :]
    batches = classification(12)
    tangents = tangents_of(state[0], jax.random.split(jax.random.key(1), 3))
    symmetric = jax.tree.map(lambda w: jnp.ones((3, *w.shape), w.dtype), state[0])

    def log_asymmetry(tangents):
        return stability.growth(one_step, state, batches, tangents, TANH_AXES).log_asymmetry

    plain = log_asymmetry(tangents)
    other = log_asymmetry(jax.tree.map(lambda t, s: t[::-1] + 3 * s, tangents, symmetric))
    np.testing.assert_allclose(other[:, ::-1], plain, atol=1e-9)


def test_zerojaxs_train_step_and_the_noise_of_its_own_run(float64):
    model = models.create('mlp', width=6, init='averaging', num_classes=3)
    tx = optimizer.sgd(optax.constant_schedule(0.1), 0.9, False, 5e-4)
    state = quick.jit(
        lambda: as_float64(step.create_state(model, tx, (2, 2, 1), seed=0, perturbation_seed=5))
    )()
    batches = [
        {'image': each['x'].reshape(8, 2, 2, 1), 'label': each['y']} for each in classification(30)
    ]
    axes = model.feature_axes()['params']
    key = jax.random.fold_in(state.keys['perturbation'], 0)
    tangents = tangents_of(state.params, key[None])
    one_step = stability.of_train_step(step.train_step_function(model, tx))
    grown = stability.growth(one_step, stability.split(state), batches, tangents, axes)

    perturbation = perturb.Perturbation('gaussian', 1e-9)
    run = step.make_train_step(model, tx, perturbation=perturbation)
    state = jax.tree.map(jnp.copy, state)
    asymmetry_of = quick.jit(
        lambda params: jnp.max(jnp.stack(list(symmetry.asymmetry(params, axes).values())))
    )
    for number, batch in enumerate(batches, start=1):
        state, _ = run(state, batch)
        asymmetry = float(asymmetry_of(state.params))
        assert np.log(asymmetry / 1e-9) == pytest.approx(grown.log_asymmetry[number, 0], abs=1e-4)


def test_onset_is_the_first_step_at_the_threshold():
    growth = np.log(np.array([1.0, 2.0, 8.0, 4.0, 100.0]))
    assert stability.predict_onset(growth, 0.03) == 2
    assert stability.predict_onset(growth, 0.01) == 4
    assert stability.predict_onset(growth, 0.2) == 0
    assert stability.predict_onset(growth, 1e-4) is None
    assert stability.predict_onset(growth, 1e-4, threshold=1e-3) == 4
    assert stability.predict_onset(growth, 0.05, threshold=0.39) == 2


def test_a_larger_perturbation_is_never_later():
    growth = np.cumsum(np.random.default_rng(0).normal(0.1, 0.3, 200))
    onsets = [stability.predict_onset(growth, 10.0**-k) for k in range(12)]
    reached = [onset for onset in onsets if onset is not None]
    assert reached == sorted(reached) and len(set(reached)) > 3
    assert None in onsets and None not in onsets[: len(reached)]


class Kinked(nn.Module):
    """Not zerojax's: at the start the inputs of the second ReLU are 0 where the first gives 0."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, kernel_init=nn.initializers.constant(0.5), use_bias=False, name='first')(x)
        y = nn.Dense(6, kernel_init=nn.initializers.zeros, use_bias=False, name='second')(
            jnp.tanh(x)
        )
        out = nn.relu(nn.relu(x) + y)
        return nn.Dense(3, kernel_init=nn.initializers.zeros, name='head')(out)


KINKED_AXES = {
    'first': {'kernel': (None, 'a')},
    'second': {'kernel': ('a', 'b')},
    'head': {'kernel': ('b', None), 'bias': (None,)},
}


def test_at_a_kink_only_the_one_sided_step_is_right(float64):
    one_step, state = setup(Kinked(), optax.sgd(0.03, momentum=0.9))
    state[0]['head']['kernel'] += jnp.array([0.5, -0.1, 0.2])[None, :]
    batches = [each | {'x': each['x'] - 0.5} for each in classification(8)]
    tangents = tangents_of(state[0], jax.random.key(1)[None])
    tangent = jax.tree.map(lambda x: x[0], tangents)
    runs = [
        np.log(measured(one_step, perturbed(state, tangent, epsilon), batches, KINKED_AXES)[0])
        for epsilon in (1e-12, 1e-9)
    ]
    np.testing.assert_allclose(runs[0][1:], runs[1][1:], atol=1e-4)  # finite, whatever its size
    arguments = (one_step, state, batches, tangents, KINKED_AXES)
    smooth = stability.growth(*arguments).log_asymmetry[:, 0] + np.log(1e-9)
    assert (smooth[1:] < runs[1][1:] - 5).all()
    one_sided = stability.one_sided_log_asymmetry(*arguments, exact_steps=1)[:, 0]
    assert one_sided.shape == (9,)
    np.testing.assert_allclose(one_sided[1:], runs[1][1:], atol=0.15)
    np.testing.assert_allclose(one_sided[1], runs[1][1], atol=1e-5)


def test_without_kinks_exact_first_steps_change_nothing(float64):
    one_step, state = setup(TanhNet(), optax.sgd(0.3, momentum=0.9))
    batches = classification(6)
    tangents = tangents_of(state[0], jax.random.split(jax.random.key(1), 3))
    arguments = (one_step, state, batches, tangents, TANH_AXES)
    grown = stability.growth(*arguments).log_asymmetry
    exact = stability.one_sided_log_asymmetry(*arguments, exact_steps=3, epsilon=1e-7)
    np.testing.assert_allclose(exact - np.log(1e-7), grown, atol=1e-5)


def test_what_rounding_swallows():
    params = {'layer': {'w': jnp.array([1.0, 1.0, 0.0, 1e-4])}}
    tangent = {'layer': {'w': jnp.array([1.0, 0.0, 1.0, 1.0])}}
    shares = [float(stability.rounded_away(params, tangent, e)) for e in (1e-6, 1e-9, 1e-13)]
    np.testing.assert_allclose(shares, [0, 1 / 3, 2 / 3], rtol=1e-6)


def test_a_state_that_is_not_symmetric_is_refused(float64):
    one_step, state, axes = quadratic((-1.0,), -3.0, 0.1, 0.9)
    state[0]['layer0']['w'] = jnp.array([0.0, 1.0])
    with pytest.raises(ValueError, match='not symmetric'):
        stability.growth(one_step, state, [], jax.tree.map(lambda x: x[None], state[0]), axes)


def test_a_base_run_whose_kernels_are_not_symmetric_is_held_on_the_symmetric_subspace(float64):
    """A step that adds to one feature alone does not change what the tangents see."""
    one_step, state, axes = quadratic((-1.0, -0.3), -3.0, 0.1, 0.9)

    def crooked(state, batch):
        params, velocity = one_step(state, batch)
        return jax.tree.map(lambda w: w.at[1].add(1e-3), params), velocity

    tangents = tangents_of(state[0], jax.random.key(0)[None])
    plain = stability.growth(one_step, state, [None] * 5, tangents, axes)
    crooked = stability.growth(crooked, state, [None] * 5, tangents, axes)
    np.testing.assert_allclose(crooked.log_asymmetry, plain.log_asymmetry, atol=1e-12)


def test_a_step_without_derivative_and_a_symmetric_tangent_are_refused(float64):
    axes, tx = {'layer': {'w': ('f',)}}, optax.adam(1e-2)

    def one_step(state, _):
        params, opt_state = state
        grads = jax.grad(lambda params: jnp.sum(params['layer']['w'] ** 2))(params)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    params = {'layer': {'w': jnp.zeros(2)}}  # zero gradients: sqrt has no derivative
    state = params, tx.init(params)
    tangents = {'layer': {'w': jnp.array([[1.0, -1.0]])}}
    with pytest.raises(ValueError, match=r'step 1: the linearised step is not finite.*eps_root'):
        stability.growth(one_step, state, [None] * 3, tangents, axes)
    symmetric = {'layer': {'w': jnp.ones((1, 2))}}
    with pytest.raises(ValueError, match='tangents: must be finite and have a transverse part'):
        stability.growth(one_step, state, [None] * 3, symmetric, axes)
