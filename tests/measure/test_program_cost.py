"""Products, bytes and collectives of compiled programs are what their functions ask for."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from zerojax.measure import hlo, program_cost
from zerojax.measure.accelerators import GPUS, TPUS, Accelerator
from zerojax.step.determinism import compiler_options


def module_of(function, *args, **jit):
    options = compiler_options('deterministic')
    compiled = jax.jit(function, compiler_options=options, **jit).lower(*args).compile()
    return hlo.parse(compiled.as_text(), 'cpu')


def cost_of(function, *args, **jit):
    return program_cost.cost(module_of(function, *args, **jit))


def module_with(*instructions, backend, partitions=1, computations=''):
    """A program of these lines, as XLA prints them on devices that the tests do not have."""
    lines = '\n'.join(f'  {line}' for line in instructions)
    header = f'HloModule jit_step, num_partitions={partitions}'
    text = f'{header}\n\n{computations}ENTRY %main () -> f32[] {{\n{lines}\n}}'
    return hlo.parse(text, backend)


CONVOLUTIONS = {
    'padded': {'window_strides': (1, 1), 'padding': ((1, 1), (1, 1))},
    'strided': {'window_strides': (2, 2), 'padding': ((1, 1), (1, 1))},
    'dilated': {
        'window_strides': (2, 1), 'padding': ((0, 3), (2, 0)), 'rhs_dilation': (2, 1),
    },
    'transposed': {
        'window_strides': (1, 1), 'padding': ((2, 2), (2, 2)), 'lhs_dilation': (2, 3),
    },
    'grouped': {
        'window_strides': (1, 1), 'padding': ((1, 1), (1, 1)), 'feature_group_count': 2,
    },
    'cropped': {'window_strides': (1, 1), 'padding': ((-1, 2), (0, 0))},
}  # fmt: skip


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_operations_of_convolutions_and_their_gradients_are_those_not_by_padding(name):
    fields = CONVOLUTIONS[name]

    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision='highest', **fields
        )

    def all_passes(x, kernel):
        out, pull = jax.vjp(convolve, x, kernel)
        return out, pull(out)

    x = jnp.ones((2, 7, 9, 4))
    kernel = jnp.ones((3, 3, 4 // fields.get('feature_group_count', 1), 6))
    # With ones throughout, each multiplication adds one.
    operations = 2 * int(convolve(x, kernel).sum())
    found = program_cost.products(module_of(all_passes, x, kernel))
    assert found == [program_cost.Product('f32', 'highest', operations)] * 3


@pytest.mark.parametrize('precision', ['default', 'high', 'highest'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_operations_of_matrix_products(dtype, precision):
    a, b = jnp.ones((3, 5, 7), dtype), jnp.ones((3, 7, 11), dtype)
    (found,) = program_cost.products(
        module_of(lambda a, b: jnp.matmul(a, b, precision=precision), a, b)
    )
    # A CPU may compute in float32 what is given in bfloat16, and the program says so.
    assert found.dtype in ('f32', {'float32': 'f32', 'bfloat16': 'bf16'}[dtype])
    assert (found.precision, found.operations) == (precision, 2 * 3 * 5 * 7 * 11)


CUDNN = (
    '{name} = ({result}, u8[0]{{0}}) custom-call({operands}), window={{size=3x3 stride=2x2 '
    'pad=1_1x1_1}}, dim_labels=b01f_o01i->b01f, operand_precision={{highest,highest,default}}, '
    'custom_call_target="__cudnn$conv{kind}", backend_config={{"cudnn_conv_backend_config":{{}}}}'
)


def test_libraries_of_gpus_have_the_operations_of_what_they_compute():
    x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 6))
    forward = lax.conv_general_dilated(
        x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    shapes = {'x': 'f32[2,8,8,4]', 'w': 'f32[6,3,3,4]', 'y': 'f32[2,4,4,6]'}
    module = module_with(
        *(f'%{name} = {shape} parameter({i})' for i, (name, shape) in enumerate(shapes.items())),
        CUDNN.format(name='%a', result=shapes['y'], operands='%x, %w', kind='Forward'),
        CUDNN.format(name='%b', result=shapes['x'], operands='%y, %w', kind='BackwardInput'),
        CUDNN.format(name='%c', result=shapes['w'], operands='%x, %y', kind='BackwardFilter'),
        '%l = bf16[5,7]{1,0} parameter(3)',
        '%r = bf16[5,3]{1,0} parameter(4)',
        'ROOT %m = (bf16[7,3]{1,0}, s8[64]{0}) custom-call(%l, %r), '
        'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{'
        '"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],'
        '"rhs_contracting_dimensions":["0"]},"precision_config":{"operand_precision":'
        '["DEFAULT","DEFAULT"],"algorithm":"ALG_UNSET"}}}',
        backend='gpu',
    )
    operations = 2 * int(forward.sum())
    assert program_cost.products(module) == [
        *[program_cost.Product('f32', 'highest', operations)] * 3,
        program_cost.Product('bf16', 'default', 2 * 5 * 7 * 3),
    ]
    assert program_cost.custom_calls(module) == {
        '__cudnn$convForward': 1, '__cudnn$convBackwardInput': 1, '__cudnn$convBackwardFilter': 1,
        '__cublas$lt$matmul': 1,
    }  # fmt: skip


def test_a_loop_counts_as_often_as_the_program_says_and_of_branches_one():
    x = jnp.ones((16, 16))

    def power(x, n):
        return lax.fori_loop(0, n, lambda _, y: y @ x, x)

    once = 2 * 16**3
    assert cost_of(lambda x: power(x, 5), x).flops == 5 * once
    assert cost_of(power, x, 5).flops == once, 'as often as it is told to: once'
    branches = cost_of(lambda x, p: lax.cond(p, lambda x: x @ x, lambda x: x @ x @ x, x), x, True)
    assert branches.flops == once


def test_bytes_are_what_is_read_and_written():
    x = jnp.ones(1000)
    assert cost_of(lambda x: x * 2 + 1, x).bytes == 2 * 4 * 1000, 'one fusion'
    table, some = jnp.ones((10_000, 64)), jnp.arange(8)
    read = cost_of(lambda table, some: table[some] * 2, table, some).bytes
    assert read == 8 * 64 * 4 * 2 + 8 * 4, 'the rows that are taken, not the table'
    rows = jnp.ones((2, 64))
    replaced = cost_of(lambda x, y: lax.dynamic_update_slice(x, y, (3, 0)), table, rows,
                       donate_argnums=0)  # fmt: skip
    indices = 2 * 4  # of which JAX 0.12 makes operands
    assert replaced.bytes - 2 * 2 * 64 * 4 in (0, indices), 'the rest stays where it is'


def test_what_stays_on_the_chip_is_no_traffic():
    module = module_with(
        '%p = f32[1000]{0:T(1024)} parameter(0)',
        '%s = (f32[1000]{0:T(1024)S(1)}, f32[1000]{0:T(1024)}, u32[]{:S(2)}) copy-start(%p)',
        '%d = f32[1000]{0:T(1024)S(1)} copy-done(%s)',
        '%a = f32[1000]{0:T(1024)S(1)} add(%d, %d)',
        'ROOT %m = f32[1000]{0:T(1024)} multiply(%a, %d)',
        backend='tpu',
    )
    assert program_cost.cost(module).bytes == 2 * 4000, 'read by the copy, written by the product'


SLICE = (  # as libtpu 0.0.42.1 prints it
    '%x = f32[3,3,128,256]{3,2,1,0:T(8,128)} parameter(0)',
    '%slice-start = ((f32[3,3,128,256]{3,2,1,0:T(8,128)}), '
    'f32[1,3,128,256]{3,2,1,0:T(8,128)MEMORY}, s32[]{:S(2)}) slice-start(%x), '
    'slice={[0:1], [0:3], [0:128], [0:256]}',
    'ROOT %slice-done = f32[1,3,128,256]{3,2,1,0:T(8,128)MEMORY} slice-done(%slice-start)',
)


@pytest.mark.parametrize('memory,transfers', [('S(3)', 1), ('', 2)])
def test_a_slice_in_two_halves_is_its_part_read_and_written_once(memory, transfers):
    lines = [line.replace('MEMORY', memory) for line in SLICE]
    part = 4 * 3 * 128 * 256
    assert program_cost.cost(module_with(*lines, backend='tpu')).bytes == transfers * part


@pytest.mark.parametrize(
    'begins,size',
    [
        ('((f32[64,8]{1,0}, s32[]{:T(128)}, s32[]{:T(128)}), f32[2,8]{1,0}, s32[]{:S(2)}) '
         'dynamic-slice-start(%x, %i, %i), dynamic_slice_sizes={2,8}', 2 * 64),
        ('((f32[64,8]{1,0}), f32[16,8]{1,0}, u32[]{:S(2)}) reduce-scatter-start(%x), '
         'replica_groups=[1,4]<=[4], dimensions={0}', 2048 + 512),
        ('(f32[64,8]{1,0}, f32[256,8]{1,0}) all-gather-start(%x), dimensions={0}', 2048 + 8192),
        ('(f32[64,8]{1,0}, f32[64,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) '
         'collective-permute-start(%x), source_target_pairs={{0,1}}', 2 * 2048),
        ('f32[64,8]{1,0} all-reduce-start(%x), to_apply=%add', 2 * 2048),
        ('(f32[64,8]{1,0}, f32[64,8]{1,0}, u32[]) copy-start(%x)', 2 * 2048),
    ],
)  # fmt: skip
@pytest.mark.parametrize('backend', ['gpu', 'tpu'])
def test_what_has_begun_is_counted_as_the_whole_and_its_end_as_nothing(begins, size, backend):
    name = begins.split('-start(')[0].split(' ')[-1]
    module = module_with(
        '%x = f32[64,8]{1,0} parameter(0)',
        '%i = s32[]{:T(128)} parameter(1)',
        f'%start = {begins}',
        f'%update = f32[64,8]{{1,0}} {name}-update(%start)',
        f'ROOT %done = f32[64,8]{{1,0}} {name}-done(%update)',
        backend=backend,
        partitions=4,
    )
    assert program_cost.cost(module).bytes == size


@pytest.mark.parametrize('target', ['__cublas$lt$matmul', '__cudnn$convForward'])
def test_room_for_a_library_to_work_in_is_no_traffic(target):
    attributes = f'custom_call_target="{target}", window={{size=1}}, dim_labels=b0f_0io->b0f'
    results = {
        '(f32[5,1,3]{2,1,0}, s8[4096]{0})': 60,
        '(f32[5,1,3]{2,1,0}, u8[4096]{0})': 60,
        's8[5,1,3]{2,1,0}': 15,
    }
    for result, size in results.items():
        module = module_with(
            '%l = f32[5,1,7]{2,1,0} parameter(0)',
            '%r = f32[1,7,3]{2,1,0} parameter(1)',
            f'ROOT %m = {result} custom-call(%l, %r), {attributes}',
            backend='gpu',
        )
        assert program_cost.cost(module).bytes == 4 * (35 + 21) + size


# Bytes that each of four devices sends of 128, and those if sums are made on the way.
COLLECTIVES = {
    'all-reduce': (192, 128),
    'all-gather': (384, 384),
    'reduce-scatter': (96, 96),
    'all-to-all': (96, 96),
    'collective-permute': (128, 128),
}

PROGRAMS = """
import json
import jax, numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P

