"""The table of what determinism costs: its columns. How fast anything is, is not tested."""

import csv

import jax
import pytest

from experiments.performance import determinism, measuring


def test_the_command(monkeypatch, tmp_path):
    """On a network that is compiled in a short time; PyTorch is measured where it is installed."""
    monkeypatch.setattr(determinism, 'NETWORK', (7, 1, 8, 1))
    monkeypatch.setattr(determinism, 'SECONDS', 0.0)
    rate = {'median': 200.0, 'least': 150.0, 'most': 250.0}
    monkeypatch.setattr(
        determinism,
        'torch_columns',
        lambda rows, _: [{'PyTorch fastest, images/s': measuring.shown(rate)}] * len(rows),
    )
    monkeypatch.setattr(determinism, 'matrix_peak', lambda precision, _: 1e13)
    stepper_of = determinism.stepper_of

    def in_its_thread(*args):
        with jax.numpy_dtype_promotion('standard'):
            return stepper_of(*args)

    monkeypatch.setattr(determinism, 'stepper_of', in_its_thread)
    with jax.numpy_dtype_promotion('standard'):
        status = determinism.main(
            ['determinism', f'--workdir={tmp_path}', '--batch=4', '--repetitions=1']
        )
    assert status == 0
    with open(tmp_path / 'table.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['precision'] for row in rows] == ['float32', 'bfloat16']
    for row in rows:
        deterministic = float(row['deterministic, images/s'].split()[0])
        hardware = float(row['hardware, images/s'].split()[0])
        assert float(row['deterministic over hardware, ms']) == pytest.approx(
            hardware / deterministic, rel=1e-2
        )
        assert float(row['deterministic, ms a step']) == pytest.approx(
            1e3 * 4 / deterministic, rel=1e-2
        )
        assert row['PyTorch fastest, images/s'] == '200 (150 to 250)'
