"""Checkpoints of the paper's PyTorch code: `.pth.tar` files, in and out. Needs PyTorch."""

import pathlib
import warnings
from typing import Any

import numpy as np

from zerojax.host.errors import UsageError


def _torch(path: pathlib.Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UsageError(f"{path}: needs PyTorch: pip install 'zerojax[torch]'") from error
    return torch


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays (float64) of a checkpoint's 'state_dict', or of a bare state dict, by name.

    The prefix 'module.' of `torch.nn.DataParallel` is taken off. Only tensors and plain containers
    are read (`weights_only`); a file that would execute anything else is refused.

    Raises:
        UsageError: PyTorch is missing, or the file cannot be read, holds something else, or numbers
            that no network can have.
    """
    torch = _torch(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of tensors that are refused below, with their name
            loaded = torch.load(path, map_location='cpu', weights_only=True)
    except OSError as error:
        raise UsageError(f'{path}: cannot be read ({error.strerror})') from error
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
        arrays[name.removeprefix('module.')] = array
    return arrays


def write(path: pathlib.Path, arrays: dict[str, np.ndarray], **facts: Any) -> None:
    """Writes {'state_dict': arrays, **facts}, as the paper's code saves it.

    Raises:
        UsageError: PyTorch is missing, or the file cannot be written.
    """
    torch = _torch(path)
    state_dict = {name: torch.from_numpy(np.array(x)) for name, x in arrays.items()}
    try:
        with open(path, 'wb') as file:
            torch.save({'state_dict': state_dict, **facts}, file)
    except OSError as error:
        raise UsageError(f'{path}: cannot be written ({error.strerror})') from error
