"""The noise of a computation's own: what the same program gives when it is run or compiled again.

The lowest storey of the audit: it compares numbers, and works for any function of any JAX user.
Differences are counted in units in the last place (ULPs): the number of steps from one number to
the other through all numbers of the dtype.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zerojax.measure.compiled import compile_afresh

__all__ = [
    'Spread', 'element_spread', 'feature_spread', 'flatten', 'measure_noise', 'noise_floor',
    'ulps_apart',
]  # fmt: skip

Tree = Any


@dataclasses.dataclass(frozen=True)
class Spread:
    """How far several results for one tensor lie apart.

    Attributes:
        distinct: number of different results; 1 if all are equal.
        ulps: largest distance between two results of one element, in ULPs; a whole number, or
            infinity where NaN stands against a number. Of integers, their difference.
        absolute: the largest such distance in the tensor's own units; infinity likewise.
        relative: `absolute` divided by the largest finite magnitude in the tensor.
        magnitude: that largest finite magnitude. 0: the tensor was 0 (or NaN or infinite)
            throughout, and that it repeats tells nothing.
    """

    distinct: int
    ulps: float
    absolute: float
    relative: float
    magnitude: float

    def record(self) -> dict[str, int | float | None]:
        """As JSON takes it: None stands for infinity."""
        return {k: v if np.isfinite(v) else None for k, v in dataclasses.asdict(self).items()}


def _ordered(x: np.ndarray) -> np.ndarray:
    """Integers in the order of x's numbers, one apart from neighbour to neighbour.

    0.0 and -0.0 are the same integer; every NaN is the largest one.
    """
    if not jnp.issubdtype(x.dtype, np.floating):
        if not np.can_cast(x.dtype, np.int64):
            raise ValueError(f'dtype {x.dtype}: must be floats, bools or integers that int64 holds')
        return x.astype(np.int64)
    if x.dtype.itemsize not in (2, 4, 8):
        raise ValueError(f'dtype {x.dtype}: floats must have 2, 4 or 8 bytes')
    signed = np.dtype(f'int{8 * x.dtype.itemsize}')
    bits = np.ascontiguousarray(x).view(signed).reshape(x.shape)
    largest = np.iinfo(signed).max
    magnitude = bits & largest
    return np.where(np.isnan(x), largest, np.where(bits < 0, -magnitude, magnitude))


def _numbers(ordered: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The numbers that `_ordered` came from, as float64."""
    if not jnp.issubdtype(dtype, np.floating):
        return ordered.astype(np.float64)
    magnitude = np.abs(ordered).view(dtype).astype(np.float64)
    return np.where(ordered < 0, -magnitude, magnitude)


def _magnitude(ordered: np.ndarray, dtype: np.dtype) -> int:
    """The largest `_ordered` magnitude that stands for a finite number."""
    magnitude = np.abs(ordered)
    finite: Any = True
    if jnp.issubdtype(dtype, np.floating):
        finite = magnitude < _ordered(np.asarray(np.inf, dtype))
    return int(np.max(magnitude, where=finite, initial=0))


def _spread(low: np.ndarray, high: np.ndarray, dtype: np.dtype, distinct: int) -> Spread:
    """From the least and the largest `_ordered` integer of each element."""
    low, high = low.reshape(-1), high.reshape(-1)  # views do not work on scalars
    largest = np.asarray([max(_magnitude(low, dtype), _magnitude(high, dtype))], low.dtype)
    magnitude = float(_numbers(largest, dtype)[0])
    differing = low != high
    if not differing.any():
        return Spread(distinct, 0, 0.0, 0.0, magnitude)
    low, high = low[differing], high[differing]
    unsigned = np.dtype(f'uint{8 * low.dtype.itemsize}')  # holds the largest distance
    ulps: float = int(np.max(high.view(unsigned) - low.view(unsigned)))
    with np.errstate(over='ignore', invalid='ignore'):
        apart = float(np.max(_numbers(high, dtype) - _numbers(low, dtype)))
    if jnp.issubdtype(dtype, np.floating) and (high == np.iinfo(high.dtype).max).any():
        ulps = apart = math.inf
    return Spread(distinct, ulps, apart, apart / magnitude if magnitude else math.inf, magnitude)


def ulps_apart(a: Any, b: Any) -> float:
    """Largest distance in ULPs between elements of two arrays of one shape and float dtype.

    A whole number. 0.0 equals -0.0, NaN equals NaN; NaN against a number is infinitely far. Takes
    float16, bfloat16, float32 and float64; runs on the host.

    Raises:
        ValueError: shapes or dtypes differ, or the dtype is none of these.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f'{a.dtype}{a.shape} and {b.dtype}{b.shape}: must be of one dtype, shape')
    if not jnp.issubdtype(a.dtype, np.floating):
        raise ValueError(f'dtype {a.dtype}: must be a float')
    first, second = _ordered(a), _ordered(b)
    return _spread(np.minimum(first, second), np.maximum(first, second), a.dtype, 0).ulps


def flatten(tree: Tree) -> dict[str, np.ndarray]:
    """The tree's arrays on the host by '/'-joined path; PRNG keys as their integers."""
    flat = {}
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        flat[jax.tree_util.keystr(path, simple=True, separator='/')] = np.asarray(x)
    return flat


