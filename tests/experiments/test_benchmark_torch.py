"""The network that is timed in PyTorch is the one that is timed here. Skipped without PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.performance.measuring import Row
from zerojax import interop, models

torch = pytest.importorskip('torch')
from experiments.performance import benchmark_torch  # noqa: E402  # it imports PyTorch

pytestmark = pytest.mark.torch


def test_it_computes_what_constnet_does():
    ours = models.create('constnet', depth=10, width=2, init='random')
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    variables = ours.init(jax.random.key(0), jnp.asarray(images), train=False)
    head = np.random.default_rng(1).normal(size=(128, 10)).astype(np.float32)
    variables['params']['head']['kernel'] = jnp.asarray(head)
    theirs = benchmark_torch.ConstNet(depth=10, width=2, channels=3)
    # The names of the paper's code in the order of its layers, which is also that of these.
    arrays = interop.to_reference(variables)
    names = {'conv1': 'stem', 'fc': 'head'}
    numbers = {f'block{i + 1}.layer.{j}': 2 * i + j for i in range(3) for j in range(2)}
    state = theirs.state_dict()
    for name, array in arrays.items():
        layer, _, leaf = name.rpartition('.')
        if layer in names:
            target = f'{names[layer]}.{leaf}'
        else:
            block, _, part = layer.rpartition('.')
            part = {'conv_res': 'shortcut'}.get(part, part)
            target = f'blocks.{numbers[block]}.{part}.{leaf}'
        assert state[target].shape == array.shape
        state[target] = torch.from_numpy(np.array(array))
    theirs.load_state_dict(state)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    expected, _ = ours.apply(variables, jnp.asarray(images), train=True, mutable=['batch_stats'])
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3 * np.abs(logits).max())


def test_a_row_is_measured(monkeypatch):
    monkeypatch.setattr(benchmark_torch, 'SECONDS', 0.0)
    row = Row(7, 1, 8, 1, batch_size=4, precision='float32')
    found = benchmark_torch.measure(row, repetitions=1, compiled=False)
    assert 0 < found['train']['least'] <= found['train']['median'] <= found['train']['most']
