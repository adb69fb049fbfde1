"""The prediction of a run: the command, and that it says what the run then does."""

import json
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from zerojax import predict
from zerojax.host import records
from zerojax.host.errors import UsageError
from zerojax.measure.prediction import growth_per_step, largest
from zerojax.measure.stability import predict_onset
from zerojax.run import data, train
from zerojax.run.prediction import Predictor
from zerojax.run.program import Programs

ROOT = pathlib.Path(__file__).parent.parent
DIGITS = f'--config={ROOT}/configs/digits.py'
TOY = ['--config.model.name=mlp', '--config.model.init=averaging', '--config.model.width=20']


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax's schedule mixes int32 and float."""
    with jax.numpy_dtype_promotion('standard'):
        yield


def test_the_command_predicts_streams_onsets_and_curves(tmp_path, capsys):
    flags = ['--scales=1e-2,1e-6', '--steps=20', '--features=4', '--seeds=2']
    assert predict.main(['predict', DIGITS, *TOY, *flags, f'--workdir={tmp_path}/p']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40, 'one screen'
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 100
    found = json.loads((tmp_path / 'p' / 'predict.json').read_text())
    streams = {'hidden': 20}
    assert {name: stream['features'] for name, stream in found['streams'].items()} == streams
    assert all(isinstance(stream['growth'], float) for stream in found['streams'].values())
    assert [(each['scale'], each['stream']) for each in found['onsets']] == [
        (scale, stream) for scale in (1e-2, 1e-6) for stream in (*found['streams'], None)
    ]
    for each in found['onsets']:
        assert len(each['reduced_seeds']) == 2
    for curves in found['linear_curves'].values():
        for name, curve in curves.items():
            slope = growth_per_step(np.log(10) * np.array(curve))
            assert found['streams'][name]['growth'] == pytest.approx(slope, rel=1e-6)
    assert set(found['curves']) == {'0.01', '1e-06'}
    for curves in found['curves'].values():
        assert {name: len(curve) for name, curve in curves.items()} == dict.fromkeys(streams, 21)
    assert found['operations']['full'] > 2 * found['operations']['reduced']
    assert found['seconds'] > 0
    start = max(curve[0] for curve in found['linear_curves']['1e-06'].values())
    assert found['rounding_scale'] * 10**start == pytest.approx(2**-24 * 1e-6, rel=1e-6)
    assert not any('rounding decides' in line for line in lines), 'of noise that is larger'
    assert (tmp_path / 'p' / 'figures' / 'predict.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize(
    'flags,message',
    [
        (
            ['--config.perturbation.kind=none'],
            "perturbation.kind='none': only noise on the initial",
        ),
        (['--config.perturbation.kind=gradient'], "perturbation.kind='gradient': only noise on"),
        (['--config.perturbation.at_step=3'], 'perturbation.at_step=3: only noise on the initial'),
        (['--config.perturbation.every=3'], 'perturbation.every=3: only noise on the initial'),
        (['--config.model.dropout=0.1'], 'model.dropout=0.1: breaks every symmetry by itself'),
        (['--config.symmetry.project=True'], 'symmetry.project=True: no asymmetry outlives a step'),
        (['--config.dataset.last_batch=keep'], "dataset.last_batch='keep': predictions need"),
        (['--config.model.init=random'], "model.init='random': some features of a stream start"),
        (
            ['--config.model.name=leakynet', '--config.model.init=1_ii_ii_ii'],
            "model.init='1_ii_ii_ii': some features of a stream start",
        ),
        (['--config.perturbation.layers=nothing'], "perturbation.layers='nothing': matches no"),
        (['--scales=1e-6,much'], '--scales=1e-6,much: must be numbers above 0'),
        (['--scales=0'], '--scales=0: must be numbers above 0'),
        (['--scales=1e-100'], '--scales=1e-100: must be numbers above 0, such as 1e-8,1e-6, from'),
        (['--config.perturbation.scale=0.0'], 'perturbation.scale=0.0: must be above 0, or give'),
        (['--features=3'], '--features=3: must be a whole number of at least 4'),
        (['--steps=1'], '--steps=1: must be a whole number of at least 2'),
        (
            ['--config.perturbation.layers=head/bias'],
            "perturbation.layers='head/bias': noise on these breaks no symmetry",
        ),
        (
            ['--config.perturbation.seed=2147483647'],
            '--seeds=5: are the seeds 2147483647 to 2147483651 of the perturbation; must be',
        ),
        (['--seeds=0'], '--seeds=0: must be a whole number of at least 1'),
    ],
)
def test_what_cannot_be_predicted_is_one_line_and_nothing_is_written(
    tmp_path, capsys, flags, message
):
    workdir = tmp_path / 'p'
    assert predict.main(['predict', DIGITS, *flags, f'--workdir={workdir}']) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f'error: {message}')
    assert output.err.count('\n') == 1
    assert not workdir.exists()


