"""Properties of whole runs, in this process."""

import gc
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from zerojax.config import build_perturbation, default_config
from zerojax.host.checkpoint import Checkpoints
from zerojax.host.errors import RunError, UsageError
from zerojax.host.hashes import params_sha256
from zerojax.run import building, checks, data, program, recorder
from zerojax.run.train import train
from zerojax.step import make_train_step, precision
from zerojax.step.batch import normalize


def lines(workdir, kind):
    records = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [record for record in records if record['kind'] == kind]


def test_a_run_leaves_what_the_contract_says(tiny_config, tmp_path, capsys):
    programs = program.Programs()
    summary = train(tiny_config, tmp_path, programs)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith('step')]
    assert ['broken 0/3' in shown[0], *('broken 3/3' in line for line in shown[1:])] == [True] * 4
    assert max(map(len, shown)) <= 100
    assert json.loads((tmp_path / 'summary.json').read_text()) == summary
    assert summary['step'] == 24
    assert summary['broken_at_step'] == 0
    assert summary['asymmetry'] > 0
    assert summary['unique_features']['block1_0/conv'] == 16
    streams = {'stem': 16, 'block2_0': 32, 'block3_0': 64}
    assert summary['unique_features_by_stream'] == streams
    assert summary['broken_streams'] == dict.fromkeys(streams, 0)
    assert max(summary['asymmetry_by_stream'].values()) == summary['asymmetry']
    symmetric, *_, broken = lines(tmp_path, 'symmetry')
    assert symmetric['unique_features_by_stream'] == dict.fromkeys(streams, 1)
    assert symmetric['distance_by_stream'] == dict.fromkeys(streams, 0.0)
    for name in ('asymmetry_by_stream', 'unique_features_by_stream'):
        assert broken[name] == summary[name]
    assert all(broken['distance_by_stream'][stream] > 0 for stream in streams)
    assert summary['eval_accuracy'] == lines(tmp_path, 'eval')[-1]['accuracy']
    assert summary['best_eval_accuracy'] == max(e['accuracy'] for e in lines(tmp_path, 'eval'))
    assert summary['train_loss'] == lines(tmp_path, 'train')[-1]['loss']
    assert [line['step'] for line in lines(tmp_path, 'train')] == [4, 8, 12, 16, 20, 24]
    assert [line['step'] for line in lines(tmp_path, 'eval')] == [0, 8, 16, 24]
    assert [line['step'] for line in lines(tmp_path, 'symmetry')] == [0, 8, 16, 24]
    assert [line['step'] for line in lines(tmp_path, 'layers')] == [0, 8, 16, 24]
    first, last = lines(tmp_path, 'layers')[0], lines(tmp_path, 'layers')[-1]
    assert set(last) == {
        'step', 'kind', 'forward_correlation', 'backward_correlation', 'diversity', 'signal',
        'feature_variance', 'effective_width', 'unique_activations', 'gradient',
        'gradient_variance',
    }  # fmt: skip
    assert set(last['signal']) == {'stem', 'block1_0', 'block2_0', 'block3_0'}
    assert first['unique_activations'] == dict.fromkeys(first['signal'], 1)
    assert last['unique_activations']['block3_0'] == 64
    assert first['diversity'] is None, 'minus infinity'
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
    again = train(tiny_config, tmp_path, programs)
    assert {**again, 'seconds': 0} == {**summary, 'seconds': 0}
    assert [line['step'] for line in lines(tmp_path, 'train')] == [4, 8, 12, 16, 20, 24]

    # Killed before the first checkpoint was saved: it starts anew.
    before = (tmp_path / 'metrics.jsonl').read_bytes()
    shutil.rmtree(tmp_path / 'checkpoints')
    assert train(tiny_config, tmp_path, programs)['params_sha256'] == summary['params_sha256']
    assert (tmp_path / 'metrics.jsonl').read_bytes() == before

    # And no other config may use its workdir.
    tiny_config.perturbation.scale = 1e-5
    with pytest.raises(UsageError, match=r'perturbation\.scale is 1e-06 there and 1e-05 here'):
        train(tiny_config, tmp_path)


