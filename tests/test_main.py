"""The command line as a user meets it: exit statuses, messages, kill and resume."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import jax
import pytest

from zerojax import main
from zerojax.host.command import exit_status
from zerojax.host.errors import UsageError
from zerojax.run.cli import parse_flags
from zerojax.run.train import train

ROOT = pathlib.Path(__file__).parent.parent
DIGITS = f'--config={ROOT}/configs/digits.py'
# The digits run made short: ConstNet-7-1, 44 steps, a checkpoint every 3 steps.
SHORT = [
    DIGITS, '--config.num_steps=44', '--config.model.depth=7', '--config.log_every_steps=4',
    '--config.eval_every_steps=10', '--config.checkpoint_every_steps=3',
    '--config.steps_per_call=2',
]  # fmt: skip
# The network that is compiled in the shortest time.
TOY = [
    DIGITS, '--config.num_steps=4', '--config.model.name=mlp', '--config.model.init=averaging',
    '--config.model.width=8', '--config.model.convolution=direct',
]  # fmt: skip


def command(*arguments):
    return [sys.executable, '-m', 'zerojax.main', *map(str, arguments)]


def environment(**extra):
    # One device, as a user has; not the two of conftest.
    return {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | extra


# Nothing compiled by another process.
FRESH = {'JAX_ENABLE_COMPILATION_CACHE': 'false'}


def run(*arguments, **extra):
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=300, cwd=ROOT,
        env=environment(**extra),
    )  # fmt: skip


def start(*arguments):
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=environment(),
    )  # fmt: skip


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def summary(workdir):
    return json.loads((workdir / 'summary.json').read_text())


def latest_checkpoint(workdir):
    folder = workdir / 'checkpoints'
    return max((int(p.name) for p in folder.glob('*') if p.name.isdigit()), default=-1)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('undisturbed')
    done = run(*SHORT, f'--workdir={workdir}', **FRESH)
    assert done.returncode == 0, done.stderr
    assert done.stderr == '', 'a run that goes well has nothing to complain of'
    assert 'starting at step 0 of 44' in done.stdout
    assert len(re.findall(r'^step \d+/44 .*accuracy', done.stdout, re.M)) == 6
    return workdir


@pytest.mark.slow
def test_a_second_process_gives_the_same_weights_and_records(undisturbed, tmp_path):
    done = run(*SHORT, f'--workdir={tmp_path}', **FRESH)
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path)['params_sha256'] == summary(undisturbed)['params_sha256']
    metrics = 'metrics.jsonl'
    assert (tmp_path / metrics).read_bytes() == (undisturbed / metrics).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize('number,status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_resumes(undisturbed, tmp_path, number, status, capsys):
    process = start(*SHORT, f'--workdir={tmp_path}')
    wait_for(lambda: latest_checkpoint(tmp_path) >= 3, process)
    process.send_signal(signal.SIGSTOP)  # so that it does not finish meanwhile
    assert main.main(['main', *SHORT, f'--workdir={tmp_path}']) == 2
    assert 'another process is training in it' in capsys.readouterr().err
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    stopped_at = int(re.search(r'stopped and saved at step (\d+)', errors)[1])
    assert latest_checkpoint(tmp_path) == stopped_at
    assert not (tmp_path / 'summary.json').exists()
    done = run(*SHORT, f'--workdir={tmp_path}')
    assert f'RESUMING at step {stopped_at} of 44' in done.stdout
    assert summary(tmp_path)['params_sha256'] == summary(undisturbed)['params_sha256']


def test_the_command_trains_and_imports_neither_tensorflow_nor_tfds(tmp_path):
    code = (
        'import runpy, sys\n'
        'try: runpy.run_module("zerojax.main", run_name="__main__", alter_sys=True)\n'
        'finally: print({"tensorflow", "tensorflow_datasets"} & sys.modules.keys())\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, *TOY, f'--workdir={tmp_path}'],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ''), 'nothing to complain of'
    assert 'starting at step 0 of 4' in done.stdout
    assert done.stdout.endswith('set()\n')
    assert summary(tmp_path)['step'] == 4


@pytest.mark.parametrize(
    'arguments,message',
    [
        ([], r'--config: missing'),
        (['--config=nowhere.py'], r'nowhere\.py'),
        ([DIGITS + ':full'], r"variant 'full' of configs/digits\.py: must be 'wide'"),
        (
            [DIGITS.replace('digits', 'leakynet') + ':full'],
            r'get_config\(\) takes 0 positional arguments',
        ),
        ([DIGITS, '--config.model.depht=7'], r'model\.depht: no such field; allowed: .*depth'),
        ([DIGITS, '--config.num_steps=many'], r'config\.num_steps=many'),
        ([DIGITS, '--config.num_steps=0'], r'num_steps=0: must be from 1'),
        ([DIGITS, '--config.model.depth=11'], r'model\.depth=11: must be 3n \+ 4'),
        ([DIGITS, '--config.perturbation.scale=-1'], r'perturbation\.scale=-1\.0'),
        ([DIGITS, '--config.perturbation.streams=(1,)'], r'streams=\(1,\): must be a tuple of n'),
        (
            [DIGITS, '--config.perturbation.streams=stem,block3'],
            r"perturbation\.streams=\('stem,block3',\): 'stem,block3' is no stream of this network"
            '; must be of stem, block2_0, block3_0, or',
        ),
        (
            [DIGITS, '--config.perturbation.streams=stem', '--config.perturbation.layers=head'],
            r"streams=\('stem',\): index nothing that perturbation\.layers='head' chooses, but "
            r'block1_0/bn/bias, .*; choose others in one of the two',
        ),
        (
            [DIGITS, '--config.perturbation.streams=block3_0', '--config.perturbation.layers=stem',
             '--config.perturbation.kind=gradient'],
            r"streams=\('block3_0',\): index nothing that perturbation\.layers='stem' chooses",
        ),
        (
            [DIGITS, '--config.perturbation.streams=stem', '--config.perturbation.layers=(stem|h)',
             '--config.optimizer.freeze=stem'],
            r"freeze='stem': freezes all that perturbation\.layers='\(stem\|h\)' and "
            r"perturbation\.streams=\('stem',\) choose",
        ),
        (
            [DIGITS, '--config.perturbation.streams=stem', '--config.perturbation.layers=block3',
             '--config.perturbation.kind=activation'],
            r"streams=\('stem',\): no layer that perturbation\.layers='block3' chooses puts out "
            'features of these, but of block3_0; choose others',
        ),
        (
            [DIGITS, '--config.perturbation.streams=stem', '--config.perturbation.kind=ulp',
             '--config.perturbation.scale=0.0'],
            r"perturbation\.streams=\('stem',\): ulp has no use for it",
        ),
        (
            [DIGITS, '--config.perturbation.streams=block3_0',
             '--config.perturbation.kind=one_weight', '--config.perturbation.layers=block3_./conv'],
            r"perturbation\.streams=\('block3_0',\): chooses 0 weights that are not 0",
        ),
        ([DIGITS, '--config.dataset.name=imagenet'], r"dataset\.name='imagenet': .*digits"),
        ([DIGITS, '--wrkdir=x'], r"Unknown command line flag 'wrkdir'"),
        ([DIGITS, '--workdir'], r'Missing value for flag --workdir'),
        ([DIGITS, 'extra'], r"unexpected argument 'extra'"),
        ([DIGITS, '--workdir=/proc/none/x'], r'--workdir=/proc/none/x: cannot be written'),
    ],
)  # fmt: skip
def test_a_mistake_exits_2_with_one_line(arguments, message, tmp_path, capsys):
    if not any('workdir' in argument for argument in arguments):
        arguments = [*arguments, f'--workdir={tmp_path}/run']
    assert main.main(['main', *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count('\n') == 1, error
    assert error.startswith('error: ')
    assert not (tmp_path / 'run').exists()


def test_whatever_a_mistake_quotes_its_message_is_one_printable_line(capsys):
    def command():
        raise UsageError('--workdir=a\nb\r\u2028\x1b[31m\udc80: no')

    assert exit_status(command) == 2
    assert capsys.readouterr().err == 'error: --workdir=a\\nb\\r\\u2028\\x1b[31m\\udc80: no\n'


@pytest.mark.parametrize(
    'error',
    [
        MemoryError(),
        MemoryError('Unable to allocate 3.64 PiB'),
        jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore'),
    ],
)
def test_memory_that_does_not_suffice_is_a_failure_of_one_line(error, capsys):
    def command():
        raise error

    assert exit_status(command) == 1
    printed = capsys.readouterr().err
    assert printed.startswith('error: memory does not suffice (')
    assert printed.count('\n') == 1


def test_a_workdir_of_too_long_a_name_is_a_mistake(tmp_path, capsys):
    config, _ = parse_flags(['main', DIGITS])
    assert exit_status(lambda: train(config, tmp_path / ('a' * 300))) == 2
    assert re.match(
        r'error: --workdir=.*a: cannot be written \(.*: File name', capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_a_set_that_cannot_be_had_is_an_error_within_20_s(tmp_path, monkeypatch, capfd):
    """A proxy that refuses stands for a machine without a network."""
    monkeypatch.setattr('urllib.request._opener', None)  # it would keep the proxies it began with
    for name, value in {'http_proxy': 'http://127.0.0.1:9', 'no_proxy': ''}.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(name.replace('http_', 'https_'), value)
    arguments = [
        f'--config={ROOT}/configs/cifar.py:trial', f'--config.dataset.data_dir={tmp_path}/data',
        f'--workdir={tmp_path}/run',
    ]  # fmt: skip
    began = time.monotonic()
    assert main.main(['main', *arguments]) == 2
    assert time.monotonic() - began < 20
    error = capfd.readouterr().err
    assert error.count('\n') == 1, error
    for hint in ('cifar-10-binary.tar.gz', f'{tmp_path}/data/downloads/manual', 'zerojax:digits',
                 '--config.dataset.data_dir'):  # fmt: skip
        assert hint in error
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('flag', ['-h', '--help'])
def test_help_is_the_docstring_and_needs_no_jax(flag, monkeypatch, capsys):
    monkeypatch.setattr(main, 'run', None)
    monkeypatch.setitem(sys.modules, 'jax', None)
    assert main.main(['main', DIGITS, flag]) == 0
    assert capsys.readouterr().out == main.__doc__ + '\n'


def test_late_operations_of_a_failed_save_say_nothing(monkeypatch):
    said = []
    monkeypatch.setattr(sys, 'unraisablehook', lambda each: said.append(str(each.exc_value)))
    for _ in range(2):
        assert exit_status(lambda: None) == 0
    for error in (RuntimeError('Event loop is closed'), RuntimeError('other'), OSError('b')):
        sys.unraisablehook(types.SimpleNamespace(exc_value=error))
    assert said == ['other', 'b']
