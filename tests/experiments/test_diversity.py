"""A reduced network is the network with copies of features: trained and evaluated as that is."""

import csv
import dataclasses

import jax
import numpy as np
import pytest

from experiments import diversity, runs
from experiments.trajectories import Laboratory
from zerojax import symmetry
from zerojax.host.errors import UsageError
from zerojax.step.precision import numbers_of
from zerojax.symmetry import quotient


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion('standard'):  # Flax's BatchNorm mixes float64 and float32
        yield


@pytest.mark.parametrize('where', ['all', 'last'])
def test_it_learns_what_the_large_network_of_unique_features_does(where, tiny_config, tmp_path):
    tiny_config.param_dtype = 'float64'
    tiny_config.steps_per_call = 1
    laboratory = Laboratory(tiny_config, tmp_path)
    names = symmetry.stream_names(laboratory.axes)
    streams = names if where == 'all' else names[-1:]
    with numbers_of('float64'):
        network = diversity.DiverseNetwork(laboratory, streams, m=2)
        reduced, _ = network.start(scale=1e-2, seed=1)
        params = quotient.expand(reduced, laboratory.axes, network.orbits)
        unique = symmetry.unique_features_by_stream(params, laboratory.axes)
        assert unique == {name: 2 if name in streams else 1 for name in names}
        large = dataclasses.replace(laboratory.initial_state(seed=1), params=params)
        before = laboratory.program.evaluate(large)
        for source in laboratory.sources(laboratory.initial_state(seed=1)):  # large is donated
            large, _ = laboratory.program.train_steps(large, source, np.int32(1))
        want = laboratory.program.evaluate(large)
        got = network.train(scale=1e-2, seed=1)
    assert want['loss'] < before['loss'] - 0.1  # something was learned that could be followed
    assert got['loss'] == pytest.approx(want['loss'], rel=1e-9)
    assert got['accuracy'] == want['accuracy']


@pytest.fixture
def experiment(tiny_config, tmp_path) -> runs.Experiment:
    tiny_config.num_steps = 3
    tiny_config.model.update({'name': 'mlp', 'width': 8})
    flags = {'unique': '1,4', 'scales': '1e-4,1e-2'}
    return runs.Experiment('diversity', 'the command', tiny_config, tmp_path, 2, flags)


def test_an_experiment_goes_on_where_it_was(experiment, monkeypatch):
    trained = []
    train = diversity.DiverseNetwork.train

    def stopped(network, scale, seed):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((network.orbits.counts()['hidden'], scale, seed))
        return train(network, scale, seed)

    monkeypatch.setattr(diversity.DiverseNetwork, 'train', stopped)
    with pytest.raises(KeyboardInterrupt):
        diversity.run(experiment)
    monkeypatch.setattr(
        diversity.DiverseNetwork,
        'train',
        lambda network, scale, seed: (
            trained.append((network.orbits.counts()['hidden'], scale, seed))
            or train(network, scale, seed)
        ),
    )
    diversity.run(experiment)
    # The only stream is the last one, so both places are the same networks.
    assert len(trained) == len(set(trained)) == 2 * 2 * 2, 'nothing twice'
    with open(experiment.workdir / 'table.csv') as file:
        rows = list(csv.DictReader(file))
    assert [(row['noise'], row['unique features a stream']) for row in rows] == [
        ('0.0001', '1'), ('0.0001', '4'), ('0.01', '1'), ('0.01', '4'),
    ]  # fmt: skip
    for row in rows:
        assert row['n'] == '2'
        assert row['accuracy, all streams'] == row['accuracy, last stream alone']
    assert 'the command' in (experiment.workdir / 'table.md').read_text()
    assert (experiment.workdir / 'figure.png').stat().st_size > 10_000
    assert (experiment.workdir / 'figure.pdf').exists()


@pytest.mark.parametrize(
    'field,value', [('model.dropout', 0.1), ('symmetry.project', True), ('model.init', 'random')]
)
def test_what_no_reduced_network_is_equal_to_is_refused(field, value, experiment):
    experiment.config.update_from_flattened_dict({field: value})
    with pytest.raises(UsageError, match=field):
        diversity.run(experiment)


def test_numbers_of_features_are_no_more_than_there_are(experiment):
    more = dataclasses.replace(experiment, flags={'unique': '1,9', 'scales': '1e-4'})
    with pytest.raises(UsageError, match='--unique=1,9: must be at most 8'):
        diversity.run(more)
