import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zerojax import optimizer


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
