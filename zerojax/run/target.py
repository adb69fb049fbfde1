"""Devices to compile for that need not be here: from the text of --target to JAX's devices."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from zerojax.host.errors import UsageError, first_line
from zerojax.measure.accelerators import GPUS, TPUS, Accelerator
from zerojax.run.checks import host_memory

# Slices as Google rents them, up to 256 chips, and one chip.
_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_DEEP = ('1x1x1', '2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8')
SLICES = {'v4': _DEEP, 'v5e': _FLAT, 'v5p': _DEEP, 'v6e': _FLAT}
MAX_HOSTS, GPUS_OF_HOST = 32, 8

SHARE_OF_GPU = 0.95  # of its memory a process can take; the rest is the driver's and libraries'

# What libtpu reads when it is loaded: where it logs, and what it would ask of its machine.
_NO_TPU_HERE = {
    'TPU_LOG_DIR': 'disabled',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # its lock is for those that use a device
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
}


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is to be compiled for.

    Attributes:
        text: as it was asked for.
        devices: JAX's; unless it is the CPU that is here, nothing can be run on them.
        accelerator: what one of them can do at most; None of CPUs, of which there is no table.
        memory: bytes that a process can take of one of them.
    """

    text: str
    devices: Sequence[Any]
    accelerator: Accelerator | None
    memory: int

    @property
    def backend(self) -> str:
        """'cpu', 'gpu' or 'tpu'."""
        return self.accelerator.backend if self.accelerator else 'cpu'


def find(text: str) -> Target:
    """The target that a text names.

    Args:
        text: 'cpu': JAX's devices on this machine's CPU; 'tpu:KIND:SLICE', such as 'tpu:v5e:4x4';
            'gpu:CARD', 'gpu:CARD:8' (on one host) or 'gpu:CARD:4x8' (four hosts of eight each).

    Raises:
        UsageError: it names nothing that is known, or what compiles for it is not installed.
    """
    parts = text.split(':')
    if parts == ['cpu']:
        devices = jax.devices('cpu')
        return Target(text, devices, None, host_memory() // len(devices))  # they share it
    if parts[0] == 'tpu' and len(parts) == 3:
        return _tpu(text, *parts[1:])
    if parts[0] == 'gpu' and len(parts) in (2, 3):
        return _gpu(text, *parts[1:])
    raise UsageError(
        f'--target={text}: must be cpu, tpu:KIND:SLICE such as tpu:v5e:4x4, or gpu:CARD[:NUMBER] '
        'such as gpu:h100:8'
    )


COMPILERS = {  # packages that compile for a backend, any of which will do; the CPU's is jaxlib
    'cpu': (),
    'gpu': ('jax-cuda12-plugin', 'jax-cuda13-plugin'),
    'tpu': ('libtpu',),
}


def installed_compilers(backend: str) -> list[str]:
    """Those of `COMPILERS` that are installed."""
    return [name for name in COMPILERS[backend] if importlib.util.find_spec(name.replace('-', '_'))]


def _tpu(text: str, kind: str, shape: str) -> Target:
    if kind not in TPUS:
        raise UsageError(f'--target={text}: {kind!r} must be one of {", ".join(TPUS)}')
    if shape not in SLICES[kind]:
        raise UsageError(
            f'--target={text}: slice {shape!r} must be one of {", ".join(SLICES[kind])}'
        )
    if not installed_compilers('tpu'):
        raise UsageError(f"--target={text}: needs libtpu: pip install 'zerojax[tpu]'")
    options: dict[str, Any] = {}
    if math.prod(map(int, shape.split('x'))) == 1:
        options['chips_per_host_bounds'] = (1, 1, 1)
    if kind == 'v4':
        options['chip_config_name'] = 'megacore'  # the two cores of a chip as one device
    with _loading(text):
        devices = topologies.get_topology_desc(f'{kind}:{shape}', 'tpu', **options).devices
    return Target(text, devices, TPUS[kind], TPUS[kind].memory)


def _gpu(text: str, card: str, number: str = '1') -> Target:
    if card not in GPUS:
        raise UsageError(f'--target={text}: {card!r} must be one of {", ".join(GPUS)}')
    found = re.fullmatch(r'(?:(\d{1,9})x)?(\d{1,9})', number, re.ASCII)
    hosts, each = (int(found[1] or 1), int(found[2])) if found else (0, 0)
    if not (1 <= hosts <= MAX_HOSTS and 1 <= each <= GPUS_OF_HOST):
        raise UsageError(
            f'--target={text}: {number!r} must be a number of GPUs from 1 to {GPUS_OF_HOST}, or '
            f'HOSTSxNUMBER with at most {MAX_HOSTS} hosts'
        )
    if not installed_compilers('gpu'):
        raise UsageError(f"--target={text}: needs JAX's CUDA plugin: pip install 'zerojax[gpu]'")
    gpu = GPUS[card]
    shape = f'1x{hosts}x{each}'
    with _loading(text):
        devices = topologies.get_topology_desc(
            shape, 'cuda', topology=shape, target_config=gpu.description()
        ).devices
    return Target(text, devices, gpu, int(SHARE_OF_GPU * gpu.memory))


@contextlib.contextmanager
def _loading(text: str) -> Iterator[None]:
    """Makes a UsageError of what JAX, libtpu or the plugin raise, of whatever type."""
    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    try:
        yield
    except Exception as error:
        reason = first_line(error)
        raise UsageError(
            f'--target={text}: jax {jax.__version__} cannot describe it ({reason}); install the '
            f"versions that belong together, pip install -U 'zerojax[{text.partition(':')[0]}]'"
        ) from error