@pytest.mark.parametrize(
    'broken_streams,expected',
    [
        ({'stem': 0, 'block2_0': 0}, 'symmetry broken: at step 0 (stem, block2_0)'),
        ({'a': 12, 'b': None, 'c': 3}, 'symmetry broken: at step 3 (c), at step 12 (a), never (b)'),
        ({'a': None, 'b': None}, 'symmetry broken: never (a, b)'),
        ({f'block{i}_0': i for i in range(100)}, 'symmetry broken: at step 0 (block0_0), at step'),
    ],
)
def test_the_end_of_a_run_says_what_came_of_it(broken_streams, expected):
    summary = {
        'step': 700, 'eval_accuracy': 0.98061, 'best_eval_accuracy': 0.98333,
        'asymmetry': 1.0784321, 'broken_streams': broken_streams,
    }  # fmt: skip
    first, *symmetry, last = recorder.outcome(summary, pathlib.Path('runs/x'), drawn=True)
    assert first == 'held-out accuracy 0.9806 after step 700, best 0.9833; asymmetry 1.078'
    assert ' '.join(symmetry).startswith(expected)
    assert last == 'runs/x/summary.json, figures/run.png'
    assert len(symmetry) <= 2
    assert max(map(len, (first, *symmetry, last))) <= 100
    assert recorder.outcome(summary, pathlib.Path('x'), drawn=False)[-1] == 'x/summary.json'


def test_streams_break_when_their_gradient_is_taken_or_with_the_last_update():
    asymmetry = {'a': 0.5, 'b': 0.0, 'c': 0.5, 'd': 0.0}
    remembered = {'a': np.int32(3), 'b': np.int32(0), 'c': np.int32(-1), 'd': np.int32(-1)}
    expected = {'a': 3, 'b': 0, 'c': 9, 'd': None}
    assert recorder.when_broken(remembered, asymmetry, step=9) == expected


@pytest.fixture
def toy_config(tiny_config):
    """The same with the network that compiles in a moment, where any network will do."""
    tiny_config.model.name, tiny_config.model.width = 'mlp', 20
    return tiny_config


def damage(folder, change):
    for file in folder.rglob('*'):
        if file.is_file():
            file.write_bytes(change(file.read_bytes()))


def test_nothing_is_copied_between_host_and_device_in_a_call_of_the_train_steps(
    toy_config, tmp_path, monkeypatch
):
    """Data, order of the epoch, scalars and count are on the device, the state stays there."""
    calls = []
    compile_train_steps = program.Program.compile_train_steps

    def guarded(self, *arguments):
        executable = compile_train_steps(self, *arguments)

        def call(*arguments):
            calls.append(arguments)
            with jax.transfer_guard('disallow_explicit'):
                return executable(*arguments)

        return call

    monkeypatch.setattr(program.Program, 'compile_train_steps', guarded)
    train(toy_config, tmp_path)
    assert len(calls) > 5
    guard = jax.transfer_guard('disallow_explicit')
    with guard, pytest.raises(jax.errors.JaxRuntimeError, match='Disallowed host-to-device'):
        jax.jit(lambda x: x + 1)(np.int32(1))


