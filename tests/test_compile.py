"""A run's step compiled for a target: the command, and that the program is the run's own."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from zerojax import compile as command
from zerojax.measure import hlo
from zerojax.run import building, checks, compilation, data
from zerojax.run.compilation import Attempt
from zerojax.run.program import Program
from zerojax.run.target import Target, find, installed_compilers
from zerojax.step import determinism

ROOT = pathlib.Path(__file__).parent.parent
DIGITS = f'--config={ROOT}/configs/digits.py'
TOY = ['--config.model.name=mlp', '--config.model.init=averaging', '--config.model.width=20']
NO_LIBTPU = "libtpu, which compiles for TPUs, is missing: pip install 'zerojax[tpu]'"
NO_CUDA_PLUGIN = (
    "JAX's CUDA plugin, which compiles for GPUs, is missing: pip install 'zerojax[gpu]'"
)
FIELDS = {
    'target', 'devices', 'compiles', 'seconds', 'memory_bytes', 'memory_limit_bytes', 'flops',
    'bytes', 'bound_ms', 'collectives', 'custom_calls', 'nondeterministic_operations', 'precision',
}  # fmt: skip


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax's schedule mixes int32 and float."""
    with jax.numpy_dtype_promotion('standard'):
        yield


@pytest.fixture(autouse=True)
def no_data(monkeypatch, request):
    def load(*_):
        raise AssertionError('data were asked for')

    if request.node.get_closest_marker('loads_data') is None:
        monkeypatch.setattr(data, 'load', load)


def compiled(workdir, *flags, target='cpu'):
    """The exit status, and what compile.json says."""
    arguments = [DIGITS, *TOY, f'--target={target}', f'--workdir={workdir}', *flags]
    status = command.main(['compile', *arguments])
    return status, json.loads((workdir / 'compile.json').read_text())


def test_the_command_compiles_for_all_devices_and_tells_on_one_screen(tmp_path, capsys):
    status, record = compiled(tmp_path)
    output = capsys.readouterr()
    assert (status, output.err) == (0, '')
    lines = output.out.splitlines()
    assert len(lines) <= 40, 'one screen'
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 100
    assert record.keys() == FIELDS
    assert (record['target'], record['devices']) == ('cpu', 2)
    assert record['compiles'] == {'deterministic': True, 'hardware': True}
    assert record['seconds'] > 0
    assert 0 < record['memory_bytes'] < record['memory_limit_bytes']
    # Of 64 images on each device: outputs and weight gradients of both layers, and the gradient of
    # what comes into the second.
    assert record['flops'] == 2 * 64 * (2 * 64 * 20 + 3 * 20 * 10)
    assert record['bytes'] > 1437 // 2
    assert record['bound_ms'] is None
    assert record['collectives'].keys() == {'all-reduce'}
    assert record['precision'] == {'f32 highest': 5}
    assert {x['name'] for x in record['nondeterministic_operations']} == {'all-reduce'}


def test_a_mesh_that_is_asked_for_is_obeyed(tmp_path, capsys):
    _, record = compiled(tmp_path, '--config.mesh.data=1')
    assert record['devices'] == 1, 'those that share the batch'
    assert '\ndevices     1 of 2 x CPU; ' in capsys.readouterr().out
    assert record['collectives'] == {}
    assert record['flops'] == 2 * 128 * (2 * 64 * 20 + 3 * 20 * 10)


@pytest.mark.loads_data
@pytest.mark.parametrize('mesh', [1, 2])
def test_the_program_is_the_run_s_own(tiny_config, mesh):
    """Compiled from shapes alone it is, but for names, what a run compiles from its data."""
    tiny_config.mesh.data = mesh
    tiny_config.model.name, tiny_config.model.init = 'mlp', 'averaging'
    tiny_config.dataset.mean, tiny_config.dataset.std = (4.9,), (6.0,)
    dataset = data.load_of(tiny_config)
    config = checks.resolve(tiny_config, dataset)
    program = Program(config, dataset)
    scalars = program.place_scalars([building.scalars_of(config)])
    state = program.initial_state(scalars)
    own = program.compile_train_steps(state, program.source(state, scalars, epoch=0))

    config, stand_in = compilation.resolve(tiny_config, find('cpu'), mesh_given=True)
    found = compilation.compile_in_modes(config, stand_in, find('cpu'))
    text = found[config.determinism.mode].executable.as_text()
    assert without_origins(text) == without_origins(own.as_text())


