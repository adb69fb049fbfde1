"""Short runs beside `zerojax.run.train`, and the experiments that are made of them."""

import csv
import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest

from configs import onset as onset_config
from experiments import (
    curves,
    hardware,
    held_out,
    onset,
    runs,
    sources,
    threshold,
    timing,
    trajectories,
)
from experiments.trajectories import Laboratory, Trajectory
from zerojax import config as config_lib
from zerojax.config import build_perturbation, check
from zerojax.host.errors import UsageError
from zerojax.perturb import NONE, Perturbation
from zerojax.run.train import train

STEPS = 5


@pytest.fixture
def config(tiny_config):
    tiny_config.num_steps = STEPS
    tiny_config.log_every_steps = 1
    return tiny_config


@pytest.fixture
def toy_config(config):
    """The network that is compiled in the shortest time."""
    config.model.update({'name': 'mlp', 'width': 20, 'convolution': 'direct'})
    return config


@pytest.fixture
def experiment(config, tmp_path) -> runs.Experiment:
    return runs.Experiment('name', 'the command', config, tmp_path, seeds=2)


class Fake:
    """Runs that take no time. From 10^floor on, asymmetry grows once perturbed, to 1 at the end."""

    floor = -12.0

    def __init__(self):
        self.simulated = []

    def sweep(self, jobs, programs):
        for config, workdir in jobs:
            if not workdir.exists():
                self.simulated.append((config, build_perturbation(config), config.seed))
                self.simulate(config, build_perturbation(config), workdir)

    def simulate(self, config, p, workdir):
        has_scale = p.kind not in ('none', 'ulp', 'order')
        starts = p.kind != 'none' and not (has_scale and math.log10(p.scale) < self.floor)
        asymmetry = np.zeros(config.num_steps)
        if starts and not config.symmetry.project:
            asymmetry[p.at_step :] = np.geomspace(1e-3, 1, config.num_steps - p.at_step)
        workdir.mkdir(parents=True)
        lines = [
            {
                'step': i + 1, 'kind': 'train', 'loss': 2.0, 'asymmetry': x,
                'asymmetry_by_stream': {'stem': x, 'block2_0': x / 10},
            }
            for i, x in enumerate(asymmetry)
        ]  # fmt: skip
        lines.append({'step': config.num_steps, 'kind': 'eval', 'loss': 2.0})
        (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in lines))
        broken_at_step = p.at_step if asymmetry.any() else None
        summary = {'eval_accuracy': 0.5, 'broken_at_step': broken_at_step}
        (workdir / 'summary.json').write_text(json.dumps(summary))


