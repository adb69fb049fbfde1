"""What --target names, and what it says if that cannot be had."""

import importlib.util
import math
import re
import types

import jax
import pytest

from zerojax.host.errors import UsageError
from zerojax.measure.accelerators import GPUS, TPUS
from zerojax.run import target


def test_the_cpu_that_is_here():
    found = target.find('cpu')
    assert (found.backend, found.accelerator) == ('cpu', None)
    assert list(found.devices) == jax.devices('cpu')
    assert 0 < found.memory * len(found.devices) < 2**50


@pytest.mark.parametrize(
    'text,message',
    [
        ('', r'--target=: must be cpu, tpu:KIND:SLICE such as tpu:v5e:4x4, or gpu:CARD'),
        ('tpu', r'--target=tpu: must be cpu, '),
        ('tpu:v5e', r'--target=tpu:v5e: must be cpu, '),
        ('cpu:2', r'--target=cpu:2: must be cpu, '),
        ('gpu:h100:8:8', r'must be cpu, '),
        ('tpu:v3:2x2', r"--target=tpu:v3:2x2: 'v3' must be one of v4, v5e, v5p, v6e$"),
        ('tpu:v5e:3x3', r"--target=tpu:v5e:3x3: slice '3x3' must be one of 1x1, 2x2, 2x4, "),
        ('tpu:v4:4x4', r"slice '4x4' must be one of 1x1x1, 2x2x1, "),
        ('tpu:v5e:16x32', r"slice '16x32' must be one of"),
        ('gpu:gtx', r"--target=gpu:gtx: 'gtx' must be one of a100, h100, h200, b200$"),
        ('gpu:h100:0', r"--target=gpu:h100:0: '0' must be a number of GPUs from 1 to 8, or HOSTSx"),
        ('gpu:h100:16', r"'16' must be a number of GPUs from 1 to 8"),
        ('gpu:h100:33x8', r"'33x8' must be .* at most 32 hosts$"),
        ('gpu:h100:٣', r'must be a number of GPUs'),
    ],
)
def test_what_is_no_target_is_refused(text, message):
    with pytest.raises(UsageError, match=message) as raised:
        target.find(text)
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
    'text,extra', [('tpu:v6e:2x2', 'tpu'), ('gpu:a100', 'gpu'), ('gpu:b200:32x8', 'gpu')]
)
def test_a_compiler_that_is_not_installed_is_named_with_what_installs_it(text, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(
        UsageError, match=rf"--target={text}: needs .*: pip install 'zerojax\[{extra}"
    ):
        target.find(text)


@pytest.mark.parametrize('text,extra', [('tpu:v5e:2x2', 'tpu'), ('gpu:h100', 'gpu')])
def test_what_a_compiler_says_of_a_target_is_one_line(text, extra, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError('INVALID_ARGUMENT: unknown\nand much more')

    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
    monkeypatch.setattr(target.topologies, 'get_topology_desc', refuse)
    with pytest.raises(
        UsageError, match=r'cannot describe it \(INVALID_ARGUMENT: unknown\); inst'
    ) as e:
        target.find(text)
    assert re.findall(r'zerojax\[(\w+)\]', str(e.value)) == [extra]


def test_of_a_gpu_s_memory_a_process_can_take_all_but_a_twentieth(monkeypatch):
    described = types.SimpleNamespace(devices=[None])
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
    monkeypatch.setattr(target.topologies, 'get_topology_desc', lambda *_, **__: described)
    assert target.find('gpu:h100').memory == int(0.95 * 81559 * 2**20)
    assert target.find('tpu:v5e:1x1').memory == 16 * 2**30


def test_every_slice_has_at_most_256_chips_and_every_kind_one_of_one():
    assert target.SLICES.keys() == TPUS.keys()
    for shapes in target.SLICES.values():
        numbers = [math.prod(map(int, shape.split('x'))) for shape in shapes]
        assert numbers[0] == 1 and numbers[-1] == 256 and numbers == sorted(numbers)


@pytest.mark.parametrize('gpu', GPUS.values(), ids=GPUS)
def test_a_description_has_each_number_once_in_balanced_braces(gpu):
    """The form that XLA reads; whether it does is seen where JAX's CUDA plugin is installed."""
    text = gpu.description()
    assert text.count('{') == text.count('}') == 3
    info = text[: text.index('platform_name')]
    names = re.findall(r'^  (\w+)[: ]', info, re.M)
    assert len(names) == len(set(names))
    assert f'core_count: {gpu.cores}\n' in text
    assert f'memory_bandwidth: {int(gpu.bandwidth)}\n' in text
    # What the makers' tables say twice: multiply-adds of all float32 units at the boost clock.
    assert 2 * gpu.cores * gpu.units * gpu.clock * 1e9 == pytest.approx(gpu.peaks['f32'], rel=0.08)
