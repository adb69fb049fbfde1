"""Many runs: each as if it had been run alone, and as few compilations as there are programs."""

import csv
import json
import signal
import types

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from zerojax import sweep
from zerojax.host import stop
from zerojax.host.checkpoint import Checkpoints
from zerojax.host.errors import RunError, UsageError
from zerojax.run import checks, many, program, recorder, train
from zerojax.step import determinism

TOY = [
    '--config=configs/digits.py', '--config.num_steps=4', '--config.model.name=mlp',
    '--config.model.convolution=direct',
]  # fmt: skip


def variants(config, root, **fields):
    """A job for each value of the fields, which go together; named 0, 1, 2, ..."""
    jobs = []
    for i, values in enumerate(zip(*fields.values(), strict=True)):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(dict(zip(fields, values, strict=True)))
        jobs.append((changed, root / str(i)))
    return jobs


@pytest.fixture
def toy_config(tiny_config):
    """The network that is compiled in the shortest time."""
    tiny_config.model.update({'name': 'mlp', 'width': 20, 'convolution': 'direct'})
    return tiny_config


@pytest.fixture
def count_programs(monkeypatch):
    """Compiled train steps, as a list that grows."""
    compiled = []
    make = program.make_train_steps

    def make_and_count(one_step, **kwargs):
        def traced(state, source):
            compiled.append(kwargs)
            return one_step(state, source)

        return make(traced, **kwargs)

    monkeypatch.setattr(program, 'make_train_steps', make_and_count)
    return compiled


GRID = {  # each of the four alone is another in one run, and all of them in the last
    'seed': [0, 0, 1, 0, 0, 1],
    'perturbation.seed': [0, 1, 0, 0, 0, 1],
    'perturbation.scale': [1e-6, 1e-6, 1e-6, 1e-3, 1e-6, 1e-3],
    'optimizer.learning_rate': [0.03, 0.03, 0.03, 0.03, 0.1, 0.1],
}


def files_of(workdir):
    return {
        str(path.relative_to(workdir))
        for path in workdir.rglob('*')
        if 'tfevents' not in path.name and 'ocdbt' not in str(path) and '/d/' not in str(path)
    }


def test_runs_share_a_program_and_are_those_of_train_alone(toy_config, tmp_path, count_programs):
    toy_config.num_steps = toy_config.eval_every_steps = 10
    jobs = variants(toy_config, tmp_path / 'swept', **GRID)
    summaries = sweep.sweep(jobs, runs_at_once=1)
    # A program is traced twice: once for the shapes of its metrics, once to be compiled.
    assert len(count_programs) == 2
    hashes = [summary['params_sha256'] for summary in summaries]
    assert len(set(hashes)) == len(jobs), 'each of the four numbers tells'
    for config, workdir in jobs:
        assert json.loads((workdir / 'config.json').read_text())['seed'] == config.seed
    alone = tmp_path / 'alone'
    assert train.train(config, alone)['params_sha256'] == hashes[-1]
    assert files_of(alone) == files_of(workdir)
    metrics = 'metrics.jsonl'
    assert (alone / metrics).read_bytes() == (workdir / metrics).read_bytes()


def test_a_batched_program_trains_each_run_as_alone_to_rounding(
    toy_config, tmp_path, count_programs
):
    """Without noise nothing amplifies rounding; in float64 there is next to none."""
    toy_config.param_dtype = 'float64'
    toy_config.num_steps = 8
    toy_config.perturbation.kind = 'none'
    toy_config.model.init = 'random'
    jobs = variants(
        toy_config, tmp_path, **{'seed': [0, 1, 2], 'optimizer.learning_rate': [0.03, 0.1, 0.01]}
    )
    programs = program.Programs()
    with jax.numpy_dtype_promotion('standard'):  # Flax's BatchNorm mixes float64 and float32
        summaries = sweep.sweep(jobs, runs_at_once=3)
        assert len(count_programs) == 2
        for (config, workdir), summary in zip(jobs, summaries, strict=True):
            alone = train.train(config, tmp_path / 'alone' / workdir.name, programs)
            assert summary['train_loss'] == pytest.approx(alone['train_loss'], rel=1e-12)
            assert summary['unique_features'] == alone['unique_features']
            assert summary['step'] == alone['step']
            execution = json.loads((workdir / 'manifest.json').read_text())['execution']
            assert execution['runs_at_once'] == 3
            assert files_of(workdir) == files_of(tmp_path / 'alone' / workdir.name)


