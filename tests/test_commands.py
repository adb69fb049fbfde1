"""Every command alike: where it writes, and when it refuses to."""

import os
import runpy
import subprocess
import sys
import warnings

import jax
import pytest
from shell import DIGITS, ROOT

from zerojax.host.errors import UsageError
from zerojax.run import cli

COMMANDS = [
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__main__')
    for room in ('zerojax', 'experiments')
    for path in sorted((ROOT / room).rglob('*.py'))
    if "__name__ == '__main__'" in path.read_text()
]
WITHOUT_FLAGS = {'experiments.own_model'}  # as a user would write it
WITHOUT_A_FOLDER = {
    'experiments.all', 'experiments.performance.execution', 'zerojax.compare', 'zerojax.convert',
}  # fmt: skip
RUNS = {'zerojax.main', 'zerojax.sweep'}  # whose folders the runs make
WITHOUT_A_CONFIG = {'experiments.architectures', 'experiments.drawings'} | {
    f'experiments.performance.{name}'
    for name in ('benchmark', 'convolutions', 'determinism', 'reduced')
}
WITHOUT_A_DEVICE = {'experiments.drawings', 'zerojax.compile'}
# They ask a process of its own what device there is, which others need first.
NOT_FIRST = {
    'experiments.performance.benchmark', 'experiments.performance.convolutions',
    'experiments.performance.determinism', 'experiments.performance.many_runs',
}  # fmt: skip


def status(command, *flags):
    """Of `python -m COMMAND FLAGS`, in this process."""
    argv, sys.argv = sys.argv, [f'{command.split(".")[-1]}.py', *flags]
    try:
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            warnings.simplefilter('ignore', RuntimeWarning)  # it may have been imported before
            runpy.run_module(command, run_name='__main__')
    finally:
        sys.argv = argv
    return end.value.code


def config_of(command):
    """A config that suits every command."""
    if command in WITHOUT_A_CONFIG:
        return []
    config = [DIGITS, '--config.perturbation.kind=gaussian', '--config.perturbation.scale=1e-6']
    return [*config, '--target=cpu'] if command == 'zerojax.compile' else config


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_are_found():
    assert {'zerojax.main', 'zerojax.compare', 'experiments.arms'} <= set(COMMANDS)
    assert set(COMMANDS) > WITHOUT_FLAGS | WITHOUT_A_FOLDER | WITHOUT_A_CONFIG | NOT_FIRST


@pytest.mark.parametrize('command', sorted(set(COMMANDS) - WITHOUT_FLAGS - WITHOUT_A_FOLDER))
def test_a_workdir_is_where_the_user_means_it(elsewhere, capsys, command):
    flags = [*config_of(command), '--workdir=~nobody_of_this_name/x']
    assert status(command, *flags) == 2
    where = 'error: --workdir=~nobody_of_this_name/x: ~nobody_of_this_name is nobody; '
    assert capsys.readouterr().err.startswith(where)
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize('command', sorted(set(COMMANDS) - WITHOUT_FLAGS - WITHOUT_A_FOLDER - RUNS))
def test_a_folder_is_made_in_the_home_that_was_meant(elsewhere, monkeypatch, command):
    made = []

    def make_folder(workdir):
        made.append(workdir)
        raise UsageError('made')

    monkeypatch.setattr(cli, 'make_folder', make_folder)
    monkeypatch.setenv('HOME', str(elsewhere / 'home'))
    assert status(command, *config_of(command), '--workdir=~/x') == 2
    assert made == [elsewhere / 'home' / 'x']


def no_device(*_):
    raise AssertionError  # as JAX does where a plugin is missing


@pytest.mark.parametrize(
    'command',
    sorted(set(COMMANDS) - WITHOUT_FLAGS - NOT_FIRST - WITHOUT_A_FOLDER - WITHOUT_A_DEVICE),
)
def test_a_missing_device_is_one_line_and_nothing_is_written(
    elsewhere, monkeypatch, capsys, command
):
    for name in ('devices', 'default_backend', 'process_index', 'process_count'):
        monkeypatch.setattr(jax, name, no_device)
    assert status(command, *config_of(command), '--workdir=x') == 2
    printed = capsys.readouterr()
    assert printed.err.startswith('error: ') and printed.err.count('\n') == 1
    assert 'no such device (JAX has no plugin for it); install the extra gpu' in printed.err
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize('command', sorted(NOT_FIRST))
def test_a_device_that_another_process_misses_is_said_and_nothing_is_written(elsewhere, command):
    environment = os.environ | {'JAX_PLATFORMS': 'cuda', 'PYTHONPATH': str(ROOT)}
    flags = [sys.executable, '-m', command, *config_of(command), '--workdir=x']
    done = subprocess.run(flags, capture_output=True, text=True, env=environment, cwd=elsewhere)
    assert done.returncode == 2
    assert 'error: JAX_PLATFORMS=cuda: no such device' in done.stdout
    assert done.stderr == 'error: JAX finds no device it can use, see the line above\n'
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize('name', ['jax_disable_jit', 'jax_transfer_guard'])
def test_so_is_an_option_of_jax_under_which_nothing_can_be_computed(
    elsewhere, monkeypatch, capsys, name
):
    monkeypatch.setattr(type(jax.config), name, 'disallow' if 'guard' in name else True)
    assert status('zerojax.sweep', DIGITS, '--seeds=2', '--workdir=x') == 2
    assert capsys.readouterr().err.startswith(f'error: {name.upper()}=')
    assert not list(elsewhere.iterdir())