def noise_floor(results: Iterable[Tree]) -> dict[str, Spread]:
    """Spread of each tensor over several results of what should be the same computation.

    Args:
        results: pytrees of one structure. They are taken one by one, so that an iterator which
            computes them needs the memory of three, however many there are.

    Returns:
        A Spread for each '/'-joined path. Results are distinct if a single bit is, also that of
        -0.0 and those of NaN, which count as no distance.

    Raises:
        ValueError: there are no results, or they differ in structure, shape or dtype.
    """
    low: dict[str, np.ndarray] = {}
    high: dict[str, np.ndarray] = {}
    digests: dict[str, set[bytes]] = {}
    dtypes: dict[str, np.dtype] = {}
    for tree in results:
        flat = flatten(tree)
        if low and flat.keys() != low.keys():
            raise ValueError(f'results differ in {", ".join(sorted(flat.keys() ^ low.keys()))}')
        for name, x in flat.items():
            digest = _digest(x)
            if name not in low:
                low[name] = high[name] = _ordered(x)
                dtypes[name], digests[name] = x.dtype, {digest}
            elif (x.shape, x.dtype) != (low[name].shape, dtypes[name]):
                raise ValueError(
                    f'{name}: {x.dtype}{x.shape} and {dtypes[name]}{low[name].shape}: '
                    'results must be of one dtype and shape'
                )
            elif digest not in digests[name]:
                digests[name].add(digest)
                ordered = _ordered(x)
                low[name] = np.minimum(low[name], ordered)
                high[name] = np.maximum(high[name], ordered)
    if not digests:
        raise ValueError('results: needs at least one, with at least one array')
    return {
        name: _spread(low[name], high[name], dtypes[name], len(digests[name])) for name in digests
    }


def _digest(x: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data).digest()


def feature_spread(x: Any, axis: int, first: np.ndarray | None = None) -> Spread:
    """Spread over the features along an axis of an array, as if they were results of one thing.

    Features are distinct as in `zerojax.symmetry`: bit by bit, but 0.0 equals -0.0. `first`, ints
    [features], has one number for all features of an orbit: only these are compared, and the worst
    orbit counts (None: all are one orbit). On the host.
    """
    x = np.asarray(x)
    features = np.moveaxis(_ordered(x), axis, 0)
    if first is None:
        first = np.zeros(len(features), int)
    if (features == features[first]).all():
        return _spread(features, features, x.dtype, 1)
    orbits = [features[first == each] for each in np.unique(first)]
    low, high = (np.stack([find(each, axis=0) for each in orbits]) for find in (np.min, np.max))
    distinct = max(len({_digest(feature) for feature in orbit}) for orbit in orbits)
    return _spread(low, high, x.dtype, distinct)


def element_spread(x: Any, classes: np.ndarray) -> Spread:
    """Spread over the elements of an array that are of one class; the worst class counts.

    `classes` are ints of x's shape. 0.0 equals -0.0. On the host.
    """
    x = np.asarray(x)
    values, classes = _ordered(x).ravel(), classes.ravel()
    order = np.lexsort((values, classes))
    values, classes = values[order], classes[order]
    begins = np.append(True, classes[1:] != classes[:-1])
    differs = begins | np.append(True, values[1:] != values[:-1])
    distinct = int(np.max(np.add.reduceat(differs, np.flatnonzero(begins), dtype=int)))
    ends = np.append(begins[1:], True)
    return _spread(values[begins], values[ends], x.dtype, distinct)


def measure_noise(
    function: Callable[..., Tree],
    *args: Any,
    repeats: int = 10,
    compilations: int = 3,
    compiler_options: dict[str, bool | int | str] | None = None,
) -> dict[str, dict[str, Spread]]:
    """The noise floor of a function at given arguments, within one executable and across several.

    Args:
        function, args, compiler_options: as in `compile_afresh`; nothing is donated.
        repeats: number of calls of one executable, at least 2.
        compilations: number of executables, each compiled afresh and called once, at least 2.

    Returns:
        {'one executable': noise floor, 'fresh compilations': noise floor}, see `noise_floor`.

    Raises:
        ValueError: less than two calls or compilations, which no noise can be seen in.
    """
    for name, number in (('repeats', repeats), ('compilations', compilations)):
        if number < 2:
            raise ValueError(f'{name}={number}: must be at least 2')

    def compiled() -> Callable[..., Tree]:
        return compile_afresh(function, *args, compiler_options=compiler_options)

    executable = compiled()
    return {
        'one executable': noise_floor(executable(*args) for _ in range(repeats)),
        'fresh compilations': noise_floor(compiled()(*args) for _ in range(compilations)),
    }
