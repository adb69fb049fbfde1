"""PyTorch checkpoints of the paper's code, in and out. Skipped where PyTorch is not installed."""

import hashlib
import json
import pathlib
import pickle

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from zerojax import convert, interop, main, models
from zerojax.host import torch_checkpoint
from zerojax.host.checkpoint import Checkpoints
from zerojax.host.errors import UsageError
from zerojax.run import cli
from zerojax.run.train import train

torch = pytest.importorskip('torch')

pytestmark = pytest.mark.torch

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = pathlib.Path(__file__).parent / 'golden'
LEAKYNET = ['--config.model.name=leakynet', '--config.model.init=1_ii_i1_11']


def golden_arrays(name):
    """Weights of the reference on one-channel images (the digits): the stem's last two cut off."""
    with np.load(GOLDEN / f'{name}.npz') as golden:
        arrays = {
            k.removeprefix('final/'): golden[k] for k in golden.files if k.startswith('final/')
        }
    arrays['conv1.weight'] = arrays['conv1.weight'][:, :1]
    return arrays


def flags(workdir, *more):
    return [
        f'--config={ROOT}/configs/digits.py',
        '--config.num_steps=3',
        f'--workdir={workdir}',
        *more,
    ]


@pytest.mark.parametrize(
    'name,more', [('constnet_d10_w1_scrambled', []), ('leakynet_1_ii_i1_11_scrambled', LEAKYNET)]
)
def test_there_and_back(tmp_path, capsys, name, more):
    arrays = golden_arrays(name)
    file = tmp_path / 'checkpoint.pth.tar'
    state_dict = {f'module.{k}': torch.from_numpy(x) for k, x in arrays.items()}
    torch.save({'epoch': 3, 'state_dict': state_dict, 'best_prec1': torch.tensor(71.0)}, file)
    run = tmp_path / 'run'
    assert convert.main(['convert', 'from-torch', str(file), *flags(run, *more)]) == 0

    back = tmp_path / 'back.pth.tar'
    assert convert.main(['convert', 'to-torch', str(back), f'--workdir={run}']) == 0
    returned = torch_checkpoint.load(back).arrays
    names = {k for k in returned if 'num_batches_tracked' not in k}
    assert names == arrays.keys(), 'as strict load_state_dict wants it'
    model = models.create(**{'name': 'constnet', 'depth': 10, 'width': 1} if not more else {
        'name': 'leakynet', 'depth': 10, 'width': 1, 'init': '1_ii_i1_11',
    })  # fmt: skip
    used = interop.to_reference(interop.from_reference(arrays, model))
    for k in used:
        np.testing.assert_array_equal(returned[k], arrays[k].astype(np.float32), k)

    # The converted run trains on from those weights, with all its records.
    with Checkpoints(run / 'checkpoints') as checkpoints:
        before = flatten_dict(checkpoints.read_variables(0), sep='/')
    np.testing.assert_array_equal(before['params/head/bias'], arrays['fc.bias'].astype(np.float32))
    with jax.numpy_dtype_promotion('standard'):  # optax's schedule mixes int32 and float
        assert main.main(['main', *flags(run, *more)]) == 0
    assert (run / 'summary.json').exists()
    assert '"step": 0, "kind": "eval"' in (run / 'metrics.jsonl').read_text()
    assert convert.main(['convert', 'from-torch', str(file), *flags(run, *more)]) == 2
    assert 'holds a run already' in capsys.readouterr().err


class Evil:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path('executed'),)


def test_pickled_code_is_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': {'fc.bias': Evil()}}, 'zip.pth.tar')
    pathlib.Path('plain.pth.tar').write_bytes(pickle.dumps({'state_dict': Evil()}))
    pathlib.Path('damaged.pth.tar').write_bytes(b'PK\x03\x04 and so on')
    for name in ('zip', 'plain', 'damaged'):
        with pytest.raises(UsageError, match=r'no PyTorch checkpoint of tensors alone'):
            torch_checkpoint.load(pathlib.Path(f'{name}.pth.tar'))
    assert not pathlib.Path('executed').exists()
    with pytest.raises(UsageError, match=r'cannot be read'):
        torch_checkpoint.load(pathlib.Path('missing.pth.tar'))
    torch.save([1, 2], 'list.pth.tar')
    with pytest.raises(UsageError, match='holds no state dict'):
        torch_checkpoint.load(pathlib.Path('list.pth.tar'))


@pytest.mark.parametrize(
    'tensor,message',
    [
        (torch.tensor([1.0, float('nan')]), 'fc.bias holds numbers that are not finite'),
        (torch.zeros(1).expand(2**40), 'fc.bias is not a dense tensor'),
        (torch.zeros(3, dtype=torch.complex64), 'fc.bias is not a dense tensor'),
        (torch.zeros(3).to_sparse(), 'fc.bias is not a dense tensor'),
        (torch.zeros(3, device='meta'), 'fc.bias is not a dense tensor'),
    ],
)
def test_tensors_that_no_network_can_have_are_refused(tmp_path, tensor, message):
    torch.save({'fc.bias': tensor}, tmp_path / 'x.pth.tar')
    with pytest.raises(UsageError, match=message):
        torch_checkpoint.load(tmp_path / 'x.pth.tar')


