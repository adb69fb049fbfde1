"""PyTorch checkpoints of the paper's code, in and out. Skipped where PyTorch is not installed."""

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

torch = pytest.importorskip('torch')

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
    returned = torch_checkpoint.read(back)
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
            torch_checkpoint.read(pathlib.Path(f'{name}.pth.tar'))
    assert not pathlib.Path('executed').exists()
    with pytest.raises(UsageError, match=r'cannot be read'):
        torch_checkpoint.read(pathlib.Path('missing.pth.tar'))
    torch.save([1, 2], 'list.pth.tar')
    with pytest.raises(UsageError, match='holds no state dict'):
        torch_checkpoint.read(pathlib.Path('list.pth.tar'))


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
        torch_checkpoint.read(tmp_path / 'x.pth.tar')


def test_parameters_and_half_precision_are_read(tmp_path):
    bias = torch.nn.Parameter(torch.tensor([0.5, 1.5], dtype=torch.bfloat16))
    torch.save({'fc.bias': bias}, tmp_path / 'x.pth.tar')
    np.testing.assert_array_equal(
        torch_checkpoint.read(tmp_path / 'x.pth.tar')['fc.bias'], [0.5, 1.5]
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
