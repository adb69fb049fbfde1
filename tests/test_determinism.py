import jax
import jax.numpy as jnp
import pytest

from zerojax import determinism


def reduce_of_broadcast(x):
    return jnp.sum(jnp.broadcast_to(x, (2, 1024, 1024)))


@pytest.mark.parametrize('mode', determinism.MODES)
def test_every_mode_avoids_the_data_race_of_older_jaxlibs(mode):
    """Without the options jaxlib 0.10.2 returns several sums in 500 calls on two cores."""
    x = jnp.ones((1024, 1))
    compiled = determinism.jit_in_mode(reduce_of_broadcast, mode).lower(x).compile()
    assert {float(compiled(x)) for _ in range(500)} == {2.0 * 1024 * 1024}


@pytest.mark.parametrize('mode', determinism.MODES)
@pytest.mark.parametrize('backend', ['cpu', 'gpu', 'tpu'])
def test_every_backend_has_its_options(mode, backend):
    options = determinism.compiler_options(mode, backend)
    assert ('xla_gpu_deterministic_ops' in options) == ((backend, mode) == ('gpu', 'deterministic'))
    assert all(isinstance(value, bool | int | str) for value in options.values())


def test_unknown_modes_and_backends_are_refused():
    with pytest.raises(ValueError, match=r"mode='exact': must be one of deterministic, hardware"):
        determinism.compiler_options('exact')
    with pytest.raises(ValueError, match="backend 'abacus'"):
        determinism.compiler_options('deterministic', 'abacus')


def test_an_option_that_jaxlib_lacks_is_an_error(monkeypatch):
    determinism.check_supported('deterministic')
    monkeypatch.setitem(
        determinism._OPTIONS, ('cpu', 'deterministic'), {'xla_cpu_no_such_option': True}
    )
    with pytest.raises(ValueError, match='does not take xla_cpu_no_such_option=True'):
        determinism.check_supported('deterministic')


def test_two_compilations_give_the_same_bits():
    x = jax.random.normal(jax.random.key(0), (64, 64))
    results = {
        determinism.jit_in_mode(lambda x: jnp.linalg.norm(x @ x.T), 'deterministic')(x).item()
        for _ in range(2)
    }
    assert len(results) == 1