def test_a_batched_program_keeps_exact_symmetry_and_knows_when_it_broke(toy_config, tmp_path):
    toy_config.perturbation.at_step = 13
    jobs = variants(toy_config, tmp_path, **{'perturbation.scale': [0.0, 1e-6, 1e-3]})
    none, small, large = sweep.sweep(jobs, runs_at_once=3)
    assert none['asymmetry'] == 0.0
    assert none['broken_at_step'] is None
    assert none['broken_streams'] == {'hidden': None}
    assert 0 < small['asymmetry'] < large['asymmetry']
    assert small['broken_at_step'] == large['broken_at_step'] == 13
    assert small['broken_streams'] == large['broken_streams'] == {'hidden': 13}


@pytest.mark.parametrize('at_once', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_sweep_that_is_stopped_goes_on_to_the_same_weights(
    toy_config, tmp_path, monkeypatch, at_once
):
    fields = {'seed': [0, 1], 'perturbation.seed': [0, 1]}
    programs = program.Programs()
    whole = sweep.sweep(variants(toy_config, tmp_path / 'whole', **fields), at_once, programs)
    jobs = variants(toy_config, tmp_path / 'stopped', **fields)
    run_class, finish = recorder.Recorder, recorder.Recorder.record_step

    def stop_at_16(self, step, *measured):
        finish(self, step, *measured)
        if step == 16 and self.workdir.name == '1':
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(run_class, 'record_step', stop_at_16)
    with pytest.raises(stop.Stopped, match='SIGTERM: stopped and saved at step 16'):
        sweep.sweep(jobs, at_once, programs)
    monkeypatch.undo()
    done = [(workdir / 'summary.json').exists() for _, workdir in jobs]
    assert done == ([True, False] if at_once == 1 else [False, False])
    if at_once == 2:  # killed while it saved: one of them lacks the newest checkpoint
        with Checkpoints(jobs[1][1] / 'checkpoints') as checkpoints:
            checkpoints.delete(16)
    resumed = sweep.sweep(jobs, at_once, programs)
    for ours, theirs, (_, workdir) in zip(resumed, whole, jobs, strict=True):
        assert ours['params_sha256'] == theirs['params_sha256']
        metrics = (tmp_path / 'whole' / workdir.name / 'metrics.jsonl').read_bytes()
        assert (workdir / 'metrics.jsonl').read_bytes() == metrics


def test_a_signal_in_the_last_moments_of_a_run_stops_the_sweep_behind_it(
    toy_config, tmp_path, monkeypatch
):
    jobs = variants(toy_config, tmp_path, seed=[0, 1])
    finish = recorder.Recorders.finish

    def interrupted(self, state):
        signal.raise_signal(signal.SIGTERM)
        return finish(self, state)

    monkeypatch.setattr(recorder.Recorders, 'finish', interrupted)
    with pytest.raises(stop.Stopped, match='SIGTERM: stopped and saved between two runs; the same'):
        sweep.sweep(jobs)
    assert (tmp_path / '0' / 'summary.json').exists()
    assert not (tmp_path / '1').exists()


def test_a_batch_that_cannot_be_saved_has_failed_and_is_not_trained_one_by_one(
    toy_config, tmp_path, monkeypatch
):
    def full(*_, **__):
        raise RunError('a checkpoint could not be saved')

    monkeypatch.setattr(many, 'train_runs', full)
    monkeypatch.setattr(many, 'train', None)
    with pytest.raises(
        RunError, match=r'^2 of 2 runs failed: 0: a checkpoint could not be saved; '
    ):
        sweep.sweep(variants(toy_config, tmp_path, seed=[0, 1]), 2)


@pytest.mark.parametrize('at_once', [1, 3])
def test_a_run_that_fails_does_not_take_the_others_with_it(toy_config, tmp_path, at_once):
    rates = [0.03, 1e30, 0.1]
    jobs = variants(toy_config, tmp_path, **{'optimizer.learning_rate': rates})
    with pytest.raises(RunError, match=r'^1 of 3 runs failed: 1: step \d: loss, gradient or weig'):
        sweep.sweep(jobs, at_once)
    assert [(workdir / 'summary.json').exists() for _, workdir in jobs] == [True, False, True]


def test_what_is_wrong_with_any_run_is_said_before_the_first_is_trained(tiny_config, tmp_path):
    jobs = variants(tiny_config, tmp_path, **{'model.depth': [7, 8]})
    with pytest.raises(UsageError, match=r'^1: model\.depth=8: must be 3n \+ 4'):
        sweep.sweep(jobs)
    tiny_config.determinism.mode = 'hardware'
    with pytest.raises(UsageError, match=r'runs_at_once=2: must be 1 with determinism\.mode='):
        sweep.sweep(variants(tiny_config, tmp_path, seed=[0, 1]), runs_at_once=2)
    assert list(tmp_path.iterdir()) == []


def test_a_structure_and_a_folder_are_checked_before_the_first_run_is_trained(
    toy_config, tmp_path, monkeypatch
):
    toy_config.num_steps = 2
    with monkeypatch.context() as patch:
        patch.setattr(checks, 'device_memory', lambda: 100_000)
        wide = variants(toy_config, tmp_path, **{'model.width': [1, 2000]})
        with pytest.raises(UsageError, match=r'^1: model\.width=2000, model\.depth=7: .* weights'):
            sweep.sweep(wide)
    late = variants(toy_config, tmp_path, **{'perturbation.at_step': [0, 2]})
    with pytest.raises(UsageError, match=r'^1: perturbation\.at_step=2: must be below num_steps=2'):
        sweep.sweep(late)
    assert list(tmp_path.iterdir()) == []
    begun = tmp_path / '1'
    begun.mkdir()
    (begun / 'config.json').write_text('{"seed": 5}')
    with pytest.raises(UsageError, match='1: holds a run of another version'):
        sweep.sweep(variants(toy_config, tmp_path, seed=[0, 1]))
    assert [path.name for path in tmp_path.iterdir()] == ['1']


def test_a_damaged_summary_is_a_mistake(toy_config, tmp_path):
    toy_config.num_steps = 2
    (job,) = variants(toy_config, tmp_path, seed=[0])
    sweep.sweep([job])
    for text in ('{"st', '{}', '[]'):
        (job[1] / 'summary.json').write_text(text)
        with pytest.raises(UsageError, match=r'summary\.json: cannot be read'):
            sweep.sweep([job])
    (job[1] / 'summary.json').unlink()
    (again,) = sweep.sweep([job])
    assert again['step'] == 2


def test_one_damaged_run_does_not_take_its_batch_with_it(toy_config, tmp_path):
    jobs = variants(toy_config, tmp_path, seed=[0, 1, 2])
    programs = program.Programs()
    whole = sweep.sweep(jobs, 3, programs)
    for _, workdir in jobs:
        (workdir / 'summary.json').unlink()
    for file in (tmp_path / '1' / 'checkpoints').rglob('*'):
        if file.is_file():
            file.write_bytes(b'')
    with pytest.raises(RunError, match=r'^1 of 3 runs failed: 1: .*damaged') as caught:
        sweep.sweep(jobs, 3, programs)
    assert '0/checkpoints' not in str(caught.value)
    for i in (0, 2):
        summary = json.loads((tmp_path / str(i) / 'summary.json').read_text())
        assert summary['params_sha256'] == whole[i]['params_sha256']


def test_the_table_has_the_finished_runs_when_others_fail(tmp_path, capsys):
    flags = [*TOY, f'--workdir={tmp_path}', '--grid.optimizer.learning_rate=0.1,1e30']
    with jax.numpy_dtype_promotion('standard'):
        assert sweep.main(['sweep', *flags]) == 1
    assert 'sweep.csv: 1 of 2 runs' in capsys.readouterr().out
    with open(tmp_path / 'sweep.csv') as file:
        assert [row['run'] for row in csv.DictReader(file)] == ['optimizer.learning_rate=0.1']


def test_a_sweep_that_is_refused_leaves_the_table_of_another(tmp_path, capsys):
    flags = [*TOY, f'--workdir={tmp_path}']
    with jax.numpy_dtype_promotion('standard'):
        assert sweep.main(['sweep', *flags, '--grid.seed=0,1']) == 0
        table = (tmp_path / 'sweep.csv').read_bytes()
        capsys.readouterr()
        assert sweep.main(['sweep', *flags, '--seeds=2']) == 2, 'perturbation.seed differs'
    assert 'runs' not in capsys.readouterr().out
    assert (tmp_path / 'sweep.csv').read_bytes() == table


def test_batches_are_as_large_as_asked_for_and_have_a_step_in_common(tmp_path):
    steps = [[], [0], [6, 12], [0, 6], [12], []]
    for i, its_steps in enumerate(steps):
        for step in its_steps:
            (tmp_path / str(i) / 'checkpoints' / str(step)).mkdir(parents=True)
    workdirs = [tmp_path / str(i) for i in range(len(steps))]
    assert list(many.batches(workdirs, 2)) == [[0, 1], [5], [2, 3], [4]]
    assert list(many.batches([tmp_path / 'new'] * 5, 4)) == [[0, 1, 2, 3], [4]]
    assert list(many.batches(workdirs, 9)) == [[0, 1, 5], [2], [3], [4]]


def test_a_grid_varies_the_streams_that_are_perturbed(tmp_path):
    values = sweep.grid_values('perturbation.streams', ',stem,stem+block2_0')
    assert values == [(), ('stem',), ('stem', 'block2_0')]
    config = train.config_lib.default_config()
    jobs = list(sweep.grid_jobs(config, {'perturbation.streams': values}, None, tmp_path))
    assert [changed.perturbation.streams for _, (changed, _) in jobs] == values
    folders = [folder.name.removeprefix('perturbation.streams=') for _, (_, folder) in jobs]
    assert folders == ['', 'stem', 'stem-block2_0']


@pytest.mark.parametrize(
    'field', ['num_steps', 'num_epochs', 'perturbation.every', 'model.sigma_w', 'model.dtype']
)
def test_a_grid_varies_an_optional_field_from_none_on(tmp_path, field):
    value = {int: 3, float: 0.5, str: 'bfloat16'}[train.config_lib.type_of(field)]
    values = sweep.grid_values(field, f'None,{value}')
    assert values == [None, value]
    jobs = list(sweep.grid_jobs(train.config_lib.default_config(), {field: values}, None, tmp_path))
    for (fields, (changed, folder)), expected in zip(jobs, values, strict=True):
        assert flatten_dict(changed.to_dict(), sep='.')[field] == expected == fields[field]
        assert folder.name == f'{field}={expected}'


def test_the_command_trains_a_grid_and_adds_to_it(tmp_path, capsys):
    short = [*TOY, f'--workdir={tmp_path}']
    with jax.numpy_dtype_promotion('standard'):
        flags = [*short, '--grid.perturbation.scale', '1e-6,1e-3']
        assert sweep.main(['sweep', *flags, '--seeds=1']) == 0
        capsys.readouterr()
        assert sweep.main(['sweep', *flags, '--seeds', '2']) == 0
    output = capsys.readouterr().out
    assert output.count('starting at step 0') == 2, 'the first two are finished'
    with open(tmp_path / 'sweep.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['run'] for row in rows] == [
        f'perturbation.scale={scale},seed={seed}' for scale in ('1e-06', '0.001') for seed in (0, 1)
    ]
    for row in rows:
        summary = json.loads((tmp_path / row['run'] / 'summary.json').read_text())
        assert summary['params_sha256'] == row['params_sha256']
        config = json.loads((tmp_path / row['run'] / 'config.json').read_text())
        assert config['seed'] == config['perturbation']['seed'] == int(row['seed'])
    assert len({row['params_sha256'] for row in rows}) == 4


@pytest.mark.parametrize(
    'flags,message',
    [
        (['--grid.model.dept=7'], 'model.dept: no such field'),
        (['--grid.seed=0,x'], '--grid.seed=x: must be of type int'),
        (['--grid.seed=0,None'], 'seed=None: seed=None: must be of type int'),
        (['--grid.num_epochs=1,2'], 'num_epochs=1: num_steps=700, num_epochs=1: give exactly one'),
        (['--seeds='], '--seeds=: is empty; give it a value, or leave it out'),
        (['--grid.symmetry.project=yes'], '--grid.symmetry.project=yes: must be of type bool'),
        (['--grid.optimizer.drop_at=1'], '--grid.optimizer.drop_at: is a tuple, which a grid'),
        (['--grid.perturbation.streams=a'], "perturbation.streams=a: perturbation.streams=('a',)"),
        (['--grid.seed'], 'command line: Missing value for flag --grid.seed'),
        (['--seeds', 'x'], '--seeds=x: must be a whole number of at least 1'),
        (['--grid.seed=1,1'], '--grid.seed=1,1: names a value twice'),
        (['--grid.seed=1', '--grid.seed=2'], '--grid.seed: given twice; name all values in one'),
        (['--grid.seed=1,-1'], 'seed=-1: seed=-1: must be from 0 to'),
        (['--grid.seed=1,2', '--seeds=999999999'], '--seeds: decides seed'),
        (['--grid.model.width=1,2', '--seeds=99999999'], '--grid: asks for 199999998 runs; must'),
        ([f'--grid.model.init={"a" * 250}'], '--grid: the name of a folder would have 261 bytes'),
        (['--grid.seed=1', '--seeds=2'], '--seeds: decides seed and perturbation.seed'),
        (['--runs_at_once=0'], '--runs_at_once=0: must be a whole number of at least 1'),
        (['--config.determinism.mode=hardware', '--runs_at_once=2'], '--runs_at_once=2: must be 1'),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(tmp_path, capsys, flags, message):
    workdir = tmp_path / 'sweep'
    arguments = ['--config=configs/digits.py', f'--workdir={workdir}', *flags]
    assert sweep.main(['sweep', *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'error: {message}')
    assert error.count('\n') == 1
    assert not workdir.exists()


def test_the_fastest_number_is_measured_on_accelerators_alone(toy_config, monkeypatch):
    programs = program.Programs()
    config = checks.resolve(toy_config, programs.dataset(toy_config))
    said = []
    progress = types.SimpleNamespace(say=said.append)
    assert many.fastest(config, 20, programs, progress) == 1
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    measured = {1: 1.0, 4: 2.0, 16: 4.0, 20: 6.0}
    monkeypatch.setattr(many, 'seconds_a_call', lambda config, runs, programs: measured[runs])
    assert many.fastest(config, 20, programs, progress) == 16
    assert said == ['measured: 16 runs at once are fastest']
    config.determinism.mode = 'hardware'
    assert many.fastest(config, 20, programs, progress) == 1


def test_a_call_is_timed(toy_config):
    programs = program.Programs()
    config = checks.resolve(toy_config, programs.dataset(toy_config))
    assert all(0 < many.seconds_a_call(config, runs, programs) < 60 for runs in (1, 2))
    assert np.isfinite(config.optimizer.learning_rate)


def test_on_a_gpu_runs_of_the_other_mode_are_left_to_another_process(
    toy_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(determinism, '_mode_on_gpu', None)
    modes = ['hardware', 'deterministic', 'hardware']
    jobs = variants(toy_config, tmp_path, **{'determinism.mode': modes, 'seed': [0, 0, 1]})
    with pytest.raises(RunError, match='the same command must be given again'):
        sweep.sweep(jobs)
    assert [(workdir / 'summary.json').exists() for _, workdir in jobs] == [True, False, True]
    monkeypatch.setattr(determinism, '_mode_on_gpu', None)
    assert len(sweep.sweep(jobs)) == 3
    with pytest.raises(UsageError, match=r"determinism.mode='hardware': this process has GPU"):
        train.train(jobs[0][0], tmp_path / 'alone')
