"""Where small asymmetry grows, where it dies, and where the symmetric network itself does."""

import csv
import math

import jax
import numpy as np
import pytest

from experiments import phase, runs
from experiments.phase import DIES, GROWS, NOT_FINITE, NOTHING, STARTS, STAYS, Point, Run
from zerojax.host.errors import RunError
from zerojax.measure.prediction import growth_per_step
from zerojax.run import many
from zerojax.run.prediction import Predictor

STEPS = 120
CHANCE = math.log(10)


@pytest.fixture
def experiment(tiny_config, tmp_path, monkeypatch) -> runs.Experiment:
    """The toy, at a learning rate of 0, one that learns, and one at which the decay explodes."""
    tiny_config.num_steps = STEPS
    tiny_config.model.update({'name': 'mlp', 'init': 'averaging', 'width': 8})
    monkeypatch.setattr(phase, 'LEARNING_RATES', (0.0, 0.1, 1e4))
    monkeypatch.setattr(phase, 'WEIGHT_DECAYS', (0.0, 2.0))
    monkeypatch.setattr(phase, 'DEPTHS', (7,))
    return runs.Experiment('phase', 'the command', tiny_config, tmp_path, seeds=1)


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion('standard'):  # optax's schedule mixes int32 and float
        yield


def table(experiment: runs.Experiment) -> list[dict[str, str]]:
    assert (experiment.workdir / 'figure.png').stat().st_size > 10_000
    assert 'the command' in (experiment.workdir / 'table.md').read_text()
    with open(experiment.workdir / 'table.csv') as file:
        return list(csv.DictReader(file))


def growth(row: dict[str, str]) -> float:
    stream, value = row['largest growth a step'].split()
    assert stream == 'hidden'
    return float(value)


def test_phase(experiment, monkeypatch):
    """What is known by construction: without steps nothing grows, without decay what learns breaks,
    with strong decay nothing is learnt, and steps far too large are not finite, and said to be."""
    phase.run(experiment)
    rows = table(experiment)
    assert len(rows) == 3 * 2 + 1
    by_place = {(row['learning rate'], row['weight decay']): row for row in rows[:6]}
    for decay in ('0', '2'):
        still = by_place['0', decay]
        assert still['predicted'] == still['runs'] == NOTHING
        assert growth(still) == 0
    learns = by_place['0.1', '0']
    assert (learns['predicted'], learns['runs']) == (GROWS, STARTS)
    assert growth(learns) > 0.01
    decays = by_place['0.1', '2']
    assert decays['predicted'] == decays['runs'] == NOTHING
    assert growth(decays) < 0
    explodes = by_place['10000', '2']
    assert explodes['predicted'].startswith(f'{NOT_FINITE} at step ')
    assert 1 < int(explodes['predicted'].split()[-1]) < STEPS
    assert explodes['runs'] == NOT_FINITE, 'not left out'
    assert explodes['loss, symmetric'] == explodes['loss, runs'] == '-'
    assert {row['as predicted'] for row in by_place.values()} == {'1 of 1'}
    assert rows[6]['depth'] == '7'
    with open(experiment.workdir / 'growth.csv') as file:
        assert len(list(csv.DictReader(file))) == len(rows) - 1, 'all but what is not finite'

    # Would be noticed if anything were predicted or trained again.
    monkeypatch.setattr(phase.Pairs, '_reduction', None)
    monkeypatch.setattr(many, 'train', None)
    phase.run(experiment)
    assert table(experiment) == rows


def test_a_pair_grows_as_the_predictor_says(experiment, tmp_path):
    """Though learning rate and weight decay are arguments of its program."""
    config = experiment.config
    config.num_steps = 400  # until it hardly matters which noise it was
    pairs = phase.Pairs(config, tmp_path)
    got = pairs.point(0.05, 0.02).growth()
    fields = {'optimizer.learning_rate': 0.05, 'optimizer.weight_decay': 0.02}
    predictor = Predictor(runs.changed(config, **fields), pairs.dataset, 400, features=4)
    want = {name: growth_per_step(curve) for name, curve in predictor.active().items()}
    assert got == pytest.approx(want, rel=0.01)


def point(growth: float, *, loss: float | None = 1.0, failure: str = '') -> Point:
    """One of a made-up network of two streams, of which `a` grows faster."""
    steps = np.arange(STEPS + 1)
    curves = None if failure else {'a': growth * steps, 'b': (growth - 0.1) * steps}
    return Point(7, 0.1, 0.0, curves, loss, CHANCE, failure)


def made_up_run(growth: float, loss: float = 1.0) -> Run:
    asymmetry = {'a': 1e-4 * np.exp(growth * np.arange(1, STEPS + 1)), 'b': np.zeros(STEPS)}
    return Run(np.full(STEPS, loss), asymmetry, accuracy=0.5)


def test_the_fastest_stream_decides_unless_the_network_itself_dies():
    assert point(0.05).fate() == GROWS
    assert point(0.05).growth() == pytest.approx({'a': 0.05, 'b': -0.05})
    assert point(-0.05).fate() == DIES
    assert point(0.05, loss=CHANCE).fate() == NOTHING
    assert point(0.05, loss=None, failure='not finite at step 3').fate() == NOT_FINITE
    assert point(0.05, failure='the linearised step').fate() == NOT_FINITE


def test_growth_is_measured_before_onset():
    run = made_up_run(0.5)  # 0.1 after 14 steps
    run.asymmetry['a'][20:] = 7.0  # too late to count
    assert run.onset() == 14
    assert phase.growth_in(run, point(0.4)) == ('a', pytest.approx(0.4), pytest.approx(0.5))
    assert phase.growth_in(made_up_run(5.0), point(0.4)) is None, 'at once'
    assert phase.growth_in(None, point(0.4)) is None
    assert phase.growth_in(run, point(0.4, failure='x')) is None


def test_what_runs_did_stands_beside_what_was_predicted():
    its_runs = [made_up_run(0.5), made_up_run(-0.5), made_up_run(0.5, loss=CHANCE), None]
    row = phase.row_of([point(0.4)] * 4, its_runs)
    assert row['runs'] == f'{STARTS}, {STAYS}, {NOTHING}, {NOT_FINITE}'
    assert row['step of onset'] == '14, never, 14, -'
    assert row['growth before it: predicted, measured'] == (
        'a +0.400, +0.500; a +0.400, -0.500; a +0.400, +0.500; -'
    )
    predicted = [point(0.4), point(-0.4), point(0.4, loss=CHANCE), point(0.4, failure='x')]
    assert [each.fate() for each in predicted] == [GROWS, DIES, NOTHING, NOT_FINITE]
    assert phase.row_of(predicted, its_runs)['as predicted'] == '4 of 4'
    assert phase.row_of(predicted, its_runs[::-1])['as predicted'] == '0 of 4'


def test_only_what_is_not_finite_may_fail(experiment, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RunError('1 of 1 runs failed: x: checkpoint is damaged')

    monkeypatch.setattr(phase, 'sweep', fail)
    with pytest.raises(RunError, match='damaged'):
        phase.Pairs(experiment.config, tmp_path).run_at(point(0.1))
