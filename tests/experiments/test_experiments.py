"""Experiments are restartable, notice a changed config, and end in tables and figures."""

import csv
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import matplotlib
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import (
    arms,
    contrast,
    images,
    leakynet,
    lottery,
    runs,
    signal,
    streams,
    unique_features,
)
from zerojax.host.errors import UsageError
from zerojax.run import many

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def experiment(tiny_config, tmp_path) -> runs.Experiment:
    tiny_config.num_steps = 3
    tiny_config.steps_per_call = 3
    return runs.Experiment('unique_features', 'the command', tiny_config, tmp_path, seeds=2)


@pytest.fixture
def small(monkeypatch):
    """The toy with few features and arms, so that the experiment takes seconds."""
    monkeypatch.setattr(unique_features, 'WIDTH', 8)
    monkeypatch.setattr(unique_features, 'UNIQUE', (1,))


def test_an_experiment_goes_on_where_it_was(experiment, small, monkeypatch, capsys):
    """And the seed decides everything random in each of its runs."""
    trained = []

    def train(config, workdir, *shared):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(workdir.name)
        return sweep_train(config, workdir, *shared)

    sweep_train = many.train
    monkeypatch.setattr(many, 'train', train)
    with pytest.raises(KeyboardInterrupt):
        unique_features.run(experiment)
    assert not (experiment.workdir / 'table.csv').exists()
    monkeypatch.setattr(
        many, 'train', lambda *args: trained.append(args[1].name) or sweep_train(*args)
    )
    unique_features.run(experiment)
    assert len(trained) == len(set(trained)) == 2 * 2, 'no run twice'

    with open(experiment.workdir / 'table.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['unique features at the start'] for row in rows] == ['1', '1']
    assert [row['noise'] for row in rows] == ['0', '0.001']
    assert [row['n'] for row in rows] == ['2', '2']
    assert [row['unique features at the end'] for row in rows] == ['1', '8']
    table = (experiment.workdir / 'table.md').read_text()
    assert 'the command' in table
    assert 'jaxlib' in table
    assert rows[1]['last accuracy'] in table
    assert rows[1]['last accuracy'] in capsys.readouterr().out
    assert (experiment.workdir / 'figure.png').stat().st_size > 10_000
    assert (experiment.workdir / 'figure.pdf').exists()

    # A changed config is noticed, also in finished runs.
    monkeypatch.setattr(many, 'train', None)
    unique_features.run(experiment)
    for first, second in runs.by_arm(runs.train_all(experiment, unique_features.arms())).values():
        assert first.summary['params_sha256'] != second.summary['params_sha256']
        for run, seed in ((first, 0), (second, 1)):
            config = json.loads((run.workdir / 'config.json').read_text())
            assert config['seed'] == config['perturbation']['seed'] == run.seed == seed
            assert config['model']['width'] == 8
    experiment.config.optimizer.learning_rate = 0.01
    with pytest.raises(UsageError, match=r'optimizer\.learning_rate is 0\.03 there and 0\.01 here'):
        unique_features.run(experiment)


def fake_run(arm: str, seed: int, **summary) -> runs.FinishedRun:
    layers = [f'block{stage}_{layer}' for stage in (1, 2, 3) for layer in range(4)]
    lines = []
    for step in (0, 3):
        lines.append({'step': step, 'kind': 'eval', 'loss': 1.0, 'accuracy': 0.1 * (seed + step)})
        lines.append({'step': step, 'kind': 'symmetry', 'asymmetry': 0.0})
        correlations = {f'{layer}/conv': 1.0 if step == 0 else 0.2 for layer in layers}
        lines.append(
            {
                'step': step,
                'kind': 'layers',
                'forward_correlation': correlations,
                'backward_correlation': {layer: -c for layer, c in correlations.items()},
                'unique_activations': dict.fromkeys(layers, 1 + step),
                'effective_width': {layer: float(layer[-1]) for layer in layers},
            }
        )
    summary = {'eval_accuracy': 0.3, 'best_eval_accuracy': 0.4, 'asymmetry': 0.0} | summary
    return runs.FinishedRun(arm, seed, None, summary, lines)


@pytest.mark.parametrize('module', [arms, leakynet, lottery])
def test_every_experiment_ends_in_a_table_and_a_figure(module, experiment, monkeypatch):
    """With runs that were not trained; each arm's fields must be those of a config."""
    trained = []

    def train_all(experiment, arms, only_seed=None):
        for fields in arms.values():
            assert isinstance(runs.changed(experiment.config, **fields), ConfigDict)
        seeds = range(2) if only_seed is None else [only_seed]
        made = [fake_run(arm, seed) for arm in arms for seed in seeds]
        trained.extend(made)
        return made

    monkeypatch.setattr(runs, 'train_all', train_all)
    module.run(experiment)
    with open(experiment.workdir / 'table.csv') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(trained) / 2
    assert all(row['last accuracy'] == '0.300 ± 0.000' for row in rows)
    assert (experiment.workdir / 'figure.png').exists()


def test_images_have_the_seeds_of_the_contrast_and_one_for_the_rest(experiment, monkeypatch):
    trained = []

    def train_all(experiment, arms, only_seed=None):
        for fields in arms.values():
            assert isinstance(runs.changed(experiment.config, **fields), ConfigDict)
        seeds = range(experiment.seeds) if only_seed is None else [only_seed]
        trained.extend(fake_run(arm, seed) for arm in arms for seed in seeds)
        return [run for run in trained if run.arm in arms]

    monkeypatch.setattr(runs, 'train_all', train_all)
    images.run(experiment)
    with open(experiment.workdir / 'table.csv') as file:
        rows = list(csv.DictReader(file))
    assert {row['arm']: row['n'] for row in rows} == {
        **dict.fromkeys(images.CONTRAST, '2'), **dict.fromkeys(images.others(), '1')
    }  # fmt: skip
    with open(experiment.workdir / 'curves.csv') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(trained), 'one for each evaluation'
    first, second = rows[:2]
    assert (first['step'], second['step']) == ('0', '3')
    assert float(first['forward']) == float(first['backward']) == 0, 'features are equal'
    assert float(second['backward']) == pytest.approx(-np.log(0.2))
    assert (experiment.workdir / 'figure.png').exists()


@pytest.mark.parametrize('text', ['', '1', '2,', '-2', '2.5', 'all', '2,10000000000'])
def test_numbers_of_a_flag_are_whole(text, experiment):
    asked = dataclasses.replace(experiment, flags={'features': text})
    with pytest.raises(
        UsageError, match=f'--features={text}: must be whole numbers from 2 to 999999999'
    ):
        runs.counts(asked, 'features', least=2)


def test_numbers_of_a_flag_rise(experiment):
    asked = dataclasses.replace(experiment, flags={'features': '4,2,4'})
    assert runs.counts(asked, 'features', least=2) == [2, 4]


def test_the_contrast_is_told_seed_by_seed(experiment):
    contrast.run(experiment)
    with open(experiment.workdir / 'table.csv') as file:
        rows = list(csv.DictReader(file))
    assert [(row['arm'], row['seed']) for row in rows] == [
        (arm, seed) for arm in contrast.ARMS for seed in '01'
    ]
    for row in rows:
        if row['arm'] == 'none':
            assert row['asymmetry'] == '0 exactly' and row['broken at step'] == 'never'
            assert row['unique features'] == 'block2_0 1, block3_0 1, stem 1'
        else:
            assert float(row['asymmetry']) > 0 and row['broken at step'] == '0'
            assert row['unique features'] == 'block2_0 32, block3_0 64, stem 16'
    assert (experiment.workdir / 'figure.png').exists()


def test_the_last_block_is_the_last_by_number():
    widths = {'block3_10': 3.0, 'block3_9': 2.0, 'block2_11': 1.0, 'stem': 4.0}
    assert arms.last_block({'effective_width': widths}) == 3.0


@pytest.mark.slow
def test_signal(experiment, monkeypatch):
    monkeypatch.setattr(signal, 'DEPTH', 10)
    networks = {name: signal.NETWORKS[name] for name in ('ConstNet', 'Wide ResNet, Fixup')}
    monkeypatch.setattr(signal, 'NETWORKS', networks)
    signal.run(experiment)
    with open(experiment.workdir / 'layers.csv') as file:
        rows = list(csv.DictReader(file))
    assert {row['network'] for row in rows} == set(networks)
    constnet = [row for row in rows if row['network'] == 'ConstNet' and row['seed'] == '0']
    assert [row['layer'] for row in constnet][:2] == ['stem', 'block1_0']
    assert {row['unique_activations'] for row in constnet} == {'1'}
    assert all(float(row['gradient']) > 0 for row in rows)
    assert (experiment.workdir / 'table.md').exists()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--seeds=0'], '--seeds=0: must be a whole number of at least 1'),
        (['--seeds', 'x'], '--seeds=x: must be a whole number of at least 1'),
        (['--seeds=1001'], '--seeds=1001: must be at most 1000'),
        (['--sedes=4'], "command line: Unknown command line flag 'sedes'. Did you mean: seeds ?"),
        (['--config.model.depth', '8'], 'model.depth=8: must be 3n + 4'),
        (['--workdir=/dev/null/x'], '--workdir=/dev/null/x: cannot be written'),
    ],
)
def test_mistakes_are_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['experiments/arms.py', *flags])
    assert runs.main(arms.run, 'doc', seeds=3) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'error: {message}')
    assert error.count('\n') == 1