def test_parameters_and_half_precision_are_read(tmp_path):
    bias = torch.nn.Parameter(torch.tensor([0.5, 1.5], dtype=torch.bfloat16))
    torch.save({'fc.bias': bias}, tmp_path / 'x.pth.tar')
    np.testing.assert_array_equal(
        torch_checkpoint.load(tmp_path / 'x.pth.tar').arrays['fc.bias'], [0.5, 1.5]
    )


@pytest.mark.parametrize('config', ['{', '{}', '{"model": {"name": "mlp", "colour": 3}}'])
def test_a_damaged_config_is_one_line(tmp_path, capsys, config):
    arrays = golden_arrays('constnet_d10_w1')
    file, run = tmp_path / 'checkpoint.pth.tar', tmp_path / 'run'
    torch.save({k: torch.from_numpy(x) for k, x in arrays.items()}, file)
    assert convert.main(['convert', 'from-torch', str(file), *flags(run)]) == 0
    (run / 'config.json').write_text(config)
    assert convert.main(['convert', 'to-torch', str(tmp_path / 'y'), f'--workdir={run}']) == 2
    error = capsys.readouterr().err
    assert f'--workdir={run}: no run of the paper' in error
    assert error.count('\n') == 1


@pytest.mark.parametrize(
    'arguments,message',
    [
        ([], 'needs from-torch or to-torch'),
        (['to-torch', 'x.pth.tar', '--workdir=nowhere'], '--workdir=nowhere: holds no checkpoint'),
        (['to-torch', 'x.pth.tar'], 'to-torch FILE'),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert convert.main(['convert', *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1


def test_another_network_is_refused(tmp_path, capsys):
    arrays = golden_arrays('constnet_d10_w1')
    file = tmp_path / 'checkpoint.pth.tar'
    torch.save({k: torch.from_numpy(x) for k, x in arrays.items()}, file)
    run = flags(tmp_path / 'run', '--config.model.depth=13')
    assert convert.main(['convert', 'from-torch', str(file), *run]) == 2
    assert 'missing among the arrays' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def save(tmp_path, arrays, **facts):
    """A file of the paper's code; a bare state dict without facts."""
    state_dict = {k: torch.from_numpy(np.array(x)) for k, x in arrays.items()}
    file = tmp_path / 'x.pth.tar'
    torch.save({'state_dict': state_dict, **facts} if facts else state_dict, file)
    return file


def from_torch(file, run, *more):
    return convert.main(['convert', 'from-torch', str(file), *flags(run, *more)])


@pytest.mark.parametrize(
    'dtype,optimizer', [('bfloat16', 'sgd'), ('float32', 'radam'), ('float64', 'sgd')]
)
def test_a_converted_run_of_any_precision_trains_and_goes_back(tmp_path, dtype, optimizer):
    arrays = golden_arrays('constnet_d10_w1_scrambled')
    file, run = save(tmp_path, arrays), tmp_path / 'run'
    more = [f'--config.param_dtype={dtype}', f'--config.optimizer.name={optimizer}']
    more += ['--config.optimizer.momentum=0.9', '--config.model.convolution=patches']
    assert from_torch(file, run, *more) == 0
    with Checkpoints(run / 'checkpoints') as checkpoints:
        before = checkpoints.read_variables(0)
    assert {str(x.dtype) for x in jax.tree.leaves(before['params'])} == {dtype}
    statistics = 'float64' if dtype == 'float64' else 'float32'
    assert {str(x.dtype) for x in jax.tree.leaves(before['batch_stats'])} == {statistics}
    bias = before['params']['head']['bias']
    np.testing.assert_array_equal(bias, arrays['fc.bias'].astype(bias.dtype))
    config, workdir = cli.parse_flags(['main', *flags(run, *more)])
    with jax.numpy_dtype_promotion('standard'):
        assert train(config, workdir)['step'] == 3
    assert not (run / 'damaged_checkpoints').exists()
    assert '"step": 0, "kind": "eval"' in (run / 'metrics.jsonl').read_text()
    back = tmp_path / 'back.pth.tar'
    assert convert.main(['convert', 'to-torch', str(back), f'--workdir={run}']) == 0
    with Checkpoints(run / 'checkpoints') as checkpoints:
        after = checkpoints.read_variables(3)
    np.testing.assert_array_equal(
        torch_checkpoint.load(back).arrays['fc.bias'],
        after['params']['head']['bias'].astype(np.float64),
    )


@pytest.mark.parametrize(
    'prefix', ['module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.', 'module.' * 2]
)
def test_prefixes_that_all_names_share_are_taken_off(tmp_path, prefix):
    arrays = golden_arrays('constnet_d10_w1')
    named = {f'{prefix}{k}': x for k, x in arrays.items()}
    assert torch_checkpoint.load(save(tmp_path, named)).arrays.keys() == arrays.keys()
    named['n_averaged'] = np.zeros(())
    assert torch_checkpoint.load(save(tmp_path, named)).arrays.keys() == named.keys()


def test_a_state_dict_of_nothing_is_read(tmp_path, capsys):
    assert torch_checkpoint.load(save(tmp_path, {}, epoch=1)).arrays == {}
    assert from_torch(tmp_path / 'x.pth.tar', tmp_path / 'run') == 2
    assert 'missing among the arrays' in capsys.readouterr().err


@pytest.mark.parametrize(
    'name,value,message',
    [
        ('block1.layer.2.conv.weight', np.zeros((16, 16, 3, 3)), 'the depth of these may be 13'),
        ('block3.layer.5.bn.num_batches_tracked', np.zeros(()), 'the depth of these may be 22'),
        ('block1.layer.1.scale', np.full(1, 0.9), 'block1.layer.1.scale: holds 0.9, must be 1.0'),
        ('block2.layer.0.biases.1', np.full(1, 1e-9), 'biases.1: holds 1e-09, must be 0.0'),
        ('conv2.weight', np.zeros(3), 'conv2.weight: a ConstNet of depth 10 has no such array'),
        ('block1.layer.0.conv_res.weight', np.zeros((16, 16, 1, 1)), 'has no such array'),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, capsys, name, value, message):
    file = save(tmp_path, golden_arrays('constnet_d10_w1') | {name: value})
    assert from_torch(file, tmp_path / 'run') == 2
    error = capsys.readouterr().err
    assert f'{file}: {name}: ' in error
    assert message in error
    assert error.count('\n') == 1
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('epoch', [{'epoch': 7}, {}, {'epoch': 'last'}])
def test_where_the_weights_came_from_is_kept(tmp_path, epoch):
    file, run = save(tmp_path, golden_arrays('constnet_d10_w1'), **epoch), tmp_path / 'run'
    assert from_torch(file, run) == 0
    origin = json.loads((run / 'origin.json').read_text())
    assert origin == {
        'file': 'x.pth.tar',
        'sha256': hashlib.sha256(file.read_bytes()).hexdigest(),
        'epoch': 7 if epoch == {'epoch': 7} else None,
    }
    if epoch == {'epoch': 7}:
        with jax.numpy_dtype_promotion('standard'):
            for _ in range(2):
                assert main.main(['main', *flags(run)]) == 0
        assert json.loads((run / 'origin.json').read_text()) == origin


def unequal(arrays, name):
    changed = np.array(arrays[name])
    changed.flat[0] += 0.5
    return arrays | {name: changed}


@pytest.mark.parametrize(
    'change',
    [
        None,
        'conv1.weight',
        'fc.weight',
        'block2.layer.1.bn.bias',
        'block3.layer.0.bn.running_var',
        'block1.layer.0.bn.running_mean',
    ],
)
def test_projection_is_refused_for_weights_that_it_would_destroy(tmp_path, capsys, change):
    """And for statistics, which it overwrites as well."""
    with np.load(GOLDEN / 'constnet_d10_w1.npz') as golden:
        arrays = {k.removeprefix('init/'): golden[k] for k in golden if k.startswith('init/')}
    arrays['conv1.weight'] = arrays['conv1.weight'][:, :1]
    file = save(tmp_path, unequal(arrays, change) if change else arrays)
    run = tmp_path / 'run'
    assert from_torch(file, run, '--config.symmetry.project=True') == (2 if change else 0)
    assert ('symmetry.project=True: the features in' in capsys.readouterr().err) == bool(change)
    assert run.exists() == (change is None)
    assert from_torch(file, tmp_path / 'without') == 0


@pytest.mark.parametrize('init,factor', [('averaging', 1), ('random', 0)])
def test_what_training_would_refuse_is_refused_before_anything_is_written(
    tmp_path, capsys, init, factor
):
    """A perturbation of weights that are 0 at step 0: in the config's network or in the file."""
    arrays = golden_arrays('constnet_d10_w1_scrambled')
    arrays['block1.layer.0.conv.weight'] *= factor
    perturbation = ['kind=one_weight', 'layers=block1_0/conv']
    more = [f'--config.perturbation.{each}' for each in perturbation]
    more.append(f'--config.model.init={init}')
    assert from_torch(save(tmp_path, arrays), tmp_path / 'run', *more) == 2
    assert 'chooses 0 weights that are not 0' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'dtype,largest', [('bfloat16', 1e38), ('float32', 1e38), ('float64', 1e300)]
)
def test_numbers_too_large_for_the_run_are_refused(tmp_path, capsys, dtype, largest):
    arrays = golden_arrays('constnet_d10_w1')
    for number, status in ((largest, 0), (1e39, 0 if dtype == 'float64' else 2)):
        file = save(tmp_path, arrays | {'fc.bias': np.full(10, number)})
        run = tmp_path / f'{number}'
        assert from_torch(file, run, f'--config.param_dtype={dtype}') == status
        assert run.exists() == (status == 0)
    assert ('fc.bias is too large for param_dtype' in capsys.readouterr().err) == (status == 2)
