import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zerojax.host.errors import UsageError
from zerojax.host.metrics_log import MetricsLog

tensorboard_warnings = pytest.mark.filterwarnings('ignore::DeprecationWarning')


def written(path):
    return [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]


def test_steps_strictly_increase_per_kind(tmp_path):
    with MetricsLog(tmp_path, 0) as metrics:
        metrics.write(5, 'train', loss=1.0)
        metrics.write(5, 'eval', loss=2.0)
        metrics.write(6, 'train', loss=1.5)
        with pytest.raises(ValueError, match='train at step 6 after step 6'):
            metrics.write(6, 'train', loss=1.0)
    assert [(line['step'], line['kind']) for line in written(tmp_path)] == [
        (5, 'train'), (5, 'eval'), (6, 'train'),
    ]  # fmt: skip


def test_a_resumed_file_drops_what_will_be_run_again_and_half_a_line(tmp_path):
    with MetricsLog(tmp_path, 0) as metrics:
        for step in (2, 4, 6):
            metrics.write(step, 'train', loss=float(step))
    kept = (tmp_path / 'metrics.jsonl').read_bytes().splitlines(keepends=True)[:2]
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 8, "kin')
    with MetricsLog(tmp_path, 4) as metrics:
        assert metrics.last('train') == {'step': 4, 'kind': 'train', 'loss': 4.0}
        assert (tmp_path / 'metrics.jsonl').read_bytes() == b''.join(kept)
        metrics.write(6, 'train', loss=7.0)
    assert [line['loss'] for line in written(tmp_path)] == [2.0, 4.0, 7.0]


def test_a_damaged_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1, "kind": "train"}\n{"st\n{"step": 3, "kind": "train"}\n')
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r'line 2 of metrics\.jsonl is damaged'):
        MetricsLog(tmp_path, 3)
    assert path.read_bytes() == before


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    with MetricsLog(tmp_path, 0) as metrics, pytest.raises(ValueError, match='JSON'):
        metrics.write(1, 'train', loss=float('nan'))
    assert written(tmp_path) == []


@tensorboard_warnings
def test_tensorboard_holds_every_number_and_forgets_what_is_run_again(tmp_path):
    with MetricsLog(tmp_path, 0) as metrics:
        metrics.write(1, 'symmetry', asymmetry=0.5, unique_features={'stem': 3})
        metrics.write(2, 'symmetry', asymmetry=0.25, unique_features={'stem': 4})
    with MetricsLog(tmp_path, 1) as metrics:
        metrics.write(2, 'symmetry', asymmetry=0.125, unique_features={'stem': 5})
    events = EventAccumulator(str(tmp_path / 'tensorboard'))
    events.Reload()
    for tag, values in (
        ('symmetry/asymmetry', [0.5, 0.125]),
        ('symmetry/unique_features.stem', [3, 5]),
    ):
        assert [(e.step, e.value) for e in events.Scalars(tag)] == list(enumerate(values, start=1))