def text_of(function, out_specs):
    mesh = Mesh(np.array(jax.devices()), ('data',))
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=P('data'), out_specs=out_specs, check_vma=False
    )
    return jax.jit(mapped).lower(np.ones((32, 4), np.float32)).compile().as_text()

print(json.dumps({
    'all-reduce': text_of(lambda x: lax.psum(x, 'data'), P()),
    'all-gather': text_of(lambda x: lax.all_gather(x, 'data'), P()),
    'reduce-scatter': text_of(lambda x: lax.psum_scatter(x, 'data', tiled=True), P('data')),
    'all-to-all': text_of(lambda x: lax.all_to_all(x, 'data', 0, 0, tiled=True), P('data')),
    'collective-permute': text_of(
        lambda x: lax.ppermute(x, 'data', [(i, (i + 1) % 4) for i in range(4)]), P('data')
    ),
}))
"""


@pytest.fixture(scope='module')
def programs_of_four_devices():
    """By kind, from a process that has four: of two, some of the numbers would be the same."""
    done = subprocess.run(
        [sys.executable, '-c', PROGRAMS], stdout=subprocess.PIPE, text=True, check=True,
        env=os.environ | {
            'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
        },
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize('kind', COLLECTIVES)
def test_collectives_of_four_devices(kind, programs_of_four_devices):
    module = hlo.parse(programs_of_four_devices[kind], 'cpu')
    assert program_cost.collectives(module) == {kind: 1}
    assert program_cost.cost(module).sent == COLLECTIVES[kind]


def test_a_collective_within_a_fusion_sends_as_much():
    inner = """%fused (p: f32[32]) -> f32[32] {
  %p = f32[32]{0} parameter(0)
  ROOT %r = f32[32]{0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add
}

"""
    module = module_with(
        '%x = f32[32]{0} parameter(0)',
        'ROOT %f = f32[32]{0} fusion(%x), kind=kCustom, calls=%fused',
        backend='tpu',
        partitions=4,
        computations=inner,
    )
    assert program_cost.collectives(module) == {'all-reduce': 1}
    assert program_cost.cost(module).sent == (192, 128)


@pytest.mark.parametrize(
    'groups,devices',
    [
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0'}", 8),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0','axis_1'}", 16),
        ('[4,4]<=[16]', 4),
        ('{{0,1},{2,3}}', 2),
        ('{}', 16),
    ],
)
def test_a_collective_that_has_begun_is_one_among_the_devices_of_its_group(groups, devices):
    module = module_with(
        '%p = f32[100]{0} parameter(0)',
        f'%s = f32[100]{{0}} all-reduce-start(%p), replica_groups={groups}, to_apply=%add',
        'ROOT %d = f32[100]{0} all-reduce-done(%s)',
        backend='gpu',
        partitions=16,
    )
    assert program_cost.collectives(module) == {'all-reduce': 1}
    sent = program_cost.cost(module).sent
    assert sent == (pytest.approx(2 * 400 * (devices - 1) / devices), 400)


def test_the_least_time_is_that_of_what_takes_longest():
    device = Accelerator(
        'a', 'gpu', {'f32': 1e12, 'tf32': 1e13, 'bf16': 1e14}, memory=0, bandwidth=1e9, links=1e6,
        cache=1000,
    )  # fmt: skip
    x = jnp.ones((512, 512))
    highest = cost_of(lambda x: jnp.matmul(x, x, precision='highest'), x)
    fastest = cost_of(lambda x: jnp.matmul(x, x), x)
    of_highest, of_fastest = (program_cost.least_time(x, device) for x in (highest, fastest))
    assert of_highest.products == 2 * 512**3 / 1e12 == of_fastest.products * 10
    assert of_highest.memory == pytest.approx(3 * (4 * 512**2 - 1000) / 1e9)
    assert of_highest.seconds == of_highest.memory
    small = cost_of(lambda x: x + 1, jnp.ones(100))
    assert program_cost.least_time(small, device).seconds == 0, 'a cache may hold it'


def test_precision_costs_what_the_units_of_a_device_need_for_it():
    for tpu in TPUS.values():
        assert tpu.peak('f32', 'highest') == tpu.peak('bf16', 'default') / 6
        assert tpu.peak('f32', 'default') == tpu.peak('bf16', 'highest') == tpu.peaks['bf16']
    for gpu in GPUS.values():
        assert gpu.peak('f32', 'highest') < gpu.peak('f32', 'high') == gpu.peak('f32', 'default')
        assert gpu.peak('f64', 'default') <= gpu.peak('f32', 'highest')
        assert gpu.peak('f32', 'default') < gpu.peak('bf16', 'default')
