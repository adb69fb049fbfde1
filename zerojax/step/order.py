"""Perturbation 'order': gradients whose sums over the batch are added in a random order.

Where GPU kernels add by atomics, the order of additions is chance, and so is their rounding: what
the paper (Blumenfeld, Gilboa, Soudry, ICML 2020) says is enough to break the symmetry. This
emulates it where kernels repeat: the same sums in exact arithmetic, of the same numbers.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zerojax import perturb

Tree = Any

ORDER_GROUPS = 16  # of examples, whose contributions to a gradient are added in a random order
PICKS_OF_A_WORD = 5  # of 16, 15, 14, 13 and 12: half a million outcomes, of 2^32 bits
ORDER_WORDS = 3


def ordered_kernels(params: Tree, layers: str) -> list[str]:
    """Paths of the kernels that kind 'order' acts on, sorted: parameters of two axes or more, of
    any pytree, that the regular expression `layers` chooses."""
    return [path for path in _kernel_shapes(params) if re.match(layers, path)]


def _kernel_shapes(params: Tree) -> dict[str, tuple[int, ...]]:
    leaves = zip(perturb.paths_of(params), jax.tree.leaves(params), strict=True)
    return {path: x.shape for path, x in sorted(leaves, key=lambda each: each[0]) if x.ndim >= 2}


def _order_bits(params: Tree, key: jax.Array) -> dict[str, jax.Array]:
    """For `add_in_random_order`, of each kernel; one draw serves all, as in `zerojax.perturb`."""
    shapes = _kernel_shapes(params)
    sizes = [math.prod(shape) for shape in shapes.values()]
    drawn = jax.random.bits(key, (ORDER_WORDS, sum(sizes)), jnp.uint32)
    parts = jnp.split(drawn, np.cumsum(sizes)[:-1], axis=1)
    return {
        path: part.reshape(ORDER_WORDS, *shape)
        for (path, shape), part in zip(shapes.items(), parts, strict=True)
    }


@contextlib.contextmanager
def reordered_sums(
    perturbation: perturb.Perturbation, params: Tree, key: jax.Array
) -> Iterator[None]:
    """Within it, the gradients of a Linen model's chosen kernels are sums in a random order.

    What `apply` of the model returns is as always, and so is every gradient but those of
    `ordered_kernels`. Each of these is the sum of the contributions of `ORDER_GROUPS` groups of
    examples that follow one another in the batch, as `np.array_split` makes them (of single ones
    in a smaller batch), added by `add_in_random_order`; in mixed precision each contribution is
    rounded to bfloat16 first. When the perturbation is due is left to the caller. What a weight
    draws does not depend on which others are chosen. `params` are the model's; only their paths
    and shapes are read.

    The modules that hold the chosen kernels may be anyone's, such as `nn.Dense` and `nn.Conv`, if
    they hold parameters alone and are called with one array of floats, whose first axis is the
    batch, as that of their output; an example's output must depend on no other example.

    Raises:
        ValueError: another kind, or nothing is chosen. When a module is called: it is not such a
            one. At the end: one that holds a chosen kernel was never called.
    """
    p = perturbation
    if p.kind != 'order':
        raise ValueError(f"kind={p.kind!r}: must be 'order'")
    kernels = ordered_kernels(params, p.layers)
    if not kernels:
        raise ValueError(f'layers={p.layers!r}: matches no kernel')
    drawn = _order_bits(params, key)
    bits: dict[str, dict[str, jax.Array]] = {}  # of each module's own kernels
    for path in kernels:
        module, _, name = path.rpartition('/')
        bits.setdefault(module, {})[name] = drawn[path]
    called: set[str] = set()
    inside = False  # `apply` below, of a module that may be the whole model: its path is the same

    def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, path = context.module, '/'.join(context.module.path)
        if inside or context.method_name != '__call__' or path not in bits:
            return call(*args, **kwargs)
        called.add(path)
        _check_reorderable(module, path, args, kwargs, bits[path])
        unbound = module.clone(parent=None)

        def apply(params: Tree, x: jax.Array) -> Any:
            nonlocal inside
            inside = True
            try:
                return unbound.apply({'params': params}, x)
            finally:
                inside = False

        (x,), own = args, module.variables['params']
        shape = jax.eval_shape(apply, own, x).shape
        if shape[:1] != x.shape[:1]:
            raise ValueError(f'{path}: order needs a batch first; makes {shape} of {x.shape}')
        return _with_reordered_sums(apply)(own, x, bits[path])

    with nn.intercept_methods(intercept):
        yield
    if missing := sorted(bits.keys() - called):
        raise ValueError(
            f'layers={p.layers!r}: chooses kernels of {", ".join(missing)}, which no call of a '
            'module with this path computed with; choose others'
        )


def _check_reorderable(
    module: nn.Module, path: str, args: Any, kwargs: Any, bits: dict[str, jax.Array]
) -> None:
    x = args[0] if len(args) == 1 and not kwargs else None
    if not (isinstance(x, jax.Array) and x.ndim and jnp.issubdtype(x.dtype, jnp.floating)):
        raise ValueError(f'{path}: order needs layers that are called with one array of floats')
    if others := sorted(set(module.variables) - {'params'}):
        raise ValueError(f'{path}: order needs layers of parameters alone; has {", ".join(others)}')
    for name, drawn in bits.items():
        if (shape := module.variables['params'][name].shape) != drawn.shape[1:]:
            raise ValueError(
                f'{path}: order needs parameters as they are stored, not slices of them as within '
                f'nn.scan or nn.vmap; {name} is {shape} of {drawn.shape[1:]}'
            )


def _with_reordered_sums(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`apply(params, x)` as a function of (params, x, {name: bits}), whose gradient with respect to
    the named kernels is added in an order that the bits decide."""

    @jax.custom_vjp
    def function(params: Tree, x: jax.Array, bits: dict[str, jax.Array]) -> Any:
        del bits
        return apply(params, x)

    def forward(params: Tree, x: jax.Array, bits: dict[str, jax.Array]) -> Any:
        return apply(params, x), (params, x, bits)

    def backward(residuals: Any, gradient: jax.Array) -> Any:
        params, x, bits = residuals
        grads, x_gradient = jax.vjp(apply, params, x)[1](gradient)

        def contributions(x: jax.Array, gradient: jax.Array) -> Tree:
            (grads,) = jax.vjp(lambda params: apply(params, x), params)[1](gradient)
            return {name: grads[name] for name in bits}

        groups = min(ORDER_GROUPS, len(x))
        each = jax.vmap(contributions)(_split(x, groups), _split(gradient, groups))
        sums = {name: add_in_random_order(each[name], bits[name]) for name in bits}
        return {**grads, **sums}, x_gradient, None

    function.defvjp(forward, backward)
    return function


