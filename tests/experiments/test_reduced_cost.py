"""What reduced networks cost: the table of their operations and times."""

import csv

import jax
import pytest

from experiments.performance import reduced


@pytest.fixture
def small(monkeypatch):
    for name, value in {
        'FEATURES': (1, 4), 'DEPTH': 7, 'WIDTH': 1, 'BATCH': 8, 'SHAPE': (8, 8, 1),
        'REPETITIONS': 1,
    }.items():  # fmt: skip
        monkeypatch.setattr(reduced, name, value)
    monkeypatch.setattr(reduced.measuring, 'SECONDS', 0.01)


def test_more_features_cost_more_and_the_network_is_timed_if_asked_for(small, tmp_path):
    with jax.numpy_dtype_promotion('standard'):
        for full in (0, 1):
            reduced.run(['reduced', f'--workdir={tmp_path}', f'--full={full}'])
            rows = list(csv.DictReader((tmp_path / 'table.csv').read_text().splitlines()))
            assert [row['features a stream'] for row in rows] == ['1', '4', 'all']
            shares = [float(row['of the network']) for row in rows]
            assert shares[0] < shares[1] < shares[2] == 1
            assert [row['ms a step'] == '-' for row in rows] == [False, False, not full]
