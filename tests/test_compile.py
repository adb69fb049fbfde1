"""A run's step compiled for a target: the command, and that the program is the run's own."""

import dataclasses
import json
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

    if 'own' not in request.node.name:
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


def test_a_mesh_that_is_asked_for_is_obeyed(tmp_path):
    _, record = compiled(tmp_path, '--config.mesh.data=1')
    assert record['collectives'] == {}
    assert record['flops'] == 2 * 128 * (2 * 64 * 20 + 3 * 20 * 10)


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
    for _, x in hlo.parse(text).instructions():
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
    assert command.main(['compile', DIGITS, *TOY, f'--workdir={tmp_path}', *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'error: {message}')
    assert error.count('\n') == 1
    assert not (tmp_path / 'compile.json').exists()


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
    status, record = compiled(tmp_path, '--config.determinism.mode=hardware')
    assert status == 0
    assert record['compiles'] == {'deterministic': False, 'hardware': True}
    assert record['flops'] > 0


def test_a_step_that_does_not_fit_is_an_answer_and_says_what_would(tmp_path, capsys, monkeypatch):
    _, record = compiled(tmp_path)
    needed = record['memory_bytes']
    small = dataclasses.replace(find('cpu'), memory=needed - 20_000)
    monkeypatch.setattr(command, 'find', lambda text: small)
    capsys.readouterr()
    status, record = compiled(tmp_path)
    error = capsys.readouterr().err
    assert (status, error.count('\n')) == (1, 1)
    assert (record['memory_bytes'], record['memory_limit_bytes']) == (needed, needed - 20_000)
    (advised,) = re.findall(r'choose a batch_size of about (\d+), or more devices$', error)
    assert 32 < int(advised) < 128 and int(advised) % 2 == 0
    tiny = dataclasses.replace(small, memory=1)
    monkeypatch.setattr(command, 'find', lambda text: tiny)
    assert compiled(tmp_path)[0] == 1
    assert 'choose a smaller batch_size, more devices, or a smaller' in capsys.readouterr().err


def test_what_libtpu_says_of_memory_is_understood():
    reason = (
        'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space '
        'hbm. Used 17.25G of 15.75G hbm. Exceeded hbm capacity by 1.50G.'
    )
    target = Target('tpu:v5e:2x2', [None] * 4, None, 16 * 2**30)
    record = command.record_of(target, {'hardware': Attempt(1.0, reason=reason)}, 'hardware')
    assert record['memory_bytes'] == 17.25 * 2**30
    assert record['memory_limit_bytes'] == 15.75 * 2**30
    config = types.SimpleNamespace(determinism=types.SimpleNamespace(mode='hardware'))
    with pytest.raises(
        command.RunError, match=r'needs 17\.2 GiB of memory, a device has 15\.8; ch'
    ):
        command.check(config, target, {'hardware': Attempt(1.0, reason=reason)}, record)


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
