"""What decides whether a run goes on: what files hold, not what they are called."""

import json
import shutil

import jax
import numpy as np
import pytest

from zerojax import config
from zerojax.host.errors import UsageError
from zerojax.run.program import Program, Programs
from zerojax.run.train import train


@pytest.fixture
def toy_config(tiny_config):
    tiny_config.model.name, tiny_config.model.width = 'mlp', 20
    return tiny_config


@pytest.fixture(scope='module')
def programs():
    return Programs()


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run of 24 steps and its summary, trained once; to be copied."""
    workdir, summaries = tmp_path_factory.mktemp('finished'), {}

    def train_once(config, programs):
        if not summaries:
            summaries['of it'] = train(config, workdir, programs)
        return workdir, summaries['of it']

    return train_once


@pytest.fixture
def stopped(toy_config, tmp_path, programs, finished):
    """A run that was left at step 18 of 24, and how it would have ended."""
    workdir, summary = finished(toy_config, programs)
    shutil.copytree(workdir, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '24')
    (tmp_path / 'run' / 'summary.json').unlink()
    return tmp_path / 'run', summary


def contents(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob('*')
        if file.is_file()
    }


def refused(config, workdir, programs, message):
    """With one line, and with everything left as it was."""
    before = contents(workdir)
    with pytest.raises(UsageError, match=message) as raised:
        train(config, workdir, programs)
    assert '\n' not in str(raised.value)
    assert 'damage' not in str(raised.value) and 'remove' not in str(raised.value)
    assert contents(workdir) == before


def test_a_checkpoint_is_that_of_the_step_it_holds(toy_config, stopped, programs):
    workdir, _ = stopped
    (workdir / 'checkpoints' / '18').rename(workdir / 'checkpoints' / '21')
    refused(toy_config, workdir, programs, 'checkpoints/21: holds the checkpoint of step 18')


@pytest.mark.parametrize('change', ['lacks a line', 'another number', 'lines swapped', 'no lines'])
def test_metrics_are_those_that_the_checkpoint_presumes(toy_config, stopped, programs, change):
    workdir, _ = stopped
    file = workdir / 'metrics.jsonl'
    lines = file.read_text().splitlines(keepends=True)
    changed = {
        'lacks a line': lines[:3] + lines[4:],
        'another number': [x.replace('"loss": 2', '"loss": 3') for x in lines],
        'lines swapped': [lines[1], lines[0], *lines[2:]],
        'no lines': [],
    }[change]
    assert changed != lines
    file.write_text(''.join(changed))
    message = 'is empty' if change == 'no lines' else 'is not the one that .* step 18'
    refused(toy_config, workdir, programs, rf'metrics\.jsonl {message}')


def test_lines_beyond_the_checkpoint_may_be_any(toy_config, stopped, programs):
    workdir, summary = stopped
    with open(workdir / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 23, "kind": "train", "loss": 7.0}\n')
    assert train(toy_config, workdir, programs)['params_sha256'] == summary['params_sha256']


def test_another_structure_is_a_difference_and_no_damage(toy_config, stopped, programs):
    """As where another version of zerojax keeps something else in the state."""
    workdir, _ = stopped
    toy_config.optimizer.name = 'radam'
    fields = json.loads((workdir / 'config.json').read_text())
    fields['optimizer']['name'] = 'radam'
    (workdir / 'config.json').write_text(json.dumps(fields))
    with jax.numpy_dtype_promotion('standard'):  # RAdam's schedule multiplies int32 by float
        refused(toy_config, workdir, programs, r'holds another state .*opt_state/.*nothing')


def test_where_data_lie_is_no_matter_and_what_they_are_is(toy_config, stopped, programs):
    workdir, summary = stopped
    toy_config.dataset.data_dir = '/moved/elsewhere/'
    assert train(toy_config, workdir, programs)['params_sha256'] == summary['params_sha256']
    fields = json.loads((workdir / 'manifest.json').read_text())
    fields['starts'][0]['dataset']['train_sha256'] = 'other'
    (workdir / 'manifest.json').write_text(json.dumps(fields))
    refused(toy_config, workdir, programs, 'started on other data')


def test_a_run_of_epochs_is_kept_as_one_of_steps(toy_config, tmp_path, programs):
    toy_config.num_steps, toy_config.num_epochs = None, 1
    summary = train(toy_config, tmp_path, programs)
    file = tmp_path / 'config.json'
    kept = config.read(file)  # which checks it
    assert (kept.num_steps, kept.num_epochs) == (summary['step'], None)
    # As version 0.1 left it.
    file.write_text(json.dumps(json.loads(file.read_text()) | {'num_epochs': 1}))
    assert config.read(file) == kept
    again = train(toy_config, tmp_path, programs)
    assert again['params_sha256'] == summary['params_sha256']
    toy_config.num_epochs = 2
    refused(toy_config, tmp_path, programs, 'num_steps is 11 there and 22 here')


@pytest.mark.parametrize('spelling', ['{}/', '{}/../dense', '{}/./'])
def test_how_a_path_is_spelled_is_no_matter(toy_config, tmp_path, programs, spelling):
    toy_config.num_steps = 3
    train(toy_config, tmp_path / 'dense', programs)
    toy_config.pruning.source = str(tmp_path / 'dense')
    tickets = Programs()
    first = train(toy_config, tmp_path / 'ticket', tickets)
    toy_config.pruning.source = spelling.format(tmp_path / 'dense')
    again = train(toy_config, tmp_path / 'ticket', tickets)
    assert again['params_sha256'] == first['params_sha256']
    toy_config.pruning.source = str(tmp_path)
    refused(toy_config, tmp_path / 'ticket', programs, r'pruning\.source is')


def test_a_field_that_another_version_lacks_is_refused_by_its_name(toy_config, stopped, programs):
    workdir, _ = stopped
    fields = json.loads((workdir / 'config.json').read_text())
    del fields['model']['precision']
    (workdir / 'config.json').write_text(json.dumps(fields))
    message = r'holds a run of zerojax \d\S+, whose config has other fields .*model\.precision'
    refused(toy_config, workdir, programs, message)


def test_another_setting_is_refused_before_anything_is_touched(toy_config, stopped, programs):
    workdir, _ = stopped
    with jax.threefry_partitionable(False):
        refused(toy_config, workdir, programs, 'JAX_THREEFRY_PARTITIONABLE=True, here it is False')


def test_another_machine_is_said_and_the_run_goes_on(toy_config, stopped, programs, capsys):
    workdir, summary = stopped
    fields = json.loads((workdir / 'manifest.json').read_text())
    fields['starts'][-1]['cpu'] = 'Abacus'
    (workdir / 'manifest.json').write_text(json.dumps(fields))
    assert train(toy_config, workdir, programs)['params_sha256'] == summary['params_sha256']
    assert 'OTHER CONDITIONS than when' in capsys.readouterr().out


def test_a_run_that_goes_on_is_compiled_as_it_was_begun(toy_config, stopped, tmp_path, monkeypatch):
    """So what was compiled for one serves the other."""
    compiled = []
    compile_train_steps = Program.compile_train_steps

    def noted(self, state, source):
        compiled.append(self._train_steps.lower(state, source, np.int32(1))._lowered.as_text())
        return compile_train_steps(self, state, source)

    monkeypatch.setattr(Program, 'compile_train_steps', noted)
    workdir, _ = stopped
    train(toy_config, workdir)
    train(toy_config, tmp_path / 'new')
    assert len(compiled) == 2 and compiled[0] == compiled[1]
