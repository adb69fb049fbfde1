import contextlib
import threading

import jax
import pytest

from zerojax.step.precision import numbers_of


def seen_by_a_new_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(jax.config.jax_enable_x64))
    thread.start()
    thread.join()
    return seen[0]


@pytest.fixture(params=[False, True], ids=['off', 'on'])
def process_wide(request):
    before = jax.config.jax_enable_x64
    jax.config.update('jax_enable_x64', request.param)
    yield request.param
    jax.config.update('jax_enable_x64', before)


class Failure(Exception):
    pass


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32', 'float64'])
@pytest.mark.parametrize('of_this_thread', [None, False, True])
@pytest.mark.parametrize('fails', [False, True])
def test_the_dtype_alone_decides_and_all_is_as_it_was_afterwards(
    process_wide, of_this_thread, dtype, fails
):
    outside = process_wide if of_this_thread is None else of_this_thread
    context = contextlib.nullcontext() if of_this_thread is None else jax.enable_x64(outside)
    with context:
        with contextlib.suppress(Failure), numbers_of(dtype):
            assert jax.config.jax_enable_x64 == (dtype == 'float64')
            assert seen_by_a_new_thread() == (dtype == 'float64'), 'Orbax reads in its own'
            with numbers_of('float64'), numbers_of('float32'):
                assert not jax.config.jax_enable_x64
            assert jax.config.jax_enable_x64 == (dtype == 'float64')
            if fails:
                raise Failure
        assert jax.config.jax_enable_x64 == outside
        assert seen_by_a_new_thread() == process_wide
    assert jax.config.jax_enable_x64 == process_wide, 'nothing is left for this thread alone'
    jax.config.update('jax_enable_x64', not process_wide)
    assert jax.config.jax_enable_x64 != process_wide