def test_flags_and_what_stands_for_those_not_given(monkeypatch, tmp_path):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.jax.config, 'update', lambda *_: None)
    digits = f'{ROOT}/configs/digits.py'
    given = ['--seeds', '4', '--workdir', 'w', '--config', f'{ROOT}/configs/cifar.py:trial']
    for flags in ([], given, ['--config.batch_size', '7']):
        monkeypatch.setattr('sys.argv', ['experiments/arms.py', *flags])
        assert runs.main(asked.append, 'doc', seeds=3, config_file=digits) == 0
    plain, all_given, changed = asked
    assert (plain.name, plain.seeds, plain.config.dataset.name) == ('arms', 3, 'digits')
    assert str(plain.workdir) == 'runs/experiments/arms'
    assert (all_given.seeds, all_given.config.dataset.name) == (4, 'cifar10')
    assert str(all_given.workdir) == 'w'
    assert all_given.command == ' '.join(['python -m experiments.arms', *given])
    assert (changed.config.batch_size, changed.config.dataset.name) == (7, 'digits')


def test_each_subset_of_streams_is_broken_and_no_other(experiment):
    config = experiment.config
    config.model.name, config.model.init, config.model.width = 'mlp', 'averaging', 8
    with jax.numpy_dtype_promotion('standard'):  # optax's schedule mixes int32 and float
        streams.run(experiment)
    with open(experiment.workdir / 'table.csv') as file:
        rows = list(csv.DictReader(file))
    assert [(row['perturbed streams'], row['streams that broke']) for row in rows] == [
        ('none', 'none'), ('hidden', 'hidden'),
    ]  # fmt: skip
    assert rows[0]['growth a step'] == '-'
    assert float(rows[1]['growth a step']) != 0
    assert streams.subsets(['a', 'b']) == [(), ('a',), ('b',), ('a', 'b')]


