"""The audit of a step: the command, and what a run of mode 'hardware' begins with."""

import json
import pathlib
import subprocess
import types

import jax
import numpy as np
import pytest

from zerojax import audit
from zerojax.measure import noise, step_audit
from zerojax.measure.compiled import Operation
from zerojax.measure.noise import Spread
from zerojax.measure.step_audit import COMPILATIONS, ONE_EXECUTABLE, PROCESSES, Verdict
from zerojax.run import inspection, train
from zerojax.run.cli import parse_flags

ROOT = pathlib.Path(__file__).parent.parent
DIGITS = f'--config={ROOT}/configs/digits.py'
TOY = ['--config.model.name=mlp', '--config.model.width=9', '--config.model.convolution=direct']
QUIET = Spread(1, 0, 0.0, 0.0, 1.0)
NOISY = Spread(3, 7, 1e-7, 2e-7, 0.5)


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax's schedule mixes int32 and float."""
    with jax.numpy_dtype_promotion('standard'):
        yield


def test_the_command_measures_calls_compilations_and_processes(tmp_path, capsys):
    flags = [DIGITS, *TOY, '--repeats', '3', '--compilations', '2', '--processes=1']
    assert audit.main(['audit', *flags, f'--workdir={tmp_path}/run']) == 0
    output = capsys.readouterr().out
    assert 'no noise observed in 3 calls, 2 compilations and 2 processes.' in output
    assert 'Kernels keep equal features bitwise equal in all 2 layers.' in output
    assert 'none in the program' in output
    assert '\nstreams, each broken alone\n  no other stream has equal features\n' in output
    lines = output.splitlines()
    assert len(lines) <= 40, 'one screen'
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 100

    record = json.loads((tmp_path / 'run' / 'audit.json').read_text())
    assert record['compared'] == {ONE_EXECUTABLE: 3, COMPILATIONS: 2, PROCESSES: 2}
    for floor in record['noise'].values():
        for name in (
            'forward/loss', 'forward/outputs/hidden', 'gradients/outputs/hidden',
            'gradients/params/head/kernel', 'new state/params/hidden/bias',
            'new state/metrics/grad_norm',
        ):  # fmt: skip
            assert floor[name]['distinct'] == 1
            assert floor[name]['magnitude'] > 0, f'{name} tells something'
    assert record['features'].keys() >= {'outputs/hidden', 'new_params/head/kernel'}
    assert record['streams'] == {'hidden': {}}
    assert record['compiler_options'] == {'xla_cpu_experimental_ynn_fusion_type': ''}
    assert sorted(x.name for x in (tmp_path / 'run').iterdir()) == ['audit.json']


@pytest.mark.parametrize(
    'flags,message',
    [
        (['--repeats=1'], '--repeats=1: must be a whole number of at least 2'),
        (['--compilations=x'], '--compilations=x: must be a whole number of at least 2'),
        (['--processes=-1'], '--processes=-1: must be a whole number of at least 0'),
        (['--config.determinism.mode=exact'], "determinism.mode='exact': must be one of"),
        (['--config.batch_size=9999', '--processes=0'], 'batch_size=9999: must be at most'),
        (['--config.optimizer.freeze=x', '--processes=0'], "optimizer.freeze='x': matches no"),
        (['--workdir=/dev/null/x'], '--workdir=/dev/null/x: cannot be written'),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flags, message):
    assert audit.main(['audit', DIGITS, f'--workdir={tmp_path}', *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'error: {message}')
    assert error.count('\n') == 1


def test_a_mode_that_cannot_be_granted_is_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        audit.determinism._OPTIONS, ('cpu', 'deterministic'), {'xla_cpu_no_such_option': True}
    )
    flags = [DIGITS, f'--workdir={tmp_path}', '--processes=0']
    assert audit.main(['audit', *flags]) == 2
    assert 'does not take xla_cpu_no_such_option=True' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('ended', 'said', 'status', 'message'),
    [
        (2, 'noise\nerror: batch_size=9: must\n', 2, 'batch_size=9: must'),
        (1, 'a\nRuntimeError: b\n', 1, 'a fresh process ended with status 1: RuntimeError: b'),
        (-9, '', 1, 'a fresh process ended with status -9: no message'),
    ],
)
def test_what_a_process_finds_wrong_is_said(
    ended, said, status, message, tmp_path, capsys, monkeypatch
):
    done = subprocess.CompletedProcess([], ended, '', said)
    instead = types.SimpleNamespace(run=lambda *_, **__: done)
    monkeypatch.setattr(audit, 'subprocess', instead)
    assert audit.main(['audit', DIGITS, f'--workdir={tmp_path}', '--processes=1']) == status
    assert capsys.readouterr().err == f'error: {message}\n'


