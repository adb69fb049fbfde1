import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zerojax.step import optimizer


def test_the_papers_drops_fall_on_its_epochs():
    """300 epochs of 390 updates: 0.03, then times 0.2 from epochs 160, 220 and 260 on."""
    fractions = (159 / 300, 219 / 300, 259 / 300)
    schedule = optimizer.step_schedule(0.03, 300 * 390, fractions, 0.2)
    for epoch, drops in (
        (1, 0),
        (159, 0),
        (160, 1),
        (219, 1),
        (220, 2),
        (259, 2),
        (260, 3),
        (300, 3),
    ):
        for update in ((epoch - 1) * 390, epoch * 390 - 1):
            assert schedule(update) == pytest.approx(0.03 * 0.2**drops, rel=1e-6), (epoch, update)


def test_drops_that_coincide_in_a_short_run_all_count():
    schedule = optimizer.step_schedule(1.0, 3, (0.6, 0.65, 0.7), 0.5)
    assert [float(schedule(n)) for n in range(3)] == [1.0, 1.0, 0.125]


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_is_pytorchs(nesterov):
    """v = m v + (g + wd w); w -= lr (v, or g + wd w + m v)."""
    tx = optimizer.sgd(optax.constant_schedule(0.1), 0.9, nesterov, 0.01)
    w = {'w': jnp.array([1.0, -2.0])}
    state = tx.init(w)
    expected, v = np.array([1.0, -2.0]), np.zeros(2)
    for g in (np.array([0.3, 0.1]), np.array([-0.2, 0.5]), np.array([0.7, 0.7])):
        updates, state = tx.update({'w': jnp.asarray(g, jnp.float32)}, state, w)
        w = optax.apply_updates(w, updates)
        d = g + 0.01 * expected
        v = 0.9 * v + d
        expected = expected - 0.1 * (d + 0.9 * v if nesterov else v)
    np.testing.assert_allclose(w['w'], expected, rtol=1e-6)


def test_radam_is_its_authors():
    """Algorithm 2 of Liu et al. in NumPy, with decay beside the update, for 12 updates."""
    lr, b1, b2, decay = 0.1, 0.9, 0.99, 0.01
    tx = optimizer.radam(optax.constant_schedule(lr), b1, b2, decay)
    w = {'w': jnp.array([1.0, -2.0])}
    state = tx.init(w)
    expected, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    longest = 2 / (1 - b2) - 1
    rectified = 0
    for t in range(1, 13):
        g = np.random.default_rng(t).normal(size=2)
        with jax.numpy_dtype_promotion('standard'):  # optax itself multiplies int32 by float
            updates, state = tx.update({'w': jnp.asarray(g, jnp.float32)}, state, w)
        w = optax.apply_updates(w, updates)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        length = longest - 2 * t * b2**t / (1 - b2**t)
        update = m / (1 - b1**t)
        if length >= 5:
            rectified += 1
            root = ((length - 4) * (length - 2) * longest) / (
                (longest - 4) * (longest - 2) * length
            )
            update *= np.sqrt(root) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        expected = expected - lr * (update + decay * expected)
    assert 0 < rectified < 12
    np.testing.assert_allclose(w['w'], expected, rtol=1e-5)


def test_a_frozen_parameter_is_moved_by_neither_gradient_nor_decay():
    tx = optimizer.freeze(optimizer.sgd(optax.constant_schedule(0.1), 0.9, False, 0.1), 'a/.*k')
    params = {'a': {'kernel': jnp.ones(2), 'bias': jnp.ones(2)}, 'b': {'kernel': jnp.ones(2)}}
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert (params['a']['kernel'] == 1).all()
    assert (params['a']['bias'] != 1).all()
    np.testing.assert_array_equal(params['a']['bias'], params['b']['kernel'])


def authors_radam(w, gradients, lr, b1, b2, eps, decay):
    """LiyuanLucasLiu/RAdam as the paper's code has it, line by line, in float64."""
    w, m, v = np.float64(w), np.zeros(len(w)), np.zeros(len(w))
    n_max = 2 / (1 - b2) - 1
    for t, g in enumerate(gradients, start=1):
        v = v * b2 + (1 - b2) * g * g
        m = m * b1 + (1 - b1) * g
        n = n_max - 2 * t * b2**t / (1 - b2**t)
        w = w - decay * lr * w
        if n >= 5:
            root = (1 - b2**t) * (n - 4) / (n_max - 4) * (n - 2) / n * n_max / (n_max - 2)
            w = w - lr * np.sqrt(root) / (1 - b1**t) * m / (np.sqrt(v) + eps)
        else:
            w = w - lr / (1 - b1**t) * m
    return w


@pytest.mark.parametrize('size', [0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize('b1,b2', [(0.9, 0.999), (0.9, 0.9999), (0.5, 0.9), (0.0, 0.8), (0.9, 0.5)])
def test_radam_has_its_authors_epsilon_at_any_size_of_gradients(size, b1, b2):
    """From weights of 0, so that no digit is lost; and it becomes adaptive at their update."""
    lr, steps = 0.1, (4, 5, 6, 7, 30, 300)
    gradients = size * np.random.default_rng(3).normal(1.0, 0.5, (max(steps), 3))
    gradients = gradients.astype(np.float32)
    tx = optimizer.radam(optax.constant_schedule(lr), b1, b2, 0.01)
    w = {'w': jnp.zeros(3)}

    @jax.jit
    def update(w, state, g):
        updates, state = tx.update({'w': g}, state, w)
        return optax.apply_updates(w, updates), state

    state = tx.init(w)
    for t, g in enumerate(gradients, start=1):
        w, state = update(w, state, g)
        if t in steps:
            expected = authors_radam(
                np.zeros(3), gradients[:t].astype(float), lr, b1, b2, 1e-8, 0.01
            )
            np.testing.assert_allclose(w['w'], expected, rtol=2e-5)


def test_the_derivative_of_updates_that_are_not_adaptive_knows_nothing_of_the_second_moment():
    """Forwards and backwards, where a gradient is 0 as well."""
    b1, lr = 0.9, 0.1
    tx = optimizer.radam(optax.constant_schedule(lr), b1, 0.999, 0.0)
    w = jnp.zeros(2)
    g = jnp.array([0.0, 0.5])

    def update(g):
        return tx.update(g, tx.init(w), w)[0]

    expected = -lr * np.eye(2, dtype=np.float32)  # mu / (1 - b1) is g
    np.testing.assert_allclose(jax.jacfwd(update)(g), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jacrev(update)(g), expected, rtol=1e-5)


def test_radam_of_bfloat16_weights_keeps_its_moments_in_float32():
    """In bfloat16, 0.999 v + 0.001 g² would be v."""
    tx = optimizer.radam(optax.constant_schedule(0.1), 0.9, 0.999, 0.0)
    w = {'w': jnp.ones(2, jnp.bfloat16)}
    state = tx.init(w)
    for _ in range(3):
        updates, state = tx.update(w, state, w)
    assert updates['w'].dtype == jnp.bfloat16
    moments = [x for x in jax.tree.leaves(state) if x.shape == (2,)]
    assert [x.dtype for x in moments] == [jnp.float32] * 2
    np.testing.assert_allclose(moments[1], 1 - 0.999**3, rtol=1e-5)
