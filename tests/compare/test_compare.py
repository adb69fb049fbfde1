"""The command, on runs of a few steps and on runs made from them."""

import dataclasses
import functools
import gc
import json
import os
import pathlib
import shutil

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax import models
from zerojax.compare import __main__ as compare
from zerojax.compare import report, saved_runs, several
from zerojax.compare.pair import find_parting, same_network
from zerojax.host.checkpoint import Checkpoints
from zerojax.host.workdir import Workdir
from zerojax.run import building, data, train
from zerojax.step.precision import numbers_of
from zerojax.symmetry import alignment
from zerojax.symmetry.orbits import feature_counts


def tiny(**fields):
    """The toy on the digits, perturbed after step 6; checkpoints of steps 6, 7 and 12 are kept."""
    config = config_lib.default_config()
    config.num_steps = 12
    config.log_every_steps = 4
    config.eval_every_steps = 12
    config.checkpoint_every_steps = 12
    config.keep_checkpoints_at = (6, 7)
    config.model.name = 'mlp'
    config.model.init = 'random'
    config.model.width = 16
    config.dataset.name = 'digits'
    config.perturbation.kind = 'gaussian'
    config.perturbation.scale = 0.1
    config.perturbation.at_step = 6
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Workdirs by name; the same folder each time, to be read only."""
    root = tmp_path_factory.mktemp('runs')
    quiet = {'perturbation.kind': 'none', 'perturbation.at_step': 0, 'perturbation.scale': 0.0}
    configs = {'late': tiny(), 'none': tiny(**quiet)}
    with jax.numpy_dtype_promotion('standard'):  # optax's schedule mixes int32 and float
        for name, config in configs.items():
            train.train(config, root / name)
    late = root / 'late'
    run_from(late, root / 'other', noisy, **{'seed': 1, 'perturbation.seed': 1})
    constnet = {
        'model.name': 'constnet', 'model.init': 'averaging', 'model.depth': 7, 'model.width': 1,
        'model.convolution': 'patches',
    }  # fmt: skip
    run_from(late, root / 'constnet', lambda _: constnet_variables(), **constnet)
    return {name: root / name for name in (*configs, 'other', 'constnet')}


def constnet_variables():
    """Those of a network whose features all differ."""
    model = models.create('constnet', depth=7, width=1)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.uniform(0.1, 0.5, x.shape).astype(np.float32), dict(shapes))


def noisy(variables):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x * rng.uniform(0.8, 1.2, x.shape).astype(np.float32), variables)


def run_from(source, workdir, change, **fields):
    """A copy of a run with other fields in its config, and one checkpoint: `change(variables)`."""
    run = saved_runs.read_run(source)
    config = ConfigDict(run.config.to_dict())
    config.update_from_flattened_dict(fields)
    shutil.copytree(source, workdir, ignore=shutil.ignore_patterns('checkpoints', '.lock'))
    (workdir / 'config.json').write_text(json.dumps(config.to_dict()))
    dataset = data.load('digits', None, 'train', 'test')
    with numbers_of(config.param_dtype), jax.numpy_dtype_promotion('standard'):
        model = config_lib.build_model(config, dataset.num_classes)
        new = functools.partial(building.new_state, config, model, dataset.image_shape)
        shapes = jax.eval_shape(new, building.scalars_of(config))
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        variables = jax.tree.map(jnp.asarray, change(run.variables))
        state = dataclasses.replace(state, step=jnp.int32(run.step), **variables)
        with Checkpoints(workdir / 'checkpoints') as checkpoints:
            checkpoints.save(state, seconds=0.0)
            checkpoints.wait()
    return workdir


def command(capsys, *arguments):
    """(exit status, stdout, stderr)"""
    with jax.numpy_dtype_promotion('standard'):  # as BatchNorm in float64 and bfloat16 needs it
        status = compare.main(['compare', *map(str, arguments)])
    output = capsys.readouterr()
    return status, output.out, output.err


def contents(folder: pathlib.Path):
    return {each: each.read_bytes() for each in sorted(folder.rglob('*')) if each.is_file()}


def test_two_runs_part_where_one_is_perturbed(runs, tmp_path, capsys):
    file = tmp_path / 'compare.json'
    before = contents(runs['late'].parent)
    status, out, err = command(capsys, runs['none'], runs['late'], f'--output={file}')
    assert (status, err) == (0, '')
    assert contents(runs['late'].parent) == before, 'it only reads'
    found = json.loads(file.read_text())
    (pair,) = found['pairs']
    assert pair['config'] == {
        'perturbation.at_step': [0, 6],
        'perturbation.kind': ['none', 'gaussian'],
        'perturbation.scale': [0.0, 0.1],
    }
    assert pair['same_network'] and pair['same_training_data']
    parting = pair['parting']
    assert (parting['equal_at'], parting['different_at'], parting['proven']) == (6, 7, True)
    assert parting['equal_checkpoints'] == [6]
    assert parting['differing_checkpoint']['step'] == 7
    assert parting['differing_checkpoint']['tensor'] == 'params/hidden/kernel'
    assert parting['differing_checkpoint']['differing'] == 64 * 16
    assert parting['equal_lines'] == [0, 4]
    assert (parting['differing_line']['step'], parting['differing_line']['kind']) == (8, 'train')
    assert 'after step 6 (equal weights) and by step 7' in out
    assert 'params/hidden/kernel' in out and 'perturbation.at_step 0 | 6' in out
    assert pair['weights']['l2'] > 0.1
    assert pair['weights']['l2_by_stream'].keys() == {'hidden'}
    assert 0.1 < pair['weights']['l2_by_stream']['hidden'] <= pair['weights']['l2']
    assert out.count('streams: hidden broken at 0, asymmetry') == 2, 'its weights start at random'
    assert pair['line']['barrier'] >= 0
    assert list(pair['cka']) == ['hidden']


def test_predictions_are_those_that_the_run_recorded(runs, capsys):
    found = several.compare([runs['none'], runs['late']])
    for each in found['runs']:
        workdir = pathlib.Path(each['workdir'])
        summary = json.loads((workdir / 'summary.json').read_text())
        assert each['accuracy'] == summary['eval_accuracy']
        assert each['params_sha256'] == summary['params_sha256']
        last = [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]
        for name in ('broken_streams', 'asymmetry_by_stream'):
            assert each[name] == summary[name]
        loss = [x['loss'] for x in last if x['kind'] == 'eval'][-1]
        assert each['loss'] == pytest.approx(loss, rel=1e-6)


def test_without_a_common_checkpoint_before_the_metrics_bracket_the_step(runs):
    a, b = (dataclasses.replace(saved_runs.read_run(runs[k]), steps=[12]) for k in ('none', 'late'))
    known = find_parting(a, b, num_classes=10)
    assert (known['equal_at'], known['different_at'], known['proven']) == (4, 8, False)
    b = dataclasses.replace(b, lines=[])
    known = find_parting(a, b, num_classes=10)
    assert (known['equal_at'], known['different_at']) == (None, 12)
    assert known['differing_line'] is None


def test_equal_runs_are_equal_in_all(runs, tmp_path, capsys):
    copy = tmp_path / 'copy'
    shutil.copytree(runs['late'], copy)
    status, out, _ = command(capsys, runs['late'], copy, f'--output={tmp_path / "x.json"}')
    assert status == 0
    found = json.loads((tmp_path / 'x.json').read_text())
    (pair,) = found['pairs']
    assert pair['config'] == {}
    assert pair['parting']['equal_at'] == 12 and pair['parting']['different_at'] is None
    weights, line = pair['weights'], pair['line']
    assert [weights[k] for k in ('l2', 'angle', 'l2_aligned', 'angle_aligned')] == [0, 0, 0, 0]
    assert weights['features_moved'] == 0
    assert line['barrier'] == line['barrier_aligned'] == 0
    assert len(set(line['loss'])) == 1
    assert pair['disagreement'] == 0
    assert all(x == pytest.approx(1, abs=1e-12) for x in pair['cka'].values())
    assert found['ensemble']['gain'] == found['ensemble']['diversity'] == 0
    assert found['ensemble']['variance_on_distribution'] == 0
    assert 'nowhere: equal to step 12' in out


def permuted(run, variables):
    """The variables with all features in another order."""
    axes = saved_runs.network(run, 10).feature_axes()
    rng = np.random.default_rng(0)
    counts = feature_counts(variables['params'], axes['params'])
    orders = {name: rng.permutation(count) for name, count in counts.items()}
    return {k: alignment.permute(x, axes[k], orders) for k, x in variables.items()}


def test_alignment_undoes_a_permutation_of_features(runs, tmp_path):
    run = saved_runs.read_run(runs['constnet'])
    shuffled = run_from(runs['constnet'], tmp_path / 'shuffled', functools.partial(permuted, run))
    found = several.compare([runs['constnet'], shuffled])
    (pair,) = found['pairs']
    weights, line = pair['weights'], pair['line']
    assert weights['l2'] > 0.1 and weights['angle'] > 1
    assert weights['l2_aligned'] == weights['angle_aligned'] == 0
    assert weights['features_moved'] > 100
    assert line['barrier_aligned'] == 0
    assert line['loss_aligned'][0] == line['loss'][0]
    assert line['loss'][-1] == pytest.approx(line['loss'][0], rel=1e-5), 'the same function'
    assert pair['disagreement'] == 0
    assert list(pair['cka']) == ['stem', 'block1_0', 'block2_0', 'block3_0']
    assert all(x == pytest.approx(1, abs=1e-5) for x in pair['cka'].values())


@pytest.mark.parametrize('dtype', ['float64', 'bfloat16'])
def test_runs_of_other_dtypes_keep_them(runs, tmp_path, dtype):
    dtype = jnp.dtype(dtype)
    tiny_step = 2.0 ** -(jnp.finfo(dtype).nmant - 2)

    def to_dtype(variables):
        return jax.tree.map(lambda x: x.astype(dtype), variables)

    def nudged(variables):
        return jax.tree.map(lambda x: (x * (1 + tiny_step)).astype(dtype), to_dtype(variables))

    a = run_from(runs['late'], tmp_path / 'a', to_dtype, param_dtype=str(dtype))
    b = run_from(runs['late'], tmp_path / 'b', nudged, param_dtype=str(dtype))
    with jax.numpy_dtype_promotion('standard'):
        found = several.compare([a, b])
    (pair,) = found['pairs']
    differing = pair['parting']['differing_checkpoint']
    assert differing['tensor'] == 'params/hidden/kernel'
    assert 0 < differing['max_ulps'] <= 8
    norm = np.sqrt(
        sum(
            np.sum(x.astype(np.float64) ** 2)
            for x in jax.tree.leaves(saved_runs.read_run(a).variables['params'])
        )
    )
    assert pair['weights']['l2'] == pytest.approx(tiny_step * norm, rel=0.3)
    assert all(np.isfinite(pair['line']['loss_aligned']))
    single, other = saved_runs.read_run(runs['late']), saved_runs.read_run(a)
    differing = find_parting(single, other, num_classes=10)['differing_checkpoint']
    if dtype == np.float64:
        assert differing is None, 'float64 holds every float32'
    else:
        assert differing['max_ulps'] is None


def test_losses_that_are_not_finite_are_said(runs, tmp_path, capsys):
    huge = run_from(
        runs['late'], tmp_path / 'huge', lambda x: jax.tree.map(lambda w: w * np.float32(1e30), x)
    )
    status, out, err = command(capsys, runs['late'], huge, f'--output={tmp_path / "x.json"}')
    assert (status, err) == (0, '')
    assert 'step 12 of 12, loss not finite' in out
    assert 'loss barrier   not finite; aligned not finite' in out
    (pair,) = json.loads((tmp_path / 'x.json').read_text())['pairs']
    assert pair['line']['loss'][0] > 0 and pair['line']['loss'][-1] is None


def test_several_runs_together(runs, capsys):
    status, out, _ = command(capsys, runs['late'], runs['other'], runs['none'])
    assert status == 0
    assert '1 and 2' in out and '1 and 3' in out and '2 and 3' not in out
    assert 'All 3 runs together' in out
    assert 'the runs differ in more than seeds: perturbation.at_step,' in out
    found = several.compare([runs['late'], runs['other']])['ensemble']
    assert found['varied'] == ['perturbation.seed', 'seed']
    predictions = [
        saved_runs.predict(saved_runs.read_run(runs[k]), data.load('digits', None, 'train', 'test'))
        for k in ('late', 'other')
    ]
    mean = (predictions[0].probabilities + predictions[1].probabilities) / 2
    labels = data.load('digits', None, 'train', 'test').eval.labels
    assert found['ensemble_accuracy'] == np.mean(mean.argmax(-1) == labels)
    accuracies = [np.mean(each.classes == labels) for each in predictions]
    assert found['accuracy_mean'] == pytest.approx(np.mean(accuracies), rel=1e-15)
    assert found['gain'] == pytest.approx(found['ensemble_accuracy'] - np.mean(accuracies))
    assert found['variance_on_test_set'] == pytest.approx(np.diff(accuracies)[0] ** 2 / 2)


def test_different_networks_are_compared_by_their_predictions(runs, tmp_path, capsys):
    file = tmp_path / 'x.json'
    status, out, _ = command(capsys, runs['late'], runs['constnet'], f'--output={file}')
    assert status == 0
    found = json.loads(file.read_text())
    (pair,) = found['pairs']
    assert not pair['same_network']
    assert pair.keys() >= {'disagreement', 'config'}
    assert not pair.keys() & {'weights', 'line', 'cka', 'parting'}
    assert found['ensemble']['variance_on_distribution'] is None
    assert 'network        not the same' in out


def test_another_function_of_the_same_weights_is_another_network(runs):
    run = saved_runs.read_run(runs['constnet'])
    for field, value, same in (
        ('shortcut', 'pre_relu', False),
        ('init', 'random', True),
        ('convolution', 'direct', True),
        ('dropout', 0.5, True),
    ):
        config = ConfigDict(run.config.to_dict())
        config.model[field] = value
        other = dataclasses.replace(run, config=config)
        assert same_network(run, other) is same, field


def test_a_run_in_training_can_be_compared(runs, tmp_path, capsys):
    copy = tmp_path / 'copy'
    shutil.copytree(runs['late'], copy)
    with open(copy / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 16, "kind"')
    (copy / 'summary.json').unlink()
    config = json.loads((copy / 'config.json').read_text())
    with Workdir(copy, config):  # as the process that trains holds it
        status, out, err = command(capsys, runs['late'], copy)
    assert (status, err) == (0, '')
    assert 'nowhere' in out


def test_streams_are_told_as_far_as_they_are_known(runs):
    """Of a run in training by its checkpoint; those of older versions recorded less, or nothing."""

    def told(**known):
        run = dataclasses.replace(saved_runs.read_run(runs['late']), **known)
        described = saved_runs.describe_streams(run)
        return described, report._streams(described)

    described, text = told()
    asymmetry = described['asymmetry_by_stream']['hidden']
    assert described['broken_streams'] == {'hidden': 0}
    assert text == f'hidden broken at 0, asymmetry {asymmetry:.3g}'
    without_lines = {'broken_streams': {'hidden': 0}, 'asymmetry_by_stream': None}
    assert told(lines=[]) == (without_lines, 'hidden broken at 0')
    assert told(broken_streams=None)[1] == f'hidden asymmetry {asymmetry:.3g}'
    nothing = {'broken_streams': None, 'asymmetry_by_stream': None}
    assert told(lines=[], broken_streams=None) == (nothing, 'not recorded')
    assert told(broken_streams={'hidden': -1})[0]['broken_streams'] == {'hidden': 12}
    assert told(lines=[], broken_streams={'hidden': -1})[1] == 'hidden not broken yet'


@flax.struct.dataclass
class OldState:
    """As one that knew no streams, as far as it is read."""

    step: jax.Array
    params: dict
    batch_stats: dict


def test_a_run_of_a_version_that_knew_no_streams_is_compared(runs, tmp_path, capsys):
    old = tmp_path / 'old'
    shutil.copytree(runs['late'], old, ignore=shutil.ignore_patterns('checkpoints', '.lock'))
    lines = [json.loads(line) for line in (old / 'metrics.jsonl').read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.endswith('by_stream')} for line in lines]
    (old / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in kept))
    variables = jax.tree.map(jnp.asarray, saved_runs.read_run(runs['late']).variables)
    with Checkpoints(old / 'checkpoints') as checkpoints:
        checkpoints.save(OldState(jnp.int32(12), **variables), seconds=0.0)
    status, out, err = command(capsys, old, runs['late'], f'--output={tmp_path / "x.json"}')
    assert (status, err) == (0, '')
    assert 'streams: not recorded' in out and 'nowhere: equal to step 12' in out
    known, _ = json.loads((tmp_path / 'x.json').read_text())['runs']
    assert known['broken_streams'] is None and known['asymmetry_by_stream'] is None


def change_json(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture(scope='module')
def damaged_runs(runs, tmp_path_factory):
    """A folder of runs, each with something wrong; to be read only."""
    root = tmp_path_factory.mktemp('damaged')
    os.mkfifo(root / 'pipe')  # or another device, which a file must not replace
    for name in ('good', 'otherdata', 'changed', 'damaged', 'unfinished', 'old', 'facts', 'broken'):
        shutil.copytree(runs['late'], root / name)
    facts = json.loads((root / 'good/manifest.json').read_text())['dataset']
    change_json(root / 'otherdata/manifest.json', dataset=facts | {'eval_sha256': 'of others'})
    change_json(root / 'changed/manifest.json', dataset=facts | {'train_sha256': 'before'})
    (root / 'damaged/config.json').write_text('{')
    shutil.rmtree(root / 'unfinished/checkpoints')
    (root / 'old/metrics.jsonl').write_text('{"step": 0, "kind": "eval"}\n[\n{}\n')
    change_json(root / 'facts/manifest.json', dataset={})
    for file in (root / 'broken/checkpoints/12').rglob('*'):
        if file.is_file() and 'metadata' not in file.name.lower():
            file.write_bytes(b'')
    return root


# Of a damaged checkpoint, Orbax waits for the first read that fails; others may end after its event
# loop has closed.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize(
    'arguments,status,message',
    [
        ([], 2, 'command line: 0 runs; name at least two workdirs'),
        (['good'], 2, 'command line: 1 runs; name at least two workdirs'),
        (['good', 'good', '--colour=red'], 2, "command line: Unknown command line flag 'colour'"),
        (['good', 'nowhere'], 2, 'nowhere: not a folder'),
        (['good', 'good/config.json'], 2, 'good/config.json: not a folder'),
        (['good', 'unfinished'], 2, 'unfinished: holds no finished checkpoint'),
        (['damaged', 'good'], 2, 'damaged/config.json: cannot be read'),
        (['good', 'old'], 2, 'old: holds no run that can be read: metrics.jsonl, line 2: damaged'),
        (['good', 'facts'], 2, "facts: holds no run that can be read: 'train_sha256'"),
        (['good', 'old/../good'], 2, 'good: named twice'),
        (['good', 'otherdata'], 2, 'otherdata: its held-out set is part of another dataset'),
        (['changed', 'good'], 2, "dataset.train_split='train' of digits holds other examples now"),
        (['good', 'good', '--output=no/x.json'], 2, '--output=no/x.json: must be a file in'),
        (['good', 'good', '--output=good'], 2, '--output=good: must be a file in'),
        (['good', 'old', '--output=pipe'], 2, '--output=pipe: must be a file in'),
        (['good', 'broken'], 1, 'broken/checkpoints/12 is damaged'),
    ],
)
def test_mistakes(damaged_runs, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(damaged_runs)
    found, out, err = command(capsys, *arguments)
    assert found == status
    assert message in err and err.startswith('error: ')
    assert err.count('\n') == 1 and out == ''
    gc.collect()


def test_another_training_set_is_said(runs, tmp_path, capsys):
    copy = tmp_path / 'copy'
    shutil.copytree(runs['late'], copy)
    facts = json.loads((copy / 'manifest.json').read_text())['dataset']
    change_json(copy / 'manifest.json', dataset=facts | {'train_sha256': 'of others'})
    status, out, _ = command(capsys, runs['late'], copy)
    assert status == 0
    assert 'training data  not the same' in out
    assert 'not of one network and training set' in out


def test_the_file_behind_a_link_is_written_and_the_link_stays(runs, tmp_path, capsys):
    (tmp_path / 'link').symlink_to(tmp_path / 'file.json')
    status, _, err = command(capsys, *list(runs.values())[:2], f'--output={tmp_path}/link')
    assert (status, err) == (0, '')
    assert (tmp_path / 'link').is_symlink() and json.loads((tmp_path / 'file.json').read_text())


def test_of_one_example_the_variance_on_its_distribution_is_unknown(runs):
    saved = [saved_runs.read_run(runs[name]) for name in ('none', 'late')]
    dataset = data.load('digits', None, 'train', 'test')
    one = data.Split(dataset.eval.images[:1], dataset.eval.labels[:1])
    dataset = dataclasses.replace(dataset, eval=one)
    predictions = [saved_runs.predict(run, dataset) for run in saved]
    found = several.describe_ensemble(saved, predictions, dataset)
    assert found['variance_on_distribution'] is None
    assert found['variance_on_test_set'] is not None
    assert 'unknown on their distribution' in dict(report._ensemble_rows(found))['variance']


def test_help(capsys):
    status, out, _ = command(capsys, '--help')
    assert status == 0
    assert 'python -m zerojax.compare RUN_A RUN_B' in out
