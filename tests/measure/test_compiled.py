import os

import jax
import jax.numpy as jnp
import pytest

from zerojax.measure import compiled
from zerojax.measure.noise import noise_floor


def reduce_of_broadcast(x):
    return jnp.sum(jnp.broadcast_to(x, (2, 1024, 1024)))


def test_fresh_compilations_leave_the_persistent_cache_alone():
    def of_this_name(x):
        for _ in range(3):
            x = jnp.linalg.norm(x @ x.T, axis=0, keepdims=True)
        return x

    def cached():  # other processes use the folder, too
        folder = os.environ['JAX_COMPILATION_CACHE_DIR']
        return {name for name in os.listdir(folder) if 'of_this_name' in name}

    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    try:
        x = jnp.ones((7, 7)).block_until_ready()
        compiled.compile_afresh(of_this_name, x)
        assert not cached()
        jax.jit(of_this_name)(x).block_until_ready()
        assert cached(), 'and afterwards it is in use again'
    finally:
        jax.config.update('jax_persistent_cache_min_compile_time_secs', least)


def operations(function, *args, backend='cpu'):
    hlo = compiled.compile_afresh(function, *args).as_text()
    return compiled.operations_that_may_not_repeat(hlo, backend)


def test_scatter_is_found_where_indices_may_coincide():
    def loss(embedding, indices):
        return jnp.sum(embedding[indices] ** 2)

    embedding, indices = jnp.ones((50, 8)), jnp.arange(16) % 7
    (found,) = operations(jax.grad(loss), embedding, indices)
    assert (found.name, found.count) == ('scatter', 1)
    assert 'no atomics' in found.remark
    (on_gpu,) = operations(jax.grad(loss), embedding, indices, backend='gpu')
    assert 'atomics, in any order' in on_gpu.remark

    assert not operations(loss, embedding, indices), 'only its gradient adds'
    distinct = jnp.arange(16)
    assert not operations(
        lambda x, i: x.at[i].add(1.0, unique_indices=True), jnp.ones(50), distinct
    )
    assert not operations(lambda x, i: x.at[i].add(1), jnp.ones(50, jnp.int32), distinct)


def test_gradients_of_max_pooling_and_calls_to_python_are_found():
    def pooled(x):
        return jnp.sum(
            jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID')
        )

    (found,) = operations(jax.grad(pooled), jnp.ones((2, 8, 8, 3)))
    assert found.name in ('scatter', 'select-and-scatter')

    def calls_python(x):
        return jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    (found,) = operations(calls_python, jnp.ones(3))
    assert 'calls Python' in found.remark


def test_operations_of_other_backends_are_read_from_their_programs():
    """Instructions as XLA prints them on GPUs, which the tests do not have."""
    hlo = """
      %s = f32[2,8]{1,0} select-and-scatter(%a, %b, %c), window={size=1x2}, select=%ge, scatter=%add
      %w = (f32[3,3,8,8]{3,2,1,0}, u8[64]{0}) custom-call(%x, %y), custom_call_target="__cudnn$convBackwardFilter"
      %m = (f32[8,8]{1,0}, s8[0]{0}) custom-call(%x, %y), custom_call_target="__cublas$gemm"
      %n = (f32[8,8]{1,0}, s8[0]{0}) custom-call(%x, %y), custom_call_target="__cublas$gemm"
      %f = f32[8,8]{1,0} fusion(%x), kind=kCustom, calls=%c, backend_config={"kind":"__triton_gemm"}
      %r = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add
      %b = f32[8]{0} all-reduce-start(%x), replica_groups={}, to_apply=%add
      %e = f32[8]{0} all-reduce-done(%b)
      %u = u8[8]{0} custom-call(), custom_call_target="AllocateBuffer"
      %v = s64[8]{0} custom-call(%l, %h), custom_call_target="X64Combine"
      %h = u32[8]{0} custom-call(%v), custom_call_target="X64SplitHigh"
      %l = u32[8]{0} custom-call(%v), custom_call_target="X64SplitLow"
      %p = (u64[2]{0}, u32[8]{0}) rng-bit-generator(%k), algorithm=rng_three_fry
      %d = f32[8,8]{1,0} dot(%x, %y), lhs_contracting_dims={1}
    """  # noqa: E501
    found = {x.name: x for x in compiled.operations_that_may_not_repeat(hlo, 'gpu')}
    assert {name: x.count for name, x in found.items()} == {
        'select-and-scatter': 1, '__cudnn$convBackwardFilter': 1, '__cublas$gemm': 2,
        '__triton_gemm': 1, 'all-reduce': 2,
    }  # fmt: skip
    assert 'atomics' in found['__cudnn$convBackwardFilter'].remark


def test_the_data_race_of_older_jaxlibs_does_not_go_unseen():
    """Whether it occurs depends on version and cores; if results differ, an operation is named."""
    x = jnp.ones((1024, 1))
    executable = compiled.compile_afresh(reduce_of_broadcast, x)
    spread = noise_floor(executable(x) for _ in range(100))['']
    named = compiled.operations_that_may_not_repeat(executable.as_text(), 'cpu')
    assert spread.distinct == 1 or (spread.ulps > 0 and '__ynn_fusion' in {x.name for x in named})
    off = {'xla_cpu_experimental_ynn_fusion_type': ''}
    executable = compiled.compile_afresh(reduce_of_broadcast, x, compiler_options=off)
    assert noise_floor(executable(x) for _ in range(100))[''].distinct == 1
    assert not compiled.operations_that_may_not_repeat(executable.as_text(), 'cpu')


def test_operations_are_counted_before_anything_is_compiled():
    x, y = jnp.ones((30, 50)), jnp.ones((50, 70))
    count = 2 * 30 * 50 * 70
    assert compiled.count_operations(lambda x, y: x @ y, x, y) == count
    key = jax.random.key(0)  # what a train state holds too
    found = compiled.count_operations(lambda key, x, y: (key, x @ y), key, x, y)
    assert found == pytest.approx(count, rel=1e-3), 'XLA counts -1 for calls that it does not know'


def test_without_a_cpu_operations_are_not_counted(monkeypatch):
    def no_cpu(backend):
        raise RuntimeError('Unknown backend cpu')

    monkeypatch.setattr(jax, 'local_devices', no_cpu)
    with pytest.raises(ValueError, match=r'JAX_PLATFORMS=.*leaves no CPU'):
        compiled.count_operations(jnp.sin, jnp.ones(3))
