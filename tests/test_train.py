"""Properties of whole runs, in this process."""

import json
import shutil

import numpy as np
import pytest

from zerojax.errors import RunError, UsageError
from zerojax.train import train


def lines(workdir, kind):
    records = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [record for record in records if record['kind'] == kind]


def test_a_run_leaves_what_the_contract_says(tiny_config, tmp_path):
    summary = train(tiny_config, tmp_path)
    assert json.loads((tmp_path / 'summary.json').read_text()) == summary
    assert summary['step'] == 24
    assert summary['broken_at_step'] == 0
    assert summary['asymmetry'] > 0
    assert summary['unique_features']['block1_0/conv'] == 16
    assert summary['eval_accuracy'] == lines(tmp_path, 'eval')[-1]['accuracy']
    assert summary['best_eval_accuracy'] == max(e['accuracy'] for e in lines(tmp_path, 'eval'))
    assert summary['train_loss'] == lines(tmp_path, 'train')[-1]['loss']
    assert [line['step'] for line in lines(tmp_path, 'train')] == [4, 8, 12, 16, 20, 24]
    assert [line['step'] for line in lines(tmp_path, 'eval')] == [0, 8, 16, 24]
    assert [line['step'] for line in lines(tmp_path, 'symmetry')] == [0, 8, 16, 24]
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['model']['depth'] == 7
    assert len(config['dataset']['mean']) == 1, 'what was measured on the data is resolved'
    manifest = json.loads((tmp_path / 'manifest.json').read_text())
    assert manifest['compiler_options'] == {'xla_cpu_experimental_ynn_fusion_type': ''}
    assert manifest['execution']['steps_per_call'] == 5
    assert [start['step'] for start in manifest['starts']] == [0]
    assert (tmp_path / 'figures' / 'run.png').exists()
    assert list((tmp_path / 'tensorboard').iterdir())
    steps = {path.name for path in (tmp_path / 'checkpoints').iterdir() if path.is_dir()}
    assert steps == {'12', '18', '24'}, 'the newest three'

    # The same command on a finished run changes nothing that is a result.
    again = train(tiny_config, tmp_path)
    assert {**again, 'seconds': 0} == {**summary, 'seconds': 0}
    assert [line['step'] for line in lines(tmp_path, 'train')] == [4, 8, 12, 16, 20, 24]

    # A damaged checkpoint is an error and never wrong weights; without it the one before serves.
    for file in (tmp_path / 'checkpoints' / '24').rglob('*'):
        if file.is_file():
            file.write_bytes(b'')
    with pytest.raises(RunError, match=r'checkpoints/24 cannot be read .* remove that folder'):
        train(tiny_config, tmp_path)
    shutil.rmtree(tmp_path / 'checkpoints' / '24')
    assert train(tiny_config, tmp_path)['params_sha256'] == summary['params_sha256']
    assert [line['step'] for line in lines(tmp_path, 'train')] == [4, 8, 12, 16, 20, 24]

    # Killed before the first checkpoint was saved: it starts anew.
    before = (tmp_path / 'metrics.jsonl').read_bytes()
    shutil.rmtree(tmp_path / 'checkpoints')
    assert train(tiny_config, tmp_path)['params_sha256'] == summary['params_sha256']
    assert (tmp_path / 'metrics.jsonl').read_bytes() == before

    # And no other config may use its workdir.
    tiny_config.perturbation.scale = 1e-5
    with pytest.raises(UsageError, match=r'perturbation\.scale is 1e-06 there and 1e-05 here'):
        train(tiny_config, tmp_path)


def test_without_perturbation_symmetry_is_exact_to_the_end(tiny_config, tmp_path):
    tiny_config.perturbation.kind = 'none'
    summary = train(tiny_config, tmp_path)
    assert summary['asymmetry'] == 0.0
    assert set(summary['unique_features'].values()) == {1}
    assert summary['broken_at_step'] is None
    assert all(line['asymmetry'] == 0.0 for line in lines(tmp_path, 'train'))
    assert np.ptp([line['loss'] for line in lines(tmp_path, 'train')]) > 0.05, 'it does train'


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny_config, tmp_path
):
    tiny_config.optimizer.learning_rate = 1e30
    with pytest.raises(RunError, match=r'^step \d: loss, gradient or weights are not finite; .*'):
        train(tiny_config, tmp_path)
    steps = {path.name for path in (tmp_path / 'checkpoints').iterdir() if path.is_dir()}
    assert steps == {'0'}
    assert not (tmp_path / 'summary.json').exists()
    assert lines(tmp_path, 'train') == []


@pytest.mark.parametrize(
    'group,field,value,message',
    [
        ('', 'batch_size', 2000, 'batch_size=2000: must be at most 1437'),
        ('perturbation', 'at_step', 24, 'at_step=24: must be below num_steps=24'),
        ('perturbation', 'layers', 'conv', r"layers='conv': matches no parameter; they are block1"),
        ('dataset', 'mean', (1.0, 2.0), 'must hold 1 numbers'),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_anything_is_written(
    tiny_config, tmp_path, group, field, value, message
):
    if field == 'mean':
        tiny_config.dataset.std = value
    (tiny_config[group] if group else tiny_config)[field] = value
    with pytest.raises(UsageError, match=message):
        train(tiny_config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
