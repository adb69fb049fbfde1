import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zerojax.host import records
from zerojax.host.errors import UsageError
from zerojax.host.figures import draw_run

tensorboard_warnings = pytest.mark.filterwarnings('ignore::DeprecationWarning')


def written(path):
    return [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]


def test_steps_strictly_increase_per_kind(tmp_path):
    with records.Metrics(tmp_path, 0) as metrics:
        metrics.write(5, 'train', loss=1.0)
        metrics.write(5, 'eval', loss=2.0)
        metrics.write(6, 'train', loss=1.5)
        with pytest.raises(ValueError, match='train at step 6 after step 6'):
            metrics.write(6, 'train', loss=1.0)
    assert [(line['step'], line['kind']) for line in written(tmp_path)] == [
        (5, 'train'), (5, 'eval'), (6, 'train'),
    ]  # fmt: skip


def test_a_resumed_file_drops_what_will_be_run_again_and_half_a_line(tmp_path):
    with records.Metrics(tmp_path, 0) as metrics:
        for step in (2, 4, 6):
            metrics.write(step, 'train', loss=float(step))
    kept = (tmp_path / 'metrics.jsonl').read_bytes().splitlines(keepends=True)[:2]
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 8, "kin')
    with records.Metrics(tmp_path, 4) as metrics:
        assert metrics.last('train') == {'step': 4, 'kind': 'train', 'loss': 4.0}
        assert (tmp_path / 'metrics.jsonl').read_bytes() == b''.join(kept)
        metrics.write(6, 'train', loss=7.0)
    assert [line['loss'] for line in written(tmp_path)] == [2.0, 4.0, 7.0]


def test_a_damaged_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1, "kind": "train"}\n{"st\n{"step": 3, "kind": "train"}\n')
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r'line 2 of metrics\.jsonl is damaged'):
        records.Metrics(tmp_path, 3)
    assert path.read_bytes() == before
    (tmp_path / 'manifest.json').write_text('{')
    with pytest.raises(UsageError, match=r'manifest\.json cannot be read'):
        records.add_start(tmp_path / 'manifest.json', 0, {})


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    with records.Metrics(tmp_path, 0) as metrics, pytest.raises(ValueError, match='JSON'):
        metrics.write(1, 'train', loss=float('nan'))
    assert written(tmp_path) == []


@tensorboard_warnings
def test_tensorboard_holds_every_number_and_forgets_what_is_run_again(tmp_path):
    with records.Metrics(tmp_path, 0) as metrics:
        metrics.write(1, 'symmetry', asymmetry=0.5, unique_features={'stem': 3})
        metrics.write(2, 'symmetry', asymmetry=0.25, unique_features={'stem': 4})
    with records.Metrics(tmp_path, 1) as metrics:
        metrics.write(2, 'symmetry', asymmetry=0.125, unique_features={'stem': 5})
    events = EventAccumulator(str(tmp_path / 'tensorboard'))
    events.Reload()
    for tag, values in (
        ('symmetry/asymmetry', [0.5, 0.125]),
        ('symmetry/unique_features.stem', [3, 5]),
    ):
        assert [(e.step, e.value) for e in events.Scalars(tag)] == list(enumerate(values, start=1))


def test_params_sha256_is_over_bytes_in_path_order():
    first, second = np.arange(3, dtype=np.float32), np.array([[1.5, -0.0]], np.float32)
    params = {'b': {'w': jnp.asarray(second)}, 'a': {'z': jnp.asarray(first)}}
    expected = hashlib.sha256(first.tobytes() + second.tobytes()).hexdigest()
    assert records.params_sha256(params) == expected
    assert records.params_sha256({'a': {'z': first}, 'b': {'w': np.abs(second)}}) != expected


def test_json_files_are_replaced_whole(tmp_path):
    path = tmp_path / 'summary.json'
    records.write_json(path, {'step': 1})
    with pytest.raises(ValueError, match='JSON'):
        records.write_json(path, {'step': float('inf')})
    assert json.loads(path.read_text()) == {'step': 1}


def test_the_manifest_keeps_every_start(tmp_path):
    path = tmp_path / 'manifest.json'
    facts = {'execution': {'steps_per_call': 5}, 'dataset': {'train_sha256': 'a'}}
    records.add_start(path, 0, facts)
    records.add_start(path, 7, facts)
    with pytest.raises(UsageError, match='started on other data'):
        records.add_start(path, 9, facts | {'dataset': {'train_sha256': 'b'}})
    manifest = json.loads(path.read_text())
    assert [start['step'] for start in manifest['starts']] == [0, 7]
    assert manifest['execution'] == {'steps_per_call': 5}
    assert {'jax', 'jaxlib', 'flax', 'zerojax'} <= manifest['versions'].keys()
    assert manifest['backend'] == 'cpu'
    assert manifest['device_count'] == 2


@pytest.mark.parametrize('asymmetry', [0.0, 1e-3])
def test_a_figure_is_drawn_with_and_without_asymmetry(tmp_path, asymmetry):
    lines = [
        {'step': s, 'kind': kind, 'loss': 2.0, 'accuracy': 0.1, 'asymmetry': asymmetry}
        for s in (1, 2) for kind in ('train', 'eval')
    ]  # fmt: skip
    draw_run(lines, 1 if asymmetry else None, tmp_path / 'figures' / 'run.png')
    assert (tmp_path / 'figures' / 'run.png').read_bytes().startswith(b'\x89PNG')
