import functools

import jax
import quick
from small_step import SHAPE, bits, setup

from zerojax import step


def test_seeds_act_on_what_they_are_for_only():
    model, tx, _, _ = setup(init='random')
    create = quick.jit(functools.partial(step.create_state, model, tx, SHAPE))

    def state(**seeds):
        return create(**({'seed': 0, 'perturbation_seed': 0} | seeds))

    def key_bits(state, *names):
        return [jax.random.key_data(state.keys[name]).tolist() for name in names]

    base, other_seed, other_perturbation = state(), state(seed=1), state(perturbation_seed=1)
    assert bits(base.params) != bits(other_seed.params)
    assert bits(base.params) == bits(other_perturbation.params)
    assert key_bits(base, 'perturbation') == key_bits(other_seed, 'perturbation')
    assert key_bits(base, 'perturbation') != key_bits(other_perturbation, 'perturbation')
    everything_else = step.KEY_PURPOSES
    assert key_bits(base, *everything_else) == key_bits(other_perturbation, *everything_else)
    distinct = key_bits(base, *everything_else, 'perturbation')
    assert len({tuple(key) for key in distinct}) == len(step.KEY_PURPOSES) + 1
