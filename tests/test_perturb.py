import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerojax.perturb import Perturbation, apply, chosen, gaussian

KEY = jax.random.key(3)


def weights(dtype=jnp.float32):
    return {
        'stem': {'kernel': jnp.ones((3, 3, 4, 16), dtype)},
        'block1_0': {
            'conv': {'kernel': jnp.zeros((3, 3, 16, 64), dtype)},
            'bn': {'scale': jnp.ones(16, dtype), 'bias': jnp.zeros(16, dtype)},
        },
    }


def test_noise_has_the_stated_law():
    """Mean 0 and deviation `scale`, from 9216 zero weights: relative deviation 1 / sqrt(2 n)."""
    noise = np.asarray(gaussian(weights(), KEY, 1e-3)['block1_0']['conv']['kernel'])
    assert noise.std() == pytest.approx(1e-3, rel=0.03)
    assert abs(noise.mean()) < 4e-3 / np.sqrt(noise.size)
    assert len(np.unique(noise)) > 0.99 * noise.size


def test_only_the_chosen_parameters_change_and_their_noise_is_the_same():
    everywhere = gaussian(weights(), KEY, 1e-2)
    some = gaussian(weights(), KEY, 1e-2, layers='block1_0/(conv|bn/scale)')
    np.testing.assert_array_equal(some['stem']['kernel'], weights()['stem']['kernel'])
    np.testing.assert_array_equal(some['block1_0']['bn']['bias'], jnp.zeros(16))
    for module, name in (('conv', 'kernel'), ('bn', 'scale')):
        actual = some['block1_0'][module][name]
        np.testing.assert_array_equal(actual, everywhere['block1_0'][module][name])
        assert (actual != weights()['block1_0'][module][name]).all()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_same_key_gives_the_same_bits_another_key_others(dtype):
    first, again, other = (
        gaussian(weights(dtype), key, 0.5)['stem']['kernel']
        for key in (KEY, KEY, jax.random.key(4))
    )
    assert first.dtype == dtype
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    'every,due', [(0, {5}), (1, {5, 6, 7, 8, 9, 10, 11}), (3, {5, 8, 11}), (100, {5})]
)
def test_it_is_applied_exactly_when_due(every, due):
    perturbation = Perturbation('gaussian', 1e-3, at_step=5, every=every)
    step_weights = jax.jit(lambda step: apply(perturbation, weights(), KEY, step))
    seen = []
    for step in range(12):
        scale = np.asarray(step_weights(step)['block1_0']['bn']['scale'])
        if (scale != 1).any():
            seen.append((step, scale.tobytes()))
    assert {step for step, _ in seen} == due
    assert len({noise for _, noise in seen}) == len(due), 'each time the noise must be new'


def test_kind_none_returns_the_weights_themselves():
    params = weights()
    assert apply(Perturbation(), params, KEY, jnp.int32(0)) is params


def test_chosen_lists_paths():
    assert chosen(weights(), 'stem|.*bias') == ['block1_0/bn/bias', 'stem/kernel']


@pytest.mark.parametrize(
    'field,value',
    [
        ('kind', 'ulps'), ('scale', -1.0), ('scale', float('nan')), ('scale', float('inf')),
        ('at_step', -1), ('every', -1), ('layers', '('),
    ],
)  # fmt: skip
def test_a_bad_field_is_named_with_its_value(field, value):
    with pytest.raises(ValueError, match=f'^{field}='):
        Perturbation(**{field: value})