# Of a damaged checkpoint, Orbax waits for the first read that fails; others may end after its event
# loop has closed.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_serves(toy_config, tmp_path, capsys):
    programs = program.Programs()
    summary = train(toy_config, tmp_path, programs)
    metrics = (tmp_path / 'metrics.jsonl').read_bytes()
    damage(tmp_path / 'checkpoints' / '24', lambda content: b'')
    capsys.readouterr()
    assert train(toy_config, tmp_path, programs)['params_sha256'] == summary['params_sha256']
    assert (tmp_path / 'metrics.jsonl').read_bytes() == metrics
    output = capsys.readouterr().out
    assert re.search(r'checkpoints/24 is damaged .*; moved to \S+/damaged_checkpoints/24', output)
    assert 'RESUMING at step 18 of 24' in output
    assert (tmp_path / 'damaged_checkpoints' / '24').is_dir()

    for step in (12, 18, 24):
        damage(tmp_path / 'checkpoints' / str(step), lambda content: content[: len(content) // 2])
    with pytest.raises(
        RunError, match=r'/24 is damaged .*/12 is damaged .* none is left .* move \S+ away'
    ):
        train(toy_config, tmp_path, programs)
    steps = {path.name for path in (tmp_path / 'checkpoints').iterdir() if path.is_dir()}
    assert steps == {'12', '18', '24'}, 'nothing was taken away'
    gc.collect()


def test_without_perturbation_symmetry_is_exact_to_the_end(tiny_config, tmp_path):
    tiny_config.perturbation.kind = 'none'
    summary = train(tiny_config, tmp_path)
    assert summary['asymmetry'] == 0.0
    assert set(summary['unique_features'].values()) == {1}
    assert summary['broken_at_step'] is None
    assert set(summary['broken_streams'].values()) == {None}
    assert set(summary['unique_features_by_stream'].values()) == {1}
    assert set(summary['asymmetry_by_stream'].values()) == {0.0}
    assert all(line['asymmetry'] == 0.0 for line in lines(tmp_path, 'train'))
    assert np.ptp([line['loss'] for line in lines(tmp_path, 'train')]) > 0.05, 'it does train'


@pytest.mark.parametrize('at_step,broken', [(22, 23), (23, 24)])
def test_noise_on_gradients_breaks_the_symmetry_of_the_step_after_it(
    toy_config, tmp_path, at_step, broken
):
    """Also where that step is never taken, as the run is at its end."""
    toy_config.perturbation.kind, toy_config.perturbation.at_step = 'gradient', at_step
    summary = train(toy_config, tmp_path)
    assert summary['broken_streams'] == {'hidden': broken}
    assert summary['broken_at_step'] == broken


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    toy_config, tmp_path
):
    toy_config.optimizer.learning_rate = 1e30
    with pytest.raises(RunError, match=r'^step \d: loss, gradient or weights are not finite; .*'):
        train(toy_config, tmp_path)
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
        ('', 'num_epochs', 2**31 - 1, r'num_epochs=\d+: are 23622320117 steps; must be at most'),
        ('model', 'width', 2**20, r'width=1048576, .*: [\d,]+ weights .* [\d,.]+ GiB of memory'),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_anything_is_written(
    tiny_config, tmp_path, group, field, value, message
):
    if field == 'mean':
        tiny_config.dataset.std = value
    if field == 'num_epochs':
        tiny_config.num_steps = None
    (tiny_config[group] if group else tiny_config)[field] = value
    with pytest.raises(UsageError, match=message):
        train(tiny_config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def other_network(config, name):
    with config.ignore_type():
        config.model.update(
            {
                'leakynet': {'name': 'leakynet', 'init': '1_i_i_i'},
                'mlp': {'name': 'mlp', 'init': 'random', 'unique_features': 2, 'width': 20},
                'fixup': {'name': 'wideresnet', 'init': 'fixup', 'depth': 10},
            }[name]
        )


@pytest.mark.parametrize(
    'name',
    [
        pytest.param('leakynet', marks=pytest.mark.slow), 'mlp',
        pytest.param('fixup', marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_every_network_trains(tiny_config, tmp_path, name):
    other_network(tiny_config, name)
    summary = train(tiny_config, tmp_path)
    evals = lines(tmp_path, 'eval')
    assert summary['step'] == 24
    assert evals[-1]['loss'] < evals[0]['loss']


@pytest.mark.slow
def test_the_papers_options_together(toy_config):
    """Each of them acts: without it the weights are others after two steps."""
    toy_config.dataset.augment = True

    def params_after(**changes):
        config = toy_config.copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        programs = program.Programs()
        dataset = programs.dataset(config)
        built = programs.program(checks.resolve(config, dataset), dataset, None)
        scalars = building.scalars_of(config)
        state = built.initial_state(scalars)
        source = built.source(state, scalars, epoch=0)
        for _ in range(2):
            state, _ = built.train_steps(state, source, np.int32(1))
        return params_sha256(jax.device_get(state.params))

    everything = {
        'dataset.cutout': 3, 'dataset.mixup': 1.0, 'optimizer.name': 'radam',
        'optimizer.freeze': 'hidden/bias',
    }  # fmt: skip
    with jax.numpy_dtype_promotion('standard'):  # RAdam's schedule multiplies int32 by float
        hashes = [params_after(**everything)]
        for left_out in everything:
            hashes.append(params_after(**{k: x for k, x in everything.items() if k != left_out}))
    assert len(set(hashes)) == len(hashes)


def variables(workdir, step):
    with Checkpoints(workdir / 'checkpoints') as checkpoints:
        return flatten_dict(checkpoints.read_variables(step), sep='/')


def test_frozen_layers_stay_as_they_start_and_the_others_do_not(tiny_config, tmp_path):
    """Also where a perturbation of all weights comes again and again."""
    tiny_config.perturbation.every = 3
    tiny_config.optimizer.freeze = r'block1_0|.*/shortcut'
    tiny_config.keep_checkpoints_at = (0,)
    train(tiny_config, tmp_path)
    before, after = variables(tmp_path, 0), variables(tmp_path, 24)
    for path, x in before.items():
        frozen = path.startswith('params/block1_0') or 'shortcut' in path
        assert (x == after[path]).all() == frozen, path


@pytest.mark.slow
def test_a_lottery_ticket_is_pruned_rewound_and_stays_pruned(tiny_config, tmp_path):
    tiny_config.keep_checkpoints_at = (0, 5)
    other_network(tiny_config, 'mlp')
    tiny_config.perturbation.kind = 'none'
    train(tiny_config, tmp_path / 'dense')
    trained, early = variables(tmp_path / 'dense', 24), variables(tmp_path / 'dense', 5)

    tiny_config.pruning.source = str(tmp_path / 'dense')
    tiny_config.pruning.fraction = 0.8
    tiny_config.pruning.rewind_step = 5
    tiny_config.perturbation.kind = 'gaussian'  # at step 0; it must not revive what is pruned
    # Stopped and resumed on the way; by then the source is not needed any more.
    tiny_config.num_steps = 12
    train(tiny_config, tmp_path / 'ticket')
    start, end = variables(tmp_path / 'ticket', 0), variables(tmp_path / 'ticket', 12)
    path = 'params/hidden/kernel'
    removed = end[path] == 0
    for name, x in start.items():
        expected = np.where(removed, 0, early[name]) if name == path else early[name]
        np.testing.assert_array_equal(x, expected, name)
    assert removed.sum() == int(0.8 * removed.size)
    assert np.abs(trained[path][removed]).max() <= np.abs(trained[path][~removed]).min()
    assert (end['params/head/kernel'] != 0).all()

    tiny_config.pruning.mask = 'random'
    train(tiny_config, tmp_path / 'control')
    random = variables(tmp_path / 'control', 12)[path] == 0
    assert random.sum() == removed.sum()
    assert (random != removed).any()

    shutil.rmtree(tmp_path / 'dense')
    shutil.rmtree(tmp_path / 'ticket' / 'checkpoints' / '12')
    tiny_config.pruning.mask = 'magnitude'
    train(tiny_config, tmp_path / 'ticket')
    again = variables(tmp_path / 'ticket', 12)
    for path, x in again.items():
        np.testing.assert_array_equal(x, end[path], path)


@pytest.mark.parametrize(
    'change,message',
    [
        ({'pruning.source': 'nowhere'}, r"pruning\.source='nowhere': holds no finished run"),
        ({'pruning.rewind_step': 7}, r'pruning\.rewind_step=7: .*keeps checkpoints of the steps'),
        ({'model.width': 2}, r'pruning\.source=.* another network'),
        ({'pruning.layers': 'conv'}, r"pruning\.layers='conv': matches no parameter"),
        ({'optimizer.freeze': 'conv'}, r"optimizer\.freeze='conv': matches no parameter"),
        ({'dataset.cutout': 9}, r'dataset\.cutout=9: must be at most 8'),
        ({'keep_checkpoints_at': (4,)}, r'keep_checkpoints_at=\(4,\): must be at most num_steps=3'),
        (
            {'symmetry.project': True, 'model.init': 'he', 'pruning.source': ''},
            'project=True: constnet with init',
        ),
        ({'symmetry.project': True}, r'symmetry\.project=True: .* pruning\.source='),
        (
            {
                'perturbation.kind': 'gaussian',
                'perturbation.layers': 'stem',
                'optimizer.freeze': 'stem|head',
            },
            r"optimizer\.freeze='stem\|head': freezes all that perturbation\.layers='stem' chooses",
        ),
        (
            {
                'perturbation.kind': 'gradient',
                'perturbation.layers': 'head',
                'optimizer.freeze': 'head',
            },
            r"optimizer\.freeze='head': freezes all that perturbation\.layers='head' chooses",
        ),
        (
            {
                'perturbation.kind': 'order',
                'perturbation.scale': 0.0,
                'perturbation.layers': 'stem',
                'optimizer.freeze': 'stem',
            },
            r"optimizer\.freeze='stem': freezes all that perturbation\.layers='stem' chooses",
        ),
        (
            {
                'perturbation.kind': 'ulp',
                'perturbation.scale': 0.0,
                'perturbation.layers': 'stem|.*conv',
                'optimizer.freeze': 'stem',
            },
            r"perturbation\.layers='stem\|\.\*conv': chooses 0 weights that are not 0",
        ),
        (
            {
                'perturbation.kind': 'ulp',
                'perturbation.scale': 0.0,
                'perturbation.layers': '.*conv',
            },
            r"perturbation\.layers='\.\*conv': chooses 0 weights that are not 0 .* needs 1",
        ),
        (
            {'perturbation.kind': 'dropout', 'perturbation.layers': 'head'},
            r"perturbation\.layers='head': matches no layer .* kernels are block1_0/conv/kernel",
        ),
        (
            {
                'perturbation.kind': 'order',
                'perturbation.scale': 0.0,
                'perturbation.layers': 'head/bias',
            },
            r"perturbation\.layers='head/bias': matches no kernel; they are block1_0/conv/kernel",
        ),
    ],
)
def test_what_cannot_be_pruned_or_frozen_is_refused(dense, tiny_config, tmp_path, change, message):
    tiny_config.num_steps = 3
    tiny_config.update_from_flattened_dict({'pruning.source': str(dense), **change})
    with pytest.raises(UsageError, match=message):
        train(tiny_config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('dense')
    config = default_config()
    config.num_steps = 3
    config.model.depth = 7
    config.model.width = 1
    config.model.convolution = 'patches'
    config.dataset.name = 'digits'
    train(config, workdir)
    return workdir


def test_weights_that_are_not_finite_at_the_start_are_an_error(toy_config, tmp_path):
    toy_config.num_steps = 2
    toy_config.perturbation.scale = 1e38
    toy_config.perturbation.layers = 'head'
    with pytest.raises(RunError, match=r'^step [012]: .* not finite'):
        train(toy_config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bfloat16', 'float64'])
def test_a_run_of_another_precision_resumes_to_the_same_weights(tiny_config, tmp_path, dtype):
    tiny_config.param_dtype = dtype
    tiny_config.model.name, tiny_config.num_steps = 'mlp', 12
    first = train(tiny_config, tmp_path)
    with precision.numbers_of(dtype):
        assert {str(x.dtype) for x in variables(tmp_path, 12).values()} == {dtype}
    shutil.rmtree(tmp_path / 'checkpoints' / '12')
    assert train(tiny_config, tmp_path)['params_sha256'] == first['params_sha256']
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize('steps_per_call', [1, 5])
def test_a_kept_last_batch_is_an_update_of_its_own_size(toy_config, tmp_path, steps_per_call):
    """Two epochs of 500, 500 and 437 digits, as a plain loop over them; and resumed before any."""
    toy_config.num_steps, toy_config.num_epochs = None, 2
    toy_config.batch_size, toy_config.dataset.last_batch = 500, 'keep'
    toy_config.steps_per_call = steps_per_call
    toy_config.log_every_steps = toy_config.checkpoint_every_steps = 1
    programs = program.Programs()
    summary = train(toy_config, tmp_path, programs)
    assert summary['step'] == 6

    dataset = programs.dataset(toy_config)
    config = checks.resolve(toy_config, dataset)
    built = programs.program(config, dataset, None)
    scalars = building.scalars_of(config)
    tx = building.build_optimizer(config, scalars)
    train_step = make_train_step(
        built.model, tx, perturbation=build_perturbation(config), orbits=built.orbits
    )
    state, losses, sizes = built.initial_state(scalars), [], []
    for epoch in range(2):
        order = np.asarray(built.source(state, scalars, epoch).order)
        for start in range(0, len(order), 500):
            chosen = order[start : start + 500]
            images = normalize(dataset.train.images[chosen], *data.normalization(config))
            state, metrics = train_step(
                state, {'image': images, 'label': dataset.train.labels[chosen]}
            )
            losses.append(float(metrics['loss']))
            sizes.append(len(chosen))
    assert sizes == [500, 500, 437] * 2
    recorded = [line['loss'] for line in lines(tmp_path, 'train')]
    np.testing.assert_allclose(recorded, losses, rtol=1e-5)

    for last_kept in (5, 4):  # before the small batch, and before what is before it
        for number in range(last_kept, 7):
            shutil.rmtree(tmp_path / 'checkpoints' / str(number), ignore_errors=True)
        again = train(toy_config, tmp_path, programs)
        assert again['params_sha256'] == summary['params_sha256']


def test_a_last_batch_that_devices_cannot_share_is_refused(toy_config, tmp_path):
    toy_config.dataset.last_batch, toy_config.mesh.data = 'keep', 2
    with pytest.raises(UsageError, match=r"last_batch='keep': .* 29 examples, which mesh\.data=2"):
        train(toy_config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