def without_origins(text):
    """A program's instructions without what says where they came from, and names as they come."""
    lines, names = [], {}
    for _, x in hlo.parse(text, 'cpu').instructions():
        kept = re.split(', (?:sharding|frontend_attributes|metadata)=', x.attributes)[0]
        line = f'%{x.name} {x.opcode} {x.results} ({x.argument}) {kept}'
        lines.append(re.sub(r'%[\w.\-]+', lambda x: names.setdefault(x[0], f'%{len(names)}'), line))
    return lines


@pytest.mark.parametrize(
    'flags,message',
    [
        (['--target=gpu'], '--target=gpu: must be cpu, tpu:KIND:SLICE'),
        (['--target=tpu:v5e:5x5'], "--target=tpu:v5e:5x5: slice '5x5' must be one of"),
        (['--target=cpu', '--config.batch_size=33'], 'mesh.data=2: must divide batch_size=33'),
        (['--target=cpu', '--config.mesh.data=3'], 'mesh.data=3: must be at most 2, the devices'),
        (['--target=cpu', '--config.batch_size=2000'], 'batch_size=2000: must be at most 1437'),
        (['--target=cpu', '--config.dataset.train_split=all'], "dataset.train_split='all': digits"),
        (['--target=cpu', '--config.optimizer.freeze=x'], "optimizer.freeze='x': matches no"),
        (['--target=cpu', '--config.determinism.mode=any'], "determinism.mode='any': must be one"),
        (['--target=cpu', '--workdir=/dev/null/x'], '--workdir=/dev/null/x: cannot be written'),
        ([], '--target: missing; such as tpu:v5e:4x4, gpu:h100:8 or cpu'),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flags, message):
    workdir = tmp_path / 'new'
    assert command.main(['compile', DIGITS, *TOY, f'--workdir={workdir}', *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'error: {message}')
    assert error.count('\n') == 1
    assert not workdir.exists()


def test_what_cannot_be_written_is_found_before_anything_is_compiled(tmp_path, capsys, monkeypatch):
    def compile_in_modes(*_):
        raise AssertionError('compiled')

    monkeypatch.setattr(command, 'compile_in_modes', compile_in_modes)
    (tmp_path / 'compile.json').mkdir()
    for workdir, reason in (
        (tmp_path, f'{tmp_path}/compile.json is a folder; name another workdir'),
        ('/proc', 'cannot be written (No such file or directory); name another folder'),
    ):
        assert command.main(['compile', DIGITS, *TOY, '--target=cpu', f'--workdir={workdir}']) == 2
        assert capsys.readouterr().err == f'error: --workdir={workdir}: {reason}\n'


def test_what_was_found_is_on_the_screen_before_it_is_written(tmp_path, capsys, monkeypatch):
    def write_json(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(command.records, 'write_json', write_json)
    assert command.main(['compile', DIGITS, *TOY, '--target=cpu', f'--workdir={tmp_path}']) == 1
    output = capsys.readouterr()
    assert '\nmemory ' in output.out
    assert output.err.startswith('error: No space left on device')


def test_xla_s_own_messages_stay_off_unless_asked_for():
    code = 'import os, zerojax.compile; print(os.environ["TF_CPP_MIN_LOG_LEVEL"])'
    environment = {name: x for name, x in os.environ.items() if name != 'TF_CPP_MIN_LOG_LEVEL'}
    for given, level in (({}, '3'), ({'TF_CPP_MIN_LOG_LEVEL': '0'}, '0')):
        done = subprocess.run(
            [sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT,
            env=environment | given,
        )  # fmt: skip
        assert done.stdout == f'{level}\n'


def test_a_step_that_compiles_in_one_mode_alone_is_an_answer(tmp_path, capsys, monkeypatch):
    unknown = {'xla_cpu_no_such_option': True}
    monkeypatch.setitem(determinism._OPTIONS, ('cpu', 'deterministic'), unknown)
    status, record = compiled(tmp_path)
    error = capsys.readouterr().err
    assert status == 1
    assert error.startswith(
        "error: --target=cpu: the step does not compile in determinism.mode='deterministic' ("
    )
    assert error.endswith("; choose determinism.mode='hardware', in which it does\n")
    assert error.count('\n') == 1
    assert record.keys() == FIELDS
    assert record['compiles'] == {'deterministic': False, 'hardware': True}
    assert record['flops'] is None and record['collectives'] is None
    assert 'what follows is' not in capsys.readouterr().out
    status, record = compiled(tmp_path, '--config.determinism.mode=hardware')
    assert status == 0
    assert '; what follows is of hardware\n' in capsys.readouterr().out
    assert record['compiles'] == {'deterministic': False, 'hardware': True}
    assert record['flops'] > 0


@pytest.fixture
def needed(tmp_path, capsys):
    """Bytes of each of two devices, by the batch."""
    found = {
        batch: compiled(tmp_path, f'--config.batch_size={batch}')[1]['memory_bytes']
        for batch in (2, 128)
    }
    capsys.readouterr()
    return found


def advice(needed, there, *flags, workdir, capsys, monkeypatch):
    """What a target of so little memory is told to choose."""
    small = dataclasses.replace(find('cpu'), memory=there)
    monkeypatch.setattr(command, 'find', lambda text: small)
    status, record = compiled(workdir, *flags)
    error = capsys.readouterr().err
    assert (status, error.count('\n')) == (1, 1)
    assert (record['memory_bytes'], record['memory_limit_bytes']) == (needed, there)
    assert error.startswith('error: --target=cpu: the step needs ')
    return error.partition(' GiB of memory, a device has ')[2].partition('; ')[2][:-1]


def test_where_activations_decide_a_smaller_batch_is_advised(needed, tmp_path, capsys, monkeypatch):
    there = (needed[2] + needed[128]) // 2
    advised = advice(needed[128], there, workdir=tmp_path, capsys=capsys, monkeypatch=monkeypatch)
    (batch,) = re.findall('^choose a batch_size of about (\\d+), or more devices$', advised)
    assert int(batch) in (64, 66)


def test_where_weights_decide_a_smaller_batch_is_not_advised(needed, tmp_path, capsys, monkeypatch):
    """Though temporaries, gradients among them, are more than what would have to go."""
    for batch in needed:
        flag = f'--config.batch_size={batch}'
        advised = advice(
            needed[batch], needed[2] - 1, flag,
            workdir=tmp_path, capsys=capsys, monkeypatch=monkeypatch,
        )  # fmt: skip
        assert re.fullmatch(
            'with one example a device it would need .*: choose a smaller model.width or '
            'model.depth, or param_dtype=bfloat16', advised
        )  # fmt: skip


RESERVED = (
    'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space '
    'hbm. Used 17.25G of 15.75G hbm. Exceeded hbm capacity by 1.50G.'
)
TEMPORARIES = (
    'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
    '(56.81G) exceeds available HBM (15.75G).'
)
VMEM = (
    'RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.25M of 16.00M vmem. '
    'Exceeded vmem capacity by 1.25M.'
)


@pytest.mark.parametrize('reason,needed', [(RESERVED, 17.25), (TEMPORARIES, 56.81)])
def test_what_libtpu_says_of_memory_is_understood(tiny_config, monkeypatch, reason, needed):
    target = Target('tpu:v5e:2x2', [None] * 4, None, 16 * 2**30)
    attempt = Attempt('tpu', 1.0, reason=reason)
    attempts = {tiny_config.determinism.mode: attempt}
    record = command.record_of(tiny_config, target, attempts)
    assert record['memory_bytes'] == round(needed * 2**30)
    assert record['memory_limit_bytes'] == 15.75 * 2**30
    monkeypatch.setattr(command, 'compile_step', lambda *_: attempt)
    with pytest.raises(
        command.RunError,
        match=rf'needs {needed:.3g} GiB of memory, a device has 15\.8; with one ex',
    ):
        command.check(tiny_config, None, target, attempts)


def test_what_overflows_on_the_chip_does_not_compile(tiny_config):
    """Another batch or network need not help."""
    target = Target('tpu:v5e:2x2', [None] * 4, None, 16 * 2**30)
    attempts = {tiny_config.determinism.mode: Attempt('tpu', 1.0, reason=VMEM)}
    record = command.record_of(tiny_config, target, attempts)
    assert (record['memory_bytes'], record['memory_limit_bytes']) == (None, 16 * 2**30)
    with pytest.raises(command.RunError, match=r'does not compile in determinism\.mode='):
        command.check(tiny_config, None, target, attempts)


def test_long_lines_are_wrapped_and_nothing_is_cut(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, '_listed', lambda counts: 'all-reduces ' * 30)
    compiled(tmp_path)
    output = capsys.readouterr().out
    assert max(len(x) for x in output.splitlines() if str(tmp_path) not in x) <= 100
    assert output.count('all-reduces') == 3 * 30, 'precision, collectives and calls'


def test_the_step_of_a_target_has_what_is_fast_there(tiny_config):
    """Not what is fast on the CPU that compiles it."""
    tiny_config.model.convolution = 'auto'
    config, dataset = compilation.resolve(tiny_config, find('cpu'), mesh_given=True)
    gpus = [types.SimpleNamespace(platform='gpu', process_index=0)]
    assert Program(config, dataset, devices=gpus).model.convolution == 'direct'
    assert Program(config, dataset).model.convolution in ('mixed', 'patches')


def test_batches_are_the_images_that_the_order_names(tiny_config):
    tiny_config.dataset.mean, tiny_config.dataset.std = (0.0,), (1.0,)
    dataset = data.stand_in(tiny_config)
    images = np.random.default_rng(0).integers(0, 17, dataset.train.images.shape, np.uint8)
    dataset = dataclasses.replace(dataset, train=data.Split(images, dataset.train.labels))
    config = checks.resolve(tiny_config, dataset)
    program = Program(config, dataset)
    scalars = building.scalars_of(config)
    state = program.initial_state(scalars)
    source = program.source(state, scalars, epoch=0)
    batch = program.make_batch(state, source)
    np.testing.assert_array_equal(
        batch['image'], images[np.asarray(source.order)[: config.batch_size]]
    )


@pytest.fixture
def elsewhere(tmp_path):
    """Runs the command in a process of its own: compilers of devices do not leave a process."""

    def run(target, config, *flags):
        workdir = tmp_path / target.replace(':', '_')
        arguments = [config, *TOY, f'--target={target}', f'--workdir={workdir}', *flags]
        done = subprocess.run(
            [sys.executable, '-m', 'zerojax.compile', *arguments],
            capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads((workdir / 'compile.json').read_text())

    return run


@pytest.mark.slow
@pytest.mark.skipif(not installed_compilers('tpu'), reason=NO_LIBTPU)
def test_a_tpu_slice(elsewhere):
    cifar = f'--config={ROOT}/configs/cifar.py'
    one, four = (
        elsewhere(f'tpu:v5e:{shape}', cifar, f'--config.batch_size={batch}')
        for shape, batch in (('1x1', 16), ('2x2', 64))
    )
    assert (one['devices'], four['devices']) == (1, 4)
    assert one['flops'] == four['flops'] > 0
    assert one['collectives'] == {} and four['collectives'].keys() == {'all-reduce'}
    assert one['compiles'] == {'deterministic': True, 'hardware': True}
    assert one['precision'].keys() == {'f32 highest'}
    training_set = 50_000 * 32 * 32 * 3
    for record in (one, four):
        assert record['memory_bytes'] < 1.1 * training_set, 'no copy of the training set'
        assert record['bytes'] < training_set, 'it is not read either'
        assert 0 < record['bound_ms'] < 1


@pytest.mark.slow
@pytest.mark.skipif(not installed_compilers('tpu'), reason=NO_LIBTPU)
def test_many_tpus_sum_gradients_and_exchange_nothing_else(elsewhere):
    """Where each of them takes its part of a large batch, too."""
    record = elsewhere(
        'tpu:v5e:16x16', f'--config={ROOT}/configs/cifar.py', '--config.batch_size=32768'
    )
    assert record['collectives'].keys() == {'all-reduce'}


@pytest.mark.slow
@pytest.mark.skipif(not installed_compilers('tpu'), reason=NO_LIBTPU)
@pytest.mark.parametrize('target', ['tpu:v4:2x2x1', 'tpu:v5p:1x1x1', 'tpu:v6e:2x2'])
def test_other_tpus(elsewhere, target):
    record = elsewhere(target, DIGITS)
    devices = 1 if target.endswith('1x1x1') else 4
    assert record['devices'] == devices, 'a chip is a device'
    assert record['flops'] == 2 * 128 // devices * (2 * 64 * 20 + 3 * 20 * 10)
    assert record['memory_bytes'] < record['memory_limit_bytes']


@pytest.mark.slow
@pytest.mark.skipif(not installed_compilers('gpu'), reason=NO_CUDA_PLUGIN)
@pytest.mark.parametrize('target', ['gpu:a100', 'gpu:h100:2', 'gpu:h200:2x2', 'gpu:b200'])
def test_gpus(elsewhere, target):
    record = elsewhere(target, DIGITS)
    devices = {'gpu:a100': 1, 'gpu:h100:2': 2, 'gpu:h200:2x2': 4, 'gpu:b200': 1}[target]
    assert record['devices'] == devices
    assert record['compiles'] == {'deterministic': True, 'hardware': True}
    assert record['flops'] == 2 * 128 // devices * (2 * 64 * 20 + 3 * 20 * 10)
    assert record['collectives'].keys() == ({'all-reduce'} if devices > 1 else set())
    assert record['bound_ms'] > 0