def _split(x: jax.Array, groups: int) -> jax.Array:
    """[B, ...] -> [groups, ceil(B / groups), ...], as `np.array_split`; short ones end in zeros."""
    size, longer = divmod(len(x), groups)
    end, rest = longer * (size + 1), x.shape[1:]
    short = x[end:].reshape(groups - longer, size, *rest)
    if not longer:
        return short
    short = jnp.pad(short, ((0, 0), (0, 1), *((0, 0) for _ in rest)))
    return jnp.concatenate([x[:end].reshape(longer, size + 1, *rest), short])


def add_in_random_order(contributions: jax.Array, bits: jax.Array) -> jax.Array:
    """The sum of `contributions` over their first axis, for each entry in an order of its own.

    They are added one after another, and each sum is rounded to their dtype.

    Args:
        contributions: [G, ...], any float; G at most `ORDER_GROUPS`.
        bits: uint32 [ORDER_WORDS, ...], random; they decide the orders, each as likely as any
            other to one part in 8000.

    Returns:
        [...], dtype of the contributions.
    """
    # Drawn without replacement; sorting random numbers takes ten times as long on a CPU.
    left, words = list(contributions), list(bits)
    drawn: list[jax.Array] = []
    while len(left) > 1:
        if len(drawn) % PICKS_OF_A_WORD == 0:
            word = words.pop()
        pick, word = word % len(left), word // len(left)
        last = picked = left.pop()
        for j, other in enumerate(left):
            hit = pick == j
            picked, left[j] = jnp.where(hit, other, picked), jnp.where(hit, last, other)
        drawn.append(picked)
    # XLA may keep a sum of bfloat16 in float32 but for this; to other dtypes it does nothing.
    info = jnp.finfo(contributions.dtype)
    round_off = functools.partial(
        jax.lax.reduce_precision, exponent_bits=info.nexp, mantissa_bits=info.nmant
    )
    return functools.reduce(lambda x, y: round_off(x + y), drawn + left)
