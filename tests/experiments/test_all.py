"""All experiments are there, one after another, and a failure is not passed over."""

import pathlib
import re
import subprocess

import pytest

from experiments import all as all_experiments
from zerojax.host.errors import RunError, UsageError

FOLDER = pathlib.Path(all_experiments.__file__).parent


@pytest.fixture
def asked(monkeypatch):
    """The command lines that were run, each with success."""
    lines = []

    def run(line, check):
        lines.append(line[2:])
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(subprocess, 'run', run)
    return lines


def test_it_runs_every_experiment_and_says_first_what_each_costs(asked, capsys):
    all_experiments.run(['all', '--data_dir=there'])
    there = {
        f'experiments.{file.stem}'
        for file in FOLDER.glob('*.py')
        if {'runs.main(', 'runs.save_table('} & set(re.findall(r'runs\.\w+\(', file.read_text()))
    }
    assert {line[0] for line in asked} == there
    output = capsys.readouterr().out
    before, *_ = output.partition('==')
    assert all(experiment in before for experiment in all_experiments.MINUTES)
    assert len({all_experiments.workdir(each) for each in all_experiments.MINUTES}) == len(asked)


def test_those_on_images_read_them_where_they_are(asked):
    all_experiments.run(['all', '--data_dir=there'])
    reading = {line[0] for line in asked if '--config.dataset.data_dir=there' in line}
    names = ('held_out', 'curves', 'diversity', 'images')
    assert reading == {f'experiments.{name}' for name in names}
    asked.clear()
    all_experiments.run(['all'])
    assert not any('data_dir' in word for line in asked for word in line)


def test_the_first_failure_ends_it(monkeypatch):
    monkeypatch.setattr(subprocess, 'run', lambda line, check: subprocess.CompletedProcess(line, 2))
    with pytest.raises(RunError, match=r'experiments\.contrast: exit status 2'):
        all_experiments.run(['all'])


def test_a_wrong_flag_is_one_line(asked):
    with pytest.raises(UsageError, match='unexpected argument'):
        all_experiments.run(['all', 'arms'])
    assert not asked
