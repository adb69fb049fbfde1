"""The table of what determinism costs: its columns. How fast anything is, is not tested."""

import csv

import jax
import pytest

from experiments.performance import determinism
from zerojax.host.errors import RunError


@pytest.fixture
def short(monkeypatch):
    """A network that is compiled in a short time, in this process, and no PyTorch."""
    monkeypatch.setattr(determinism, 'NETWORK', (7, 1, 8, 1))
    monkeypatch.setattr(determinism, 'SECONDS', 0.0)
    monkeypatch.setattr(determinism, 'matrix_peak', lambda precision, _: 1e13)
    monkeypatch.setattr(determinism.importlib.util, 'find_spec', lambda _: None)
    compile_row = determinism.compile_row

    def in_its_thread(*args):
        with jax.numpy_dtype_promotion('standard'):
            return compile_row(*args)

    monkeypatch.setattr(determinism, 'compile_row', in_its_thread)


def test_the_command(short, monkeypatch, tmp_path):
    processes = []

    def here(function, *args):
        processes.append(args)
        with jax.numpy_dtype_promotion('standard'):
            return function(*args)

    monkeypatch.setattr(determinism, 'in_fresh_process', here)
    argv = ['determinism', f'--workdir={tmp_path}', '--batch=4', '--repetitions=1']
    assert determinism.main(argv) == 0
    assert [mode for _, mode, _ in processes] == ['deterministic', 'hardware'], 'a process each'
    with open(tmp_path / 'table.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['precision'] for row in rows] == ['float32', 'bfloat16']
    for row in rows:
        deterministic = float(row['deterministic, images/s'].split()[0])
        hardware = float(row['hardware, images/s'].split()[0])
        assert float(row['deterministic over hardware, ms']) == pytest.approx(
            hardware / deterministic, rel=1e-2
        )
        milliseconds = float(row['deterministic, ms a step'])
        assert milliseconds == pytest.approx(1e3 * 4 / deterministic, rel=1e-2)
        assert float(row['TFLOP/s']) > 0


def test_what_was_measured_stays_when_the_rest_fails(short, monkeypatch, tmp_path):
    def here(function, rows, mode, *args):
        if mode == 'hardware':
            raise RunError('lost the device')
        with jax.numpy_dtype_promotion('standard'):
            return function(rows, mode, *args)

    monkeypatch.setattr(determinism, 'in_fresh_process', here)
    argv = ['determinism', f'--workdir={tmp_path}', '--batch=4', '--repetitions=1']
    assert determinism.main(argv) == 1
    with open(tmp_path / 'table.csv') as file:
        rows = list(csv.DictReader(file))
    assert all(float(row['deterministic, images/s'].split()[0]) > 0 for row in rows)
    assert 'hardware, images/s' not in rows[0]


def test_a_process_of_its_own_returns_what_the_function_does():
    assert determinism.in_fresh_process(divmod, 7, 2) == (3, 1)