def test_what_processes_write_is_read_to_the_bit(tmp_path):
    tensors = {
        'forward/x': np.asarray(jax.numpy.array([1.5, -0.0], 'bfloat16')),
        'new state/count': np.asarray(3, np.int32),
    }
    np.savez(tmp_path / 'x.npz', **tensors)
    read = audit.read_tensors(tmp_path / 'x.npz', tensors)
    assert all(spread.distinct == 1 for spread in noise.noise_floor([tensors, read]).values())


def test_streams_of_the_digits_config_are_kept_while_another_is_broken():
    config, _ = parse_flags(['audit', DIGITS])
    program = audit.prepare_step(config)
    compiled = audit.compile_step(program)
    axes = program.model.feature_axes()
    streams = step_audit.break_streams(compiled, axes, program.orbits, new_state=True)
    names = {'stem', 'block2_0', 'block3_0'}
    assert {broken: set(others) for broken, others in streams.items()} == {
        broken: names - {broken} for broken in names
    }
    for others in streams.values():
        assert all(x.distinct == 1 for tensors in others.values() for x in tensors.values())
        assert all(x.magnitude > 0 for tensors in others.values() for x in tensors.values())
    for name in ('outputs/stem', 'new_params/block1_0/conv/kernel'):
        assert name in streams['block2_0']['stem']
    assert 'new_batch_stats/block3_0/bn/mean' in streams['stem']['block2_0']


@pytest.mark.slow
def test_streams_that_identities_tie_together_are_left_out(tmp_path, capsys):
    leakynet = ['--config.model.name=leakynet', '--config.model.depth=7']
    flags = [*leakynet, '--config.model.init=1_ii_i', '--repeats=2', '--compilations=2']
    assert audit.main(['audit', DIGITS, *flags, '--processes=0', f'--workdir={tmp_path}']) == 0
    assert '\nstreams   left out: identity layers tie one to' in capsys.readouterr().out
    assert json.loads((tmp_path / 'audit.json').read_text())['streams'] is None


@pytest.mark.slow
def test_the_step_is_the_run_s_own_and_has_no_scatter(tiny_config):
    """The loss uses one-hot labels and images are pooled by the mean, so nothing adds by index."""
    tiny_config.dataset.augment = True
    tiny_config.model.dropout = 0.1
    program = audit.prepare_step(tiny_config)
    compiled = audit.compile_step(program)
    assert 'while(' in compiled.train_steps.as_text(), 'steps_per_call=5 is a loop'
    assert compiled.operations('gpu') == []
    verdict = step_audit.audit_compiled(compiled, program.feature_axes, 2)
    assert not verdict.unequal_layers(), 'measured without dropout'
    assert sorted(verdict.layers()) == ['block1_0', 'block2_0', 'block3_0', 'head', 'stem']
    assert not verdict.silent()
    assert not audit.new_state_shows_kernels(program.config)
    assert int(compiled.state.step) == 0, 'not donated'


@pytest.fixture(scope='module')
def hardware_run(tmp_path_factory):
    config = train.config_lib.default_config()
    config.dataset.name, config.num_steps = 'digits', 4
    config.model.name, config.model.width = 'mlp', 9
    config.determinism.mode = 'hardware'
    workdir = tmp_path_factory.mktemp('hardware')
    with jax.numpy_dtype_promotion('standard'):
        return config, workdir, train.train(config, workdir)


def manifest(workdir):
    return json.loads((workdir / 'manifest.json').read_text())


def test_a_hardware_run_begins_with_an_audit_and_keeps_it(hardware_run):
    config, workdir, _ = hardware_run
    first = manifest(workdir)['audit']
    assert first['verdict'][0].endswith(f'no noise observed in {inspection.AUDIT_REPEATS} calls.')
    assert first['unequal_features'] == {}
    assert first['noise'][ONE_EXECUTABLE].keys() == set(step_audit.PARTS)
    train.train(config, workdir)
    assert manifest(workdir)['audit'] == first, 'a resumed run keeps the verdict of its start'
    assert len(manifest(workdir)['starts']) == 2


