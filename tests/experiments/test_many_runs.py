"""What many runs cost: what is counted. How fast anything is, is not tested."""

import contextlib
import csv
import io
import subprocess
import sys
import types

import jax
import pytest

from experiments.performance import many_runs, measuring
from zerojax import sweep
from zerojax.host.errors import RunError, UsageError
from zerojax.run import cli

FLAGS = [
    '--config=configs/digits.py', '--config.num_steps=2', '--config.model.name=mlp',
    '--config.model.width=4', '--config.model.init=averaging', '--config.model.convolution=direct',
    '--config.optimizer.drop_at=(0.5,)',
]  # fmt: skip


def read(file):
    with open(file) as opened:
        return list(csv.DictReader(opened))


def test_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(measuring, 'SECONDS', 0.0)
    monkeypatch.setattr(many_runs, 'REPETITIONS', 1)
    passed_on = []

    def sweep_seconds(flags, *_):
        passed_on.append(flags)
        return 20.0, 1

    monkeypatch.setattr(many_runs, 'sweep_seconds', sweep_seconds)
    argv = ['many_runs', *FLAGS, '--runs', '1,2', f'--workdir={tmp_path}']
    with jax.numpy_dtype_promotion('standard'):  # as a user has it
        assert many_runs.main(argv) == 0
    assert [row['runs'] for row in read(tmp_path / 'sweep.csv')] == ['1', '2']
    rows = read(tmp_path / 'at_once.csv')
    assert [row['runs at once'] for row in rows] == ['1', '2']
    assert rows[0]['over one run'] == rows[0]['over as many one after another'] == '1.00'
    for row in rows:
        share = float(row['over one run']) / int(row['runs at once'])
        assert float(row['over as many one after another']) == pytest.approx(share, abs=0.01)
    assert 'python -m experiments.performance.many_runs' in (tmp_path / 'at_once.md').read_text()
    for flags in passed_on:
        assert cli.parse_flags(['sweep', *flags])[0] == cli.parse_flags(['sweep', *FLAGS])[0]


def test_what_each_further_run_takes(monkeypatch, tmp_path):
    seconds = {1: 20.0, 2: 26.0, 5: 40.0}
    monkeypatch.setattr(many_runs, 'sweep_seconds', lambda _, __, number: (seconds[number], 1))
    rows = many_runs.sweeps([], tmp_path, list(seconds))
    assert [row['each further run, s'] for row in rows] == ['-', '6.0', '5.0']


def test_a_sweep_is_a_real_one_and_begins_anew(tmp_path, monkeypatch):
    """Its processes are this one, to be quick."""

    def in_this_process(command, **_):
        python, dash_m, module, *flags = command
        assert (python, dash_m, module) == (sys.executable, '-m', 'zerojax.sweep')
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed), jax.numpy_dtype_promotion('standard'):
            status = sweep.main(['sweep', *flags])
        return subprocess.CompletedProcess(command, status, '', printed.getvalue())

    monkeypatch.setattr(many_runs, 'subprocess', types.SimpleNamespace(run=in_this_process))
    for _ in range(2):
        _, together = many_runs.sweep_seconds(FLAGS, tmp_path, 1)
        assert together == 1
    tables = [read(file) for file in tmp_path.glob('*/sweep.csv')]
    assert [table[0]['seed'] for table in tables] == ['0', '0']
    with pytest.raises(RunError, match='no such field'):
        many_runs.sweep_seconds(['--config.nothing=1'], tmp_path, 1)


@pytest.mark.parametrize('text', ['2', '1,2,2', '1,3', '1,2,x', '-1'])
def test_runs_must_rise_from_one_and_two(text, tmp_path):
    with pytest.raises(UsageError, match=f'--runs={text}: must be rising'):
        many_runs.run(['many_runs', *FLAGS, f'--runs={text}', f'--workdir={tmp_path}'])
