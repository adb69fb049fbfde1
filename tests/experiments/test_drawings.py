"""Figures of docs/ that are drawn from its tables, or from the networks."""

import math

import pytest

from experiments import drawings


def test_every_figure_is_drawn_from_what_is_committed(tmp_path, capsys):
    drawings.run(['drawings', f'--workdir={tmp_path}'])
    names = {*drawings.ARMS, 'diversity_cifar', 'gpu_steps', 'networks'}
    assert {file.name for file in tmp_path.iterdir()} == {f'{name}.png' for name in names}
    assert all(file.read_bytes()[:4] == b'\x89PNG' for file in tmp_path.iterdir())
    assert '| float32, injected 1e-3 | 151 | block3_0 |' in capsys.readouterr().out


def test_errors_are_of_each_stream_that_was_predicted():
    measured = {'run': 'a', **dict.fromkeys(drawings.STREAMS, 1e-3)}
    nothing = {f'{m}: {s}': math.nan for m in ('reduced', 'linear') for s in drawings.STREAMS}
    rows = [{**measured, **nothing, 'run': 'not predicted'}]
    for factor in (1, 10, 100):
        predicted = {f'reduced: {s}': 1e-3 * factor for s in drawings.STREAMS}
        rows.append(measured | predicted | {f'linear: {s}': 1e-3 for s in drawings.STREAMS})
    found = drawings.prediction_errors(rows)
    assert [line['stream'] for line in found] == list(drawings.STREAMS)
    for line in found:
        assert (line['reduced, median'], line['reduced, largest']) == ('1.00', '2.00')
        assert float(line['linear, largest']) == pytest.approx(0, abs=0.01)
