"""Checkpoints of the paper's PyTorch code: `.pth.tar` files, in and out. Needs PyTorch."""

import hashlib
import io
import pathlib
import warnings
from typing import Any, NamedTuple

import numpy as np

from zerojax.host.errors import UsageError

# What `torch.nn.DataParallel` and `torch.compile` put before all names.
PREFIXES = ('module.', '_orig_mod.')


class Saved(NamedTuple):
    """What a checkpoint file holds.

    Attributes:
        arrays: the weights and statistics by name, float64.
        epoch: its 'epoch' (of the paper's code: epochs done), None if there is none.
        sha256: of the file's bytes, from which the above were read.
    """

    arrays: dict[str, np.ndarray]
    epoch: int | None
    sha256: str


def _torch(path: pathlib.Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UsageError(f"{path}: needs PyTorch: pip install 'zerojax[torch]'") from error
    return torch


def load(path: pathlib.Path) -> Saved:
    """Reads a checkpoint with a 'state_dict', or a bare state dict.

    `PREFIXES` that all names share are taken off, however they are nested. Only tensors and plain
    containers are read (`weights_only`); a file that would execute anything else is refused.

    Raises:
        UsageError: PyTorch is missing, or the file cannot be read, holds something else, or numbers
            that no network can have.
    """
    torch = _torch(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f'{path}: cannot be read ({error.strerror})') from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of tensors that are refused below, with their name
            loaded = torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)
    except Exception as error:  # pickle, zip and PyTorch errors
        raise UsageError(
            f'{path}: no PyTorch checkpoint of tensors alone ({type(error).__name__}); '
            'files with other pickled objects are not read'
        ) from error
    state_dict = loaded.get('state_dict', loaded) if isinstance(loaded, dict) else None
    if not isinstance(state_dict, dict) or not all(
        isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in state_dict.items()
    ):
        raise UsageError(f'{path}: holds no state dict of tensors')
    arrays = {}
    for name, x in state_dict.items():
        dense = x.layout == torch.strided and x.device.type == 'cpu' and not x.is_quantized
        # A tensor may claim more numbers than the file holds.
        if not dense or x.is_complex() or x.untyped_storage().nbytes() < x.numel() * x.itemsize:
            raise UsageError(f'{path}: {name} is not a dense tensor of real numbers')
        array = x.detach().double().numpy()
        if not np.isfinite(array).all():
            raise UsageError(f'{path}: {name} holds numbers that are not finite')
        if name.endswith('running_var') and (array < 0).any():
            raise UsageError(f'{path}: {name} holds negative variances')
        arrays[name] = array
    epoch = loaded.get('epoch')
    return Saved(
        _without_prefixes(arrays),
        epoch if type(epoch) is int else None,
        hashlib.sha256(content).hexdigest(),
    )


def _without_prefixes(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for prefix in PREFIXES:
        if arrays and all(name.startswith(prefix) for name in arrays):
            return _without_prefixes({name.removeprefix(prefix): x for name, x in arrays.items()})
    return arrays


def write(path: pathlib.Path, arrays: dict[str, np.ndarray], **facts: Any) -> None:
    """Writes {'state_dict': arrays, **facts}, as the paper's code saves it.

    Floats of less precision than float32, which it does not have, are written as float32.

    Raises:
        UsageError: PyTorch is missing, or the file cannot be written.
    """
    torch = _torch(path)
    state_dict = {
        name: torch.from_numpy(np.array(x, np.float32 if x.dtype.itemsize < 4 else x.dtype))
        for name, x in arrays.items()
    }
    try:
        with open(path, 'wb') as file:
            torch.save({'state_dict': state_dict, **facts}, file)
    except OSError as error:
        raise UsageError(f'{path}: cannot be written ({error.strerror})') from error