def test_a_band_of_accuracies_ends_at_one():
    """Mean and sample standard deviation of (0.8, 1, 1) are 14/15 and 0.2/sqrt(3)."""
    series = [[0.8, 0.5], [1.0, 0.5], [1.0, 0.5]]
    for at_most, top in ((1, 1.0), (np.inf, 14 / 15 + 0.2 / np.sqrt(3))):
        _, axes = runs.new_figure(1, 1)
        runs.plot_band(axes, [0, 1], series, at_most, color='k')
        (line,), (band,) = axes.lines, axes.collections
        np.testing.assert_allclose(line.get_ydata(), [14 / 15, 0.5], rtol=1e-12)
        x, y = band.get_paths()[0].vertices.T
        at_first = y[x == 0]
        bottom = 14 / 15 - 0.2 / np.sqrt(3)
        np.testing.assert_allclose((at_first.min(), at_first.max()), (bottom, top), rtol=1e-12)


def test_a_figure_that_cannot_be_drawn_is_a_line(experiment, monkeypatch, capsys):
    """And not the end of the experiment, whose table is still to come."""
    monkeypatch.setitem(matplotlib.rcParams, 'text.usetex', True)
    monkeypatch.setenv('PATH', '/nowhere')
    figure, axes = runs.new_figure(1, 1)
    axes.set_title('drawn by LaTeX')
    runs.save_figure(experiment, figure)
    printed = capsys.readouterr()
    assert printed.err.startswith(f'note: {experiment.workdir}/figure.png could not be drawn (')
    assert (printed.out, printed.err.count('\n')) == ('', 1)


def test_a_backend_that_matplotlib_does_not_know_is_not_asked():
    flags = [sys.executable, '-m', 'experiments.phase', '--help']
    done = subprocess.run(
        flags, capture_output=True, cwd=ROOT, env=os.environ | {'MPLBACKEND': 'nonsense'}
    )
    assert (done.returncode, done.stderr) == (0, b'')