def test_scales_are_those_that_the_runs_precision_can_hold(tiny_config):
    tiny_config.param_dtype = 'float64'
    assert predict.parse_scales('1e-100,1e-6', tiny_config) == [1e-100, 1e-6]
    tiny_config.param_dtype = 'float32'
    with pytest.raises(UsageError, match='--scales=1e-100'):
        predict.parse_scales('1e-100', tiny_config)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once_also_while_a_thread_compiles(number):
    waiting = (
        'import sys, time\n'
        'from concurrent import futures\n'
        'from zerojax import predict\n'
        'def run(argv):\n'
        '    with futures.ThreadPoolExecutor(1) as pool:\n'
        '        compiling = pool.submit(time.sleep, 100)\n'
        '        print("begun", flush=True)\n'
        '        compiling.result()\n'
        'predict.run = run\n'
        'sys.exit(predict.main(["predict"]))\n'
    )
    process = subprocess.Popen([sys.executable, '-c', waiting], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout.readline() == b'begun\n'
        process.send_signal(number)
        assert process.wait(timeout=50) == 128 + number
    finally:
        process.kill()
        process.communicate()


def test_a_median_counts_never_as_later_than_any_step():
    assert predict.median_onset([3, None, 5]) == 5
    assert predict.median_onset([3, None, None]) is None
    assert predict.median_onset([3, 5, 8, None]) == 6.5
    assert predict.median_onset([3, 5, None, None]) is None


def test_growth_is_the_slope_of_the_second_half():
    assert growth_per_step(np.array([5.0, 0.0, 1.0, 3.0, 5.0])) == 2.0
    assert growth_per_step(np.full(5, -np.inf)) is None
    assert growth_per_step(np.array([1.0, 3.0])) == 2.0, 'of a run of a single step'


@pytest.mark.parametrize(
    'growth,told',
    [
        (0.1, 'grows, twice as large every 7 steps'), (-0.1, 'dies'), (4e-5, 'stays'),
        (-4e-5, 'stays'), (0.0, 'stays'), (None, 'none'),
    ],
)  # fmt: skip
def test_what_becomes_of_small_asymmetry(growth, told):
    assert predict.fate(growth) == told


def test_noise_below_one_rounding_is_said_to_be():
    found = {
        'steps': 400,
        'streams': {},
        'onsets': [
            {'scale': 1e-9, 'stream': None, 'linear': 9, 'reduced': 9.0, 'reduced_seeds': [9]}
        ],
    }
    lines = predict.screen(found | {'rounding_scale': 1e-8})
    assert any('below a scale of 1e-08 rounding decides' in line for line in lines)
    lines = predict.screen(found | {'rounding_scale': 1e-9})
    assert not any('rounding decides' in line for line in lines)


@pytest.mark.slow
def test_streams_that_the_noise_does_not_break_stay_symmetric_in_both_predictions(tiny_config):
    tiny_config.perturbation.streams = ('block3_0',)
    predictor = Predictor(tiny_config, data.load_of(tiny_config), 4, 4)
    active = predictor.active()
    assert np.isfinite(active['block3_0']).all()
    assert (active['stem'] == -np.inf).all() and (active['block2_0'] == -np.inf).all()
    reduced = predictor.reduced(predictor.noise(0), 1e-3)
    assert np.isfinite(reduced['block3_0']).all() and (reduced['stem'] == -np.inf).all()


def test_the_noise_is_what_the_run_adds_to_its_weights(tiny_config, tmp_path):
    """Features in another order, the first in its place."""
    tiny_config.num_steps, tiny_config.perturbation.scale = 1, 1e-5
    tiny_config.optimizer.learning_rate = 0.0
    tiny_config.model.name, tiny_config.model.init = 'mlp', 'averaging'
    tiny_config.model.width = 20
    tiny_config.perturbation.seed = 5
    predictor = Predictor(tiny_config, data.load_of(tiny_config), 1, 4)
    noise = predictor.noise(5).weights
    train.train(tiny_config, tmp_path / 'run')
    saved = records.read_json(tmp_path / 'run' / 'summary.json')
    curves = predictor.linear(1e-5)
    assert saved['asymmetry_by_stream'].keys() == curves.keys()
    assert np.std(noise['head']['kernel']) == pytest.approx(1, rel=0.1)
    # What is predicted is close to what it comes to, and never more.
    for name, curve in curves.items():
        assert 0.5 < np.exp(curve[-1]) / saved['asymmetry_by_stream'][name] < 1 + 1e-3


@pytest.mark.parametrize('optimizer', ['sgd', 'radam'])
def test_the_reduced_prediction_begins_as_the_noise_whatever_the_optimizer(tiny_config, optimizer):
    tiny_config.optimizer.name, tiny_config.optimizer.learning_rate = optimizer, 1e-3
    tiny_config.model.name, tiny_config.model.init = 'mlp', 'averaging'
    tiny_config.model.width = 20
    predictor = Predictor(tiny_config, data.load_of(tiny_config), 3, 6)
    (curve,) = predictor.reduced(predictor.noise(0), 1e-5).values()
    (linear,) = predictor.linear(1e-5).values()
    np.testing.assert_allclose(np.exp(curve - linear), 1, rtol=0.5)


@pytest.mark.slow
@pytest.mark.parametrize('depth,shortcut,scale', [(7, 'pre_relu', 1e-4), (10, 'post_relu', 1e-3)])
def test_onsets_are_those_of_the_runs(tmp_path, depth, shortcut, scale):
    """The median of three seeds, within three steps."""
    from configs import onset as onset_config

    config = onset_config.get_config()
    config.model.depth = depth
    config.model.shortcut = shortcut
    config.perturbation.scale = scale
    config.num_steps = config.eval_every_steps = config.checkpoint_every_steps = 70
    programs = Programs()
    predictor = Predictor(config, programs.dataset(config), 70, 8)
    measured, predicted = [], []
    for seed in range(3):
        config.perturbation.seed = seed
        workdir = tmp_path / str(seed)
        train.train(config, workdir, programs)
        lines = records.read_metrics(workdir / 'metrics.jsonl')
        lines = [line for line in lines if line['kind'] == 'train']
        measured.append(next(line['step'] for line in lines if line['asymmetry'] >= 0.1))
        predicted.append(predict_onset(largest(predictor.reduced(predictor.noise(seed), scale))))
    assert abs(np.median(measured) - np.median(predicted)) <= 3, (measured, predicted)
