"""Where a program is, and what it measures of weights, on the host and on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerojax.run import program as programs
from zerojax.run.building import scalars_of
from zerojax.run.checks import resolve
from zerojax.run.data import load_of


@pytest.fixture(params=[None, 2])
def program_and_params(request, tiny_config):
    """Of one run, or two at once, with weights that are not symmetric."""
    tiny_config.model.init = 'random'
    dataset = load_of(tiny_config)
    config = resolve(tiny_config, dataset)
    program = programs.Program(config, dataset, request.param)
    scalars = [scalars_of(config)] * (request.param or 1)
    return program, program.initial_state(program.place_scalars(scalars)).params


def test_host_and_device_measure_the_same(program_and_params, monkeypatch):
    program, params = program_and_params
    on_host = program.measure_params(params)
    monkeypatch.setattr(programs, 'MEASURED_ON_HOST', 0)
    on_device = program.measure_params(params)
    assert jax.tree.structure(on_host) == jax.tree.structure(on_device)
    for a, b in zip(jax.tree.leaves(on_host), jax.tree.leaves(on_device), strict=True):
        assert np.shape(a) == np.shape(b) == (() if program.runs is None else (program.runs,))
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1, np.abs(b).max()))


def test_a_run_of_one_device_is_where_jax_puts_arrays(tiny_config):
    dataset = load_of(tiny_config)
    config = resolve(tiny_config, dataset)
    for device in jax.devices():
        with jax.default_device(device):
            program = programs.Program(config, dataset)
            state = program.initial_state(program.place_scalars([scalars_of(config)]))
            placed = state, program.source(state, program.place_scalars([scalars_of(config)]), 0)
        assert all(x.devices() == {device} for x in jax.tree.leaves(placed))


def test_weights_that_are_not_finite_are_measured_in_silence(program_and_params):
    """A run of a batch that has failed goes on in it, and is only left out of what is written."""
    program, params = program_and_params
    lost = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), params)
    program.measure_params(lost)  # pytest makes errors of NumPy's warnings