@pytest.fixture
def fake(monkeypatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(trajectories, 'sweep', fake.sweep)
    return fake


def table(experiment: runs.Experiment) -> list[dict[str, str]]:
    assert (experiment.workdir / 'figure.png').stat().st_size > 10_000
    assert 'the command' in (experiment.workdir / 'table.md').read_text()
    with open(experiment.workdir / 'table.csv') as file:
        return list(csv.DictReader(file))


def test_a_trajectory_is_that_of_a_run(toy_config, tmp_path):
    config = toy_config
    config.perturbation.at_step = 2
    config.perturbation.scale = 1e-3
    summary = train(config, tmp_path / 'run')
    text = (tmp_path / 'run/metrics.jsonl').read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    losses = [line['loss'] for line in lines if line['kind'] == 'train']

    laboratory = Laboratory(config, tmp_path / 'trajectories')
    got = laboratory.run(Perturbation('gaussian', 1e-3, at_step=2), seed=config.seed)
    np.testing.assert_allclose(got.loss, losses, rtol=1e-6)
    assert got.asymmetry[:2].tolist() == [0, 0]
    assert got.asymmetry[-1] == pytest.approx(summary['asymmetry'], rel=1e-4)
    assert got.accuracy == summary['eval_accuracy']
    assert got.broken_at_step == summary['broken_at_step'] == 2


def test_finished_runs_are_not_run_again_and_never_taken_for_others(toy_config, tmp_path):
    config = toy_config
    laboratory = Laboratory(config, tmp_path)
    wanted = [(NONE, 0), (Perturbation('gaussian', 1e-6), 1), (NONE, 0)]
    first, _, same = laboratory.run_all(wanted)
    assert np.array_equal(first.loss, same.loss)
    manifests = sorted(tmp_path.glob('*/manifest.json'))
    assert len(manifests) == 2
    times = [file.stat().st_mtime_ns for file in manifests]
    laboratory.run_all(wanted)
    assert [file.stat().st_mtime_ns for file in manifests] == times
    config.optimizer.learning_rate *= 2
    with pytest.raises(UsageError, match='holds a run of another config'):
        Laboratory(config, tmp_path).run(NONE)


def test_a_config_may_be_of_epochs(config, fake, tmp_path):
    config.num_steps, config.num_epochs = None, 1
    Laboratory(config, tmp_path).run(NONE)  # which checks it


def test_runs_aimed_at_streams_have_folders_of_their_own(config, fake, tmp_path):
    laboratory = Laboratory(config, tmp_path)
    aims = [(), ('stem',), ('stem', 'block2_0')]
    laboratory.run_all([(Perturbation('gaussian', 1e-6, streams=aim), 0) for aim in aims])
    assert [p.streams for _, p, _ in fake.simulated] == aims
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [
        'kind=gaussian,scale=1e-06,seed=0',
        'kind=gaussian,scale=1e-06,streams=stem,seed=0',
        'kind=gaussian,scale=1e-06,streams=stem-block2_0,seed=0',
    ]


def test_predictions_are_remembered_for_this_config_alone(toy_config, tmp_path):
    config = toy_config
    for learning_rate in (0.1, 0.1, 0.2):
        config.optimizer.learning_rate = learning_rate
        laboratory = Laboratory(config, tmp_path)
        for seed in (0, 1):
            compute = functools.partial(dict, value=[seed, learning_rate])
            got = laboratory.remember(compute, seed=seed)
            assert got['value'] == [seed, learning_rate]
    assert len(list(tmp_path.glob('*.json'))) == 4


def test_onset_counts_updates():
    got = Trajectory(np.zeros(4), np.array([1e-9, 0.09, 0.1, 2.0]), {}, 0.1, 0)
    assert got.onset() == 3
    assert trajectories.first_at_least(np.full(3, np.nan), 0.1) is None


@pytest.mark.parametrize(
    ('lowest', 'floor', 'want'),
    [(-37.0, -12.0, -12.0), (-5.0, -12.0, -np.inf), (-37.0, 1.0, np.inf)],
)
def test_bisection_finds_the_threshold(lowest, floor, want, config, tmp_path, fake):
    fake.floor = floor
    ((got, tried),) = threshold.smallest_scales(Laboratory(config, tmp_path), 1, lowest)
    if math.isinf(want):
        assert got == want
    else:
        assert want <= got <= want + threshold.RESOLUTION
    assert all((step is not None) == (decades >= floor) for decades, step in tried.items())


def test_threshold(experiment, fake):
    threshold.run(experiment)
    rows = table(experiment)
    assert [row['weights'] for row in rows] == ['float64', 'float32', 'bfloat16'] * 2
    for row in rows:
        scales = [float(each) for each in row['smallest scale that starts training'].split(', ')]
        assert len(scales) == 2
        assert all(0 <= math.log10(each) - fake.floor < 0.3 for each in scales)
        assert row['onset there (step)'] == '4, 4'
    fake.floor = 1.0  # would be noticed if anything ran again
    threshold.run(experiment)
    assert table(experiment) == rows


def test_timing(experiment, fake, monkeypatch):
    monkeypatch.setattr(timing, 'STEPS', (0, 2))
    timing.run(experiment)
    rows = table(experiment)
    assert [row['perturbed at step'] for row in rows] == ['0', '2', 'never'] * 2
    assert [row['steps until asymmetry 0.1'] for row in rows] == ['4, 4', '3, 3', '-'] * 2
    monkeypatch.setattr(timing, 'STEPS', (0, STEPS))
    with pytest.raises(UsageError, match=f'^num_steps={STEPS}: must be above {STEPS}, the last'):
        timing.run(experiment)
    experiment.config.perturbation.scale = 0.0
    with pytest.raises(UsageError, match=r'^perturbation\.scale=0\.0: must be above 0'):
        timing.run(experiment)


def test_sources(experiment, fake):
    fake.floor = -7.0
    sources.run(experiment)
    rows = table(experiment)
    everywhere = [row for row in rows if row['parameters'] == 'all']
    assert len(everywhere) == 2 * sum(len(axis) for axis in sources.all_layers().values())
    for row in everywhere:
        by_scale = not any(word in row['source'] for word in ('count', 'order'))
        started = not by_scale or float(row['scale or count']) >= 1e-7
        assert row['step of onset'] == ('4, 4' if started else 'never, never'), row
    alone = {row['parameters'] for row in rows if row['source'] == 'one weight, 0.01'}
    assert 'stem/kernel' in alone
    assert 'head/kernel' not in alone, 'starts at 0'
    chosen = {p.layers for _, p, _ in fake.simulated if p.kind == 'one_weight'} - {'.*'}
    assert chosen == {f'{path}$' for path in alone}


def test_hardware(toy_config, experiment, fake):
    """The audit is real. This CPU's kernels are known to be without noise."""
    hardware.run(experiment)
    rows = {row['arm']: row for row in table(experiment)}
    assert [row['noise in each step'] for row in rows.values()] == (
        ['none'] * 4 + ['of rounding'] * 2 + ['6.0e-08'] * 2 + ['6.0e-05'] * 2
    )
    for arm, row in rows.items():
        starts = arm.startswith(('injected', 'emulated')) and 'projected' not in arm
        assert row['step of onset'] == ('4, 4' if starts else 'never, never')
    modes = {config.determinism.mode for config, p, _ in fake.simulated if p.kind == 'none'}
    assert modes == {'hardware', 'deterministic'}
    audit = json.loads((experiment.workdir / 'audit.json').read_text())
    assert audit['floor'] == 0
    assert audit['versions']['jax']
    assert audit['verdict']


def test_onset(experiment, fake, monkeypatch):
    """Predictions are made up here: growth by a factor of 10 in each step, one-sided from 1e-3."""
    growing = math.log(10) * np.arange(STEPS + 1) + 0.1  # clear of the powers of 10
    on_kink = [{'block3_1/relu': [0, 0]}] * 2
    monkeypatch.setattr(onset.Prediction, 'linear', lambda self, seed: growing)
    follows = {scale: growing + math.log(scale) for scale in onset.SCALES}
    monkeypatch.setattr(onset.Prediction, 'reduced', lambda self, seed: follows)
    monkeypatch.setattr(onset.Prediction, 'one_sided', lambda *args: growing + math.log(1e-3))
    monkeypatch.setattr(
        onset.Prediction,
        'features_on_kinks',
        lambda self, seed: (
            on_kink
            if self.config.model.shortcut == 'pre_relu'
            else [{'block3_1/relu': [8, 4]}, {'block3_1/relu': [8, 0]}]
        ),
    )
    onset.run(experiment)
    rows = table(experiment)
    assert [row['shortcut'] for row in rows[:: len(onset.SCALES)]] == ['pre_relu', 'post_relu']
    for row in rows:
        scale = float(row['scale'])
        assert row['onset'] == ('4, 4' if scale >= 1e-12 else 'never, never')
        step = round(-1 - math.log10(scale))
        for column in ('predicted, linear', 'predicted, reduced'):
            assert row[column] == (f'{step}, {step}' if step <= STEPS else 'never, never')
        assert row['predicted, one-sided'] == (
            '-, -' if row['shortcut'] == 'pre_relu' else '2/2/2, 2/2/2'
        )
    with open(experiment.workdir / 'kinks.csv') as file:
        kinks = list(csv.DictReader(file))
    assert {row['shortcut'] for row in kinks} == {'post_relu'}
    assert [row['step'] for row in kinks] == ['0', '1'] * 2


def test_held_out(experiment, fake, monkeypatch):
    """Predicted are 3 and never; what the runs do is 4 for each scale."""
    found = {
        'depth 7': {'model.depth': 7},
        'learning rate 0.05': {'optimizer.learning_rate': 0.05},
    }
    monkeypatch.setattr(held_out, 'settings', lambda: found)
    reaches, never = np.log([0.0001, 0.001, 0.01, 0.1, 0.2, 0.3]), np.full(STEPS + 1, -9.0)
    predicted = {'linear': [{'stem': never}] * 2, 'reduced': [{'stem': reaches}] * 2}
    monkeypatch.setattr(Laboratory, 'predict', lambda self, seed, scales: predicted)
    held_out.run(experiment)
    rows = table(experiment)
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        assert (row['onset'], row['predicted, reduced']) == ('4, 4', '3, 3')
        assert (row['error, linear'], row['error, reduced']) == ('-', '-1')
    with open(experiment.workdir / 'errors.csv') as file:
        linear, reduced = csv.DictReader(file)
    assert linear['within 3 steps or 5%'] == '0' and linear['one of them never comes'] == '8'
    assert reduced['within 3 steps or 5%'] == '8' and reduced['largest error (steps)'] == '1.0'


def test_curves(experiment, fake, monkeypatch):
    """What is predicted of block2_0 is too high by decades whose number tells what it is for."""
    experiment = dataclasses.replace(experiment, flags={'features': '40,4'})
    log = np.concatenate([[-9.0], np.log(np.geomspace(1e-3, 1, STEPS))])

    def predict(self, seed, scales, features):
        def of_streams(decades):
            return {'stem': log, 'block2_0': log + (decades - 1) * np.log(10)}

        return {
            'linear': [of_streams(i + 2 * seed) for i, _ in enumerate(scales)],
            'reduced': [
                of_streams(i + 2 * seed + 4 * np.log10(features / 4)) for i, _ in enumerate(scales)
            ],
        }

    monkeypatch.setattr(Laboratory, 'predict', predict)
    curves.run(experiment)
    methods = ('linear', 'reduced, 4 features', 'reduced, 40 features')
    rows = iter(table(experiment))
    for seed in range(2):
        for i, arm in enumerate([*curves.SCALES, curves.ORDER]):
            for stream in ('stem', 'block2_0'):
                row = next(rows)
                assert (row['run'], row['stream']) == (f'{arm}, seed {seed}', stream)
                decades = np.array([0, 0, 4]) + i + 2 * seed if stream == 'block2_0' else [0, 0, 0]
                off = ['-'] * 3 if arm == curves.ORDER else [f'{d:.2f}, {d:.2f}' for d in decades]
                assert [row[method] for method in methods] == off
    assert not list(rows)
    with open(experiment.workdir / 'steps.csv') as file:
        steps = list(csv.DictReader(file))
    assert len(steps) == 2 * 3 * STEPS
    assert [row['step'] for row in steps[:STEPS]] == [str(i + 1) for i in range(STEPS)]
    assert float(steps[STEPS - 1]['linear: stem']) == pytest.approx(1)
    with open(experiment.workdir / 'onsets.csv') as file:
        onsets = list(csv.DictReader(file))
    assert [[row['onset'], *(row[method] for method in methods)] for row in onsets] == [
        ['4', '4', '4', '1'], ['4', '4', '4', '1'], ['4', '-', '-', '-'],
        ['4', '3', '3', '1'], ['4', '1', '1', '1'], ['4', '-', '-', '-'],
    ]  # fmt: skip


def test_a_prediction_that_is_not_finite_at_a_step_is_infinitely_wrong_there():
    measured = np.array([1e-3, 1e-3, 0.0, 1e-3, 0.0])
    predicted = np.array([1e-2, np.nan, 1e-3, np.inf, 0.0])
    off = curves.log_errors(measured, predicted)
    np.testing.assert_allclose(off, [1, np.inf, np.inf, np.inf, 0])


def test_a_curve_is_drawn_as_far_as_asymmetry_goes():
    rows = [
        {'run': 'a', 'step': i + 1, 'stem': x, 'reduced: stem': 0.0, 'linear: stem': 2 * x}
        for i, x in enumerate([0.01, 0.05, 1.4])
    ]
    assert curves.onsets(rows) == [{'run': 'a', 'onset': '3', 'reduced': 'never', 'linear': '2'}]
    measured, reduced, linear = curves.draw(rows, across=1).axes[0].lines
    np.testing.assert_array_equal(measured.get_ydata(), [0.01, 0.05, 1.4])
    assert np.isnan(reduced.get_ydata()).all()
    np.testing.assert_array_equal(linear.get_ydata(), [0.02, 0.1, np.nan])


def test_a_median_that_never_comes_is_no_error_if_neither_does():
    found = {'measured': [None, None, 5], 'linear': [None, None, None], 'reduced': [90, 100, 110]}
    assert held_out.error(found, 'linear') == 0 and held_out.is_right(found, 'linear')
    assert held_out.error(found, 'reduced') is None and not held_out.is_right(found, 'reduced')
    found['measured'] = [104, 105, 106]
    assert held_out.is_right(found, 'reduced'), 'within 5%'
    found['measured'] = [106, 106, 106]
    assert not held_out.is_right(found, 'reduced')


@pytest.mark.parametrize('name', held_out.settings())
def test_held_out_settings_are_configs_that_are_not_the_base(name):
    changed = runs.changed(onset_config.get_config(), **held_out.settings()[name])
    check(changed)
    assert config_lib.as_json(changed) != config_lib.as_json(onset_config.get_config())


@pytest.mark.slow
def test_small_networks_predict_what_the_run_of_the_seed_does(toy_config, tmp_path):
    laboratory = Laboratory(toy_config, tmp_path)
    with jax.numpy_dtype_promotion('standard'):  # optax's schedule mixes int32 and float
        predicted = laboratory.predict(1, [1e-4])
    measured = laboratory.run(Perturbation('gaussian', 1e-4), seed=1).asymmetry
    for method in trajectories.METHODS:
        # The larger of two parts stands for their sum.
        (curve,) = predicted[method][0].values()
        assert np.all(np.abs(curve[1:] - np.log(measured)) < math.log(2))


def test_a_seed_that_never_starts_is_drawn_as_such(experiment):
    _, axes = runs.new_figure(1, 1)
    never = Trajectory(np.ones(STEPS), np.zeros(STEPS), {}, 0.1, None)
    found = {'num_steps': STEPS, 'measured': {1e-30: [never], 1e-6: [never]}, 'one_sided': [{}]}
    low = np.full(STEPS + 1, -100.0)
    onset.draw_onsets(axes, found | {'linear': [low], 'reduced': [{1e-30: low, 1e-6: low}]})
    dots, crosses = axes.lines[:2]
    assert len(dots.get_xdata()) == 0
    assert list(crosses.get_xdata()) == [1e-30, 1e-6]


@pytest.mark.slow
def test_features_start_on_a_kink_behind_the_relu_alone(config, tmp_path, monkeypatch):
    monkeypatch.setattr(onset, 'KINK_STEPS', 1)
    counted = {}
    for shortcut in onset.SHORTCUTS:
        config.model.shortcut = shortcut
        counted[shortcut] = onset.Prediction(config, tmp_path).features_on_kinks(seed=0)
    assert onset.steps_on_kinks(counted['pre_relu']) == 0
    assert onset.steps_on_kinks(counted['post_relu']) == 1


@pytest.mark.slow
def test_the_prediction_is_that_of_the_run(toy_config, tmp_path):
    """Without a kink, and before anything grows large, in float64."""
    config = toy_config
    config.param_dtype = 'float64'
    laboratory = onset.Prediction(config, tmp_path)
    with jax.numpy_dtype_promotion('standard'):  # Flax's BatchNorm mixes float64 and float32
        measured = laboratory.run(Perturbation('gaussian', 1e-9), seed=1).asymmetry
        predicted = 1e-9 * np.exp(laboratory.linear(seed=1))[1:]
    np.testing.assert_allclose(measured, predicted, rtol=1e-6)
