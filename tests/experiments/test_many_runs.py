"""What many runs cost: what is counted. How fast anything is, is not tested."""

import csv

import jax
import pytest

from experiments.performance import benchmark, many_runs
from zerojax.host.errors import RunError, UsageError

FLAGS = [
    '--config=configs/digits.py', '--config.num_steps=2', '--config.model.name=mlp',
    '--config.model.width=4', '--config.model.init=averaging', '--config.model.convolution=direct',
]  # fmt: skip


def read(file):
    with open(file) as opened:
        return list(csv.DictReader(opened))


def test_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, 'SECONDS', 0.0)
    monkeypatch.setattr(many_runs, 'REPETITIONS', 1)
    seconds = {1: 20.0, 2: 26.0, 5: 40.0}
    monkeypatch.setattr(many_runs, 'sweep_seconds', lambda _, __, number: (seconds[number], 1))
    argv = ['many_runs', *FLAGS, '--runs=1,2,5', f'--workdir={tmp_path}']
    with jax.numpy_dtype_promotion('standard'):  # as a user has it
        assert many_runs.main(argv) == 0
    assert [row['each further run, s'] for row in read(tmp_path / 'sweep.csv')] == [
        '-', '6.0', '5.0',
    ]  # fmt: skip
    rows = read(tmp_path / 'at_once.csv')
    assert [row['runs at once'] for row in rows] == ['1', '2', '5']
    assert rows[0]['over one run'] == rows[0]['over as many one after another'] == '1.00'
    for row in rows:
        share = float(row['over one run']) / int(row['runs at once'])
        assert float(row['over as many one after another']) == pytest.approx(share, abs=0.01)
    assert 'python -m experiments.performance.many_runs' in (tmp_path / 'at_once.md').read_text()


def test_a_sweep_is_a_real_one_and_begins_anew(tmp_path):
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
