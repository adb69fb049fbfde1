"""Programs of XLA are read from their text."""

import jax
import jax.numpy as jnp
import pytest

from zerojax.measure import hlo
from zerojax.measure.hlo import Array


def module_of(function, *args):
    return hlo.parse(jax.jit(function).lower(*args).compile().as_text(), 'cpu')


def test_every_instruction_is_read_and_every_name_is_known():
    def step(x, n):
        x = jax.lax.fori_loop(0, n, lambda i, x: jnp.sin(x @ x) + i.astype(x.dtype), x)
        return jax.lax.cond(n > 3, lambda x: x.sum(0), lambda x: x.max(0), x)

    text = jax.jit(step).lower(jnp.ones((8, 8)), 3).compile().as_text()
    module = hlo.parse(text, 'cpu')
    assert sum(1 for _ in module.instructions()) == text.count(' = ')
    for computation, instruction in module.instructions():
        assert computation.instructions.keys() >= set(instruction.operands)
        assert module.computations.keys() >= set(instruction.called())
    for computation in module.computations.values():
        assert computation.root in computation.instructions
    (loop,) = (x for _, x in module.instructions() if x.opcode == 'while')
    assert loop.trips() == 1, 'not known'


@pytest.mark.parametrize(
    'dtype,bits', [('float32', 32), ('bfloat16', 16), ('int8', 8), ('bool', 8), ('uint32', 32)]
)
def test_parameters_have_the_sizes_of_the_arguments(dtype, bits):
    module = module_of(lambda x, y: (x, y + 1), jnp.ones((3, 5), dtype), jnp.ones(()))
    parameters = module.computations[module.entry].parameters()
    ((x,), (y,)) = (parameters[i].results for i in (0, 1))
    assert (x.dims, x.bytes) == ((3, 5), 15 * bits // 8)
    assert (y.dims, y.bytes) == ((), 4)


def test_tuples_and_memory_of_the_chip_are_read_from_tpu_programs():
    text = """HloModule jit_step, is_scheduled=true, num_partitions=4

ENTRY %main (p: f32[8,32]) -> f32[8,32] {
  %p = f32[8,32]{1,0:T(8,128)} parameter(0), metadata={op_name="x"}
  %start = (f32[8,32]{1,0:T(8,128)S(1)}, f32[8,32]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  ROOT %done = f32[8,32]{1,0:T(8,128)S(1)} copy-done(%start)
}
"""
    module = hlo.parse(text, 'tpu')
    assert module.partitions == 4
    entry = module.computations['main']
    assert entry.root == 'done'
    assert entry.instructions['start'].operands == ('p',)
    assert entry.arrays('start') == (
        Array('f32', (8, 32), on_chip=True), Array('f32', (8, 32)), Array('u32', (), on_chip=True),
    )  # fmt: skip


@pytest.mark.parametrize(
    'backend,space,on_chip',
    [('tpu', 1, True), ('tpu', 3, True), ('tpu', 5, False), ('gpu', 1, False), ('gpu', 5, False)],
)
def test_memory_by_number_is_the_chip_s_on_tpus_but_for_the_host_s(backend, space, on_chip):
    text = f"""HloModule jit_step

ENTRY %main (p: f32[8]) -> f32[8] {{
  ROOT %p = f32[8]{{0:S({space})}} parameter(0)
}}
"""
    assert hlo.parse(text, backend).computations['main'].arrays('p')[0].on_chip == on_chip


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match='no ENTRY computation'):
        hlo.parse('module @jit_step {}', 'cpu')