def test_the_audit_leaves_no_trace_in_the_run(hardware_run, tmp_path):
    config, _, summary = hardware_run
    config = config.copy_and_resolve_references()
    config.determinism.mode = 'deterministic'  # on a CPU the same options, and no audit
    without = train.train(config, tmp_path)
    assert 'audit' not in manifest(tmp_path)
    assert without['params_sha256'] == summary['params_sha256']


def verdict(**changed):
    tensors = [f'{part}/x{i}' for part in step_audit.PARTS for i in range(4)]
    quiet = dict.fromkeys(tensors, QUIET)
    fields = {
        'compared': {ONE_EXECUTABLE: 10, COMPILATIONS: 3, PROCESSES: 3},
        'noise': {ONE_EXECUTABLE: quiet, COMPILATIONS: quiet, PROCESSES: quiet},
        'operations': [],
        'features': {f'outputs/layer{i}': QUIET for i in range(40)},
    }
    return Verdict(**(fields | changed))


def test_each_scope_is_told_apart():
    noise = verdict().noise
    noise[COMPILATIONS] = noise[COMPILATIONS] | {'gradients/x2': NOISY}
    sentences = verdict(noise=noise).sentences()
    assert sentences[0] == 'No noise observed in 10 calls and 3 processes.'
    assert sentences[1] == (
        'Noise of its own in 3 compilations: 1 of 12 tensors differ, most of all gradients/x2: '
        '7 ULPs, 2e-07 of its largest number.'
    )


def test_layers_whose_features_differ_are_named():
    told = verdict(features=verdict().features | {'gradients/layer7/kernel': NOISY})
    assert told.unequal_layers() == {'layer7': ('gradients/layer7/kernel', NOISY)}
    assert told.sentences()[1].startswith(
        'Kernels do not keep equal features equal in 1 of 40 layers, least of all '
        'gradients/layer7/kernel: 3 distinct features, 7 ULPs'
    )
    assert any(line.startswith('  layer7 ') for line in told.table())
    assert 'gradients/layer7/kernel' in told.record(full=False)['unequal_features']


def test_streams_that_differ_come_first():
    kept = {'stem': {'outputs/stem': QUIET}}
    streams = {f'block{i}': kept for i in range(5)} | {'block5': {'stem': {'outputs/stem': NOISY}}}
    told = verdict(streams=streams)
    assert told.table()[-6:] == [
        'streams, each broken alone',
        '  block5           differ, in ULPs: stem by 7',
        *[f'  block{i}           all others bitwise equal' for i in range(3)],
        '  and 2 more, see audit.json',
    ]
    assert told.sentences()[-1].startswith(
        'Kernels do not keep all other streams equal while one is broken, for 1 of 6 streams, '
        'least of all stem while block5 is broken, in outputs/stem: 3 distinct features, 7 ULPs'
    )


def test_tensors_that_tell_nothing_are_said_to():
    noise = verdict().noise
    noise[ONE_EXECUTABLE] = noise[ONE_EXECUTABLE] | {'forward/x1': Spread(1, 0, 0.0, 0.0, 0.0)}
    zero = Spread(1, 0, 0.0, 0.0, 0.0)
    streams = {'a': {'b': {'outputs/x': QUIET, 'outputs/y': zero, 'new_params/z': zero}}}
    assert verdict(noise=noise, streams=streams).sentences()[-1] == (
        'Tensors that are 0 throughout and tell nothing: forward/x1, outputs/y while a is broken.'
    )


def test_the_worst_verdict_is_one_screen(tiny_config):
    long = 'x' * 60
    floor = {f'{part}/{long}': Spread(3, float('inf'), *[float('inf')] * 2, 1.0)
             for part in step_audit.PARTS}  # fmt: skip
    told = verdict(
        noise=dict.fromkeys((ONE_EXECUTABLE, COMPILATIONS, PROCESSES), floor),
        operations=[Operation(f'operation{i}', i, long * 3) for i in range(30)],
        features={f'outputs/layer{i}': NOISY for i in range(40)},
        streams={
            x: {f'{x}{i}': {f'outputs/{long}': NOISY} for i in range(9)} for x in ('block', long)
        }
        | {f'stem{i}': {'stem': {'outputs/stem': QUIET}} for i in range(9)},
    )
    lines = audit.screen(tiny_config, told)
    assert len(lines) <= 58
    assert any(line.startswith('  block   ') and line.endswith(' and 6 more') for line in lines)
    assert max(map(len, lines)) <= 100
    json.dumps(told.record(full=True), allow_nan=False)
