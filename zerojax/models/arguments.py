"""Checks of what `create` is called with: ValueError, `argument=value: what is allowed`."""

from collections.abc import Iterable
from typing import Any


def require(condition: bool, argument: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f'{argument}={value!r}: {allowed}')


def require_one_of(choices: Iterable[str], argument: str, value: str) -> None:
    choices = tuple(choices)
    require(value in choices, argument, value, f'must be one of {", ".join(choices)}')


def require_default(default: Any, argument: str, value: Any, name: str, init: str) -> None:
    """Of an argument that the network `name` has no use for."""
    useless = f'{name} with init {init!r} has no use for it; leave it at {default!r}'
    require(value == default, argument, value, useless)


def require_depth(layers_per_block: int, depth: int) -> None:
    """Three stages of n >= 1 blocks, and 4 layers more."""
    step = 3 * layers_per_block
    examples = ', '.join(str(4 + step * n) for n in (1, 2, 3))
    is_depth = 4 + step <= depth <= 10_000 and (depth - 4) % step == 0
    require(is_depth, 'depth', depth, f'must be {step}n + 4 with n >= 1: {examples}, ... 10000')
