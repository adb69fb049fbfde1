"""Injected asymmetry: what is perturbed, where, when and how much.

Kinds that change the weights, before the gradient of a step is taken:

    gaussian      scale · N(0, 1) is added to every chosen weight, or the weight multiplied by
                  1 + scale · N(0, 1) if `relative`
    one_weight    a single random weight that is not 0 is multiplied by 1 + scale
    ulp           `count` random weights that are not 0 move to the next representable number above
    unequal_init  scale · N(0, 1) is added, the same to the features d, d + count, d + 2·count, ...
                  along every feature axis, so that `count` unique features are left (at step 0)

Kinds that act within a step:

    gradient      every chosen entry of the gradient is multiplied by 1 + scale · N(0, 1); with the
                  size of a rounding error it emulates the noise of nondeterministic kernels
    order         what 16 groups of the batch's examples contribute to the gradient of a chosen
                  kernel is added in an order drawn afresh for every weight: the rounding of GPU
                  kernels that add by atomics, and nothing else; see `zerojax.step.order`
    activation    scale · N(0, 1) is added to the outputs of the chosen layers (or these are
                  multiplied by 1 + scale · N(0, 1) if `relative`); if `backward`, to the gradient
                  of the loss with respect to these outputs instead
    dropout       outputs of the chosen layers are set to 0 with probability `scale`, the others
                  divided by 1 - scale
    disout        feature-map distortion (Tang et al., "Beyond Dropout", 2020) of a share `scale` of
                  the outputs by noise of size `strength`, see `disout`

Aimed at some streams (names of feature axes, see `zerojax.symmetry`), noise is drawn as always,
then averaged over the features of all other streams and not rescaled (a mean over n features is
1 / sqrt(n) the size of the noise); arrays that none of the streams indexes stay as they are. So it
is invariant under the permutations of all other streams, and leaves what is equal in these equal to
the bit: every feature gets the same, whether they are one orbit or several. Only where single
weights tie two streams together (identity layers, `symmetry.Orbits.entries`) one follows the other.

Noise is drawn in float32 whatever the dtype of what it perturbs and whether JAX has 64-bit numbers,
so runs of different precision are perturbed alike; it is added in float32 or better, and the result
rounded once.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from zerojax import symmetry

__all__ = [
    'KINDS', 'NONE', 'Perturbation', 'PerturbationState', 'as_transformation', 'check_streams',
    'chosen', 'disout', 'gaussian', 'one_weight', 'output_layers', 'perturb_gradients',
    'perturb_output', 'perturb_weights', 'perturbed_outputs', 'ulp', 'unequal_init',
]  # fmt: skip

Tree = Any
Scale = float | jax.Array

WEIGHT_KINDS = ('gaussian', 'one_weight', 'ulp', 'unequal_init')
OUTPUT_KINDS = ('activation', 'dropout', 'disout')
LAYER_KINDS = ('order', *OUTPUT_KINDS)  # act while a model's layers are called
KINDS = ('none', *WEIGHT_KINDS, 'gradient', *LAYER_KINDS)

DISOUT_BLOCK = 6  # side in positions, and strength, of the published module's defaults
DISOUT_STRENGTH = 0.01


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """A perturbation of training.

    Attributes:
        kind: 'none', or one of those at the top of this file.
        scale: of the noise, as `kind` says. Of 'dropout' and 'disout' a share below 1; 'ulp' and
            'order' have no use for it. May be a traced number, so that runs of different scales
            share one executable; then it is not checked.
        at_step: number of updates done when it is applied (first); 0 perturbs the initial weights.
        every: n > 0 applies it again, with new noise, every n steps after `at_step`; 0 only once;
            None as fits the kind: once to weights, in each step what acts within a step.
        layers: regular expression; parameters whose path ('block1_0/conv/kernel') it matches from
            the start, as `re.match` does, are perturbed. Layers whose outputs are perturbed are the
            modules that hold a chosen kernel with features along its last axis; 'order' acts on
            the chosen parameters of two axes or more. The default chooses all.
        streams: names of feature axes that it is aimed at, as the top of this file says; () is
            all. Of layers whose outputs are perturbed those whose output features are of one of
            them. 'ulp' and 'order' have no use for it, as nothing smaller than a rounding can be
            averaged.
        relative: of 'gaussian' and 'activation': whether the noise is relative to what it perturbs.
        count: of 'ulp' the number of weights; of 'unequal_init' the number of unique features.
        backward: of 'activation': whether gradients are perturbed instead.
        strength: of 'disout': what replaces an output is strength · σ · N(0, 1), see `disout`.

    A field that the kind has no use for must be left at its default; kind 'none' ignores all.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """

    kind: str = 'none'
    scale: Scale = 0.0
    at_step: int = 0
    every: int | None = None
    layers: str = '.*'
    streams: tuple[str, ...] = ()
    relative: bool = False
    count: int = 1
    backward: bool = False
    strength: float = DISOUT_STRENGTH

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f'kind={self.kind!r}: must be one of {", ".join(KINDS)}')
        if not isinstance(self.scale, jax.core.Tracer):
            if not (math.isfinite(self.scale) and self.scale >= 0):
                raise ValueError(f'scale={self.scale}: must be finite and at least 0')
            if self.kind in ('dropout', 'disout') and self.scale >= 1:
                raise ValueError(f'scale={self.scale}: must be below 1, a share of {self.kind}')
            if self.kind in ('ulp', 'order') and self.scale != 0:
                raise ValueError(
                    f'scale={self.scale}: {self.kind} has no use for it; leave it at 0.0'
                )
        if self.at_step < 0:
            raise ValueError(f'at_step={self.at_step}: must be at least 0')
        if self.every is not None and self.every < 0:
            raise ValueError(f'every={self.every}: must be at least 0 (0: only once)')
        if self.kind == 'unequal_init' and (self.at_step > 0 or self.every):
            name, value = ('at_step', self.at_step) if self.at_step > 0 else ('every', self.every)
            raise ValueError(f'{name}={value}: unequal_init is for the initial weights; must be 0')
        if type(self.streams) is not tuple or not all(type(x) is str for x in self.streams):
            raise ValueError(
                f"streams={self.streams!r}: must be a tuple of names, such as ('stem',); () is all"
            )
        if self.streams and self.kind in ('ulp', 'order'):
            raise ValueError(
                f'streams={self.streams!r}: {self.kind} has no use for it, as nothing smaller can '
                'be averaged over other streams; leave it at ()'
            )
        if self.relative and self.kind not in ('none', 'gaussian', 'activation'):
            raise ValueError(f'relative={self.relative}: {self.kind} has no use for it')
        if self.count < 1:
            raise ValueError(f'count={self.count}: must be at least 1')
        if self.count > 1 and self.kind not in ('none', 'ulp', 'unequal_init'):
            raise ValueError(f'count={self.count}: {self.kind} has no use for it; leave it at 1')
        if self.backward and self.kind not in ('none', 'activation'):
            raise ValueError(f'backward={self.backward}: {self.kind} has no use for it')
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ValueError(f'strength={self.strength}: must be finite and at least 0')
        if self.strength != DISOUT_STRENGTH and self.kind not in ('none', 'disout'):
            raise ValueError(
                f'strength={self.strength}: {self.kind} has no use for it; leave it at '
                f'{DISOUT_STRENGTH}'
            )
        try:
            re.compile(self.layers)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f'layers={self.layers!r}: not a regular expression: {error}') from None

    @property
    def period(self) -> int:
        """`every`, by default of its kind."""
        if self.every is None:
            return 0 if self.kind in WEIGHT_KINDS else 1
        return self.every

    @property
    def always_due(self) -> bool:
        """Whether it is applied in every update."""
        return self.at_step == 0 and self.period == 1

    def due(self, step: jax.Array) -> jax.Array:
        """Whether it is applied in update number `step` (int32 [], from 0): bool []."""
        since = step - self.at_step
        if self.period:
            return (since >= 0) & (since % self.period == 0)
        return since == 0


NONE = Perturbation()


def paths_of(tree: Tree) -> list[str]:
    """The '/'-joined path of each leaf of any pytree, in the order of its leaves.

    It is made of keys, names of attributes and positions: 'block1_0/conv/kernel', 'layers/0'.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in leaves]


def chosen(params: Tree, layers: str) -> list[str]:
    """Paths of the parameters, any pytree, that the regular expression `layers` chooses, sorted."""
    return sorted(path for path in paths_of(params) if re.match(layers, path))


def is_chosen(params: Tree, layers: str) -> Tree:
    """Bools like `params`, any pytree: whether `layers` chooses the parameter, as in `chosen`."""
    matches = [bool(re.match(layers, path)) for path in paths_of(params)]
    return jax.tree.unflatten(jax.tree.structure(params), matches)


def chosen_but(
    params: Tree,
    layers: str,
    frozen: str,
    streams: tuple[str, ...] = (),
    feature_axes: Tree = None,
) -> list[str]:
    """As `chosen`, without those that the regular expression `frozen` chooses ('': none) and those
    that none of the `streams` indexes ((): all are kept).

    Raises:
        ValueError: as `averaged_axes`.
    """
    paths = sorted(averaged_axes(params, layers, streams, feature_axes))
    return [path for path in paths if not re.match(frozen, path)] if frozen else paths


def check_streams(streams: tuple[str, ...], feature_axes: Tree) -> None:
    """Checks that all are names of axes in the declaration of the parameters, `feature_axes`.

    Raises:
        ValueError: one is not, or there is no declaration to tell.
    """
    if not streams:
        return
    if feature_axes is None:
        raise ValueError(f'streams={streams!r}: needs feature_axes, which says what they index')
    names = symmetry.stream_names(feature_axes)
    if unknown := [name for name in streams if name not in names]:
        raise ValueError(
            f'streams={streams!r}: {unknown[0]!r} is no stream of this network; must be of '
            f'{", ".join(names)}, or () for all'
        )


def averaged_axes(
    params: Tree, layers: str, streams: tuple[str, ...] = (), feature_axes: Tree = None
) -> dict[str, tuple[int, ...]]:
    """What is perturbed: {path: axes that its noise is averaged over}.

    These are the parameters that `layers` chooses, as in `chosen`, and one of the `streams`
    indexes; the axes are those of all other streams. () is all streams, and averages nothing.
    `feature_axes` is the declaration of `params`, nested dictionaries; only `streams` need it.

    Raises:
        ValueError: as `check_streams`, or `params` and `feature_axes` do not fit each other.
    """
    paths = chosen(params, layers)
    if not streams:
        return dict.fromkeys(paths, ())
    check_streams(streams, feature_axes)
    return {
        '/'.join(path): tuple(axis for axis, name in names.items() if name not in streams)
        for path, _, names in symmetry.named_axes(params, feature_axes)
        if '/'.join(path) in paths and not set(streams).isdisjoint(names.values())
    }


# Plain functions on weights.


def _change(
    params: Tree, paths: Collection[str], drawn: jax.Array, law: Callable[..., jax.Array]
) -> Tree:
    """`law(path, x, its share of what was drawn for all weights)` in place of those at `paths`.

    One draw serves all parameters, because XLA compiles one generator much faster than dozens; and
    what a weight gets does not depend on which parameters are chosen.
    """
    leaves, definition = jax.tree.flatten(params)
    all_paths = paths_of(params)
    start = 0
    for i in sorted(range(len(leaves)), key=all_paths.__getitem__):
        path, x = all_paths[i], leaves[i]
        if path in paths:
            leaves[i] = law(path, x, drawn[start : start + x.size].reshape(x.shape))
        start += x.size
    return jax.tree.unflatten(definition, leaves)


def _normal(params: Tree, key: jax.Array) -> jax.Array:
    """N(0, 1) for each weight, as `_change` hands it out."""
    size = sum(x.size for x in jax.tree.leaves(params))
    return jax.random.normal(key, (size,), jnp.float32)


def _mean(noise: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The mean over the axes, which keep length 1: one number for all that must stay equal."""
    return jnp.mean(noise, axes, keepdims=True) if axes else noise


def _at_least_float32(x: jax.Array) -> Any:
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _add_noise(x: jax.Array, noise: jax.Array, scale: Scale, relative: bool) -> jax.Array:
    """x + scale · noise, or x · (1 + scale · noise), rounded once to the dtype of x."""
    wide = _at_least_float32(x)
    change = jnp.asarray(scale, wide) * noise.astype(wide)
    if relative:
        change = change * x.astype(wide)
    return (x.astype(wide) + change).astype(x.dtype)


def gaussian(
    params: Tree,
    key: jax.Array,
    scale: Scale,
    layers: str = '.*',
    *,
    relative: bool = False,
    streams: tuple[str, ...] = (),
    feature_axes: Tree = None,
) -> Tree:
    """Adds scale · N(0, 1) to every weight of the chosen parameters, in units of the weights.

    If `relative`, multiplies every weight by 1 + scale · N(0, 1) instead; then it is also what kind
    'gradient' does to a tree of gradients. Aimed at `streams`, N(0, 1) is averaged, see
    `averaged_axes`. Any floats; dtypes are kept.

    Raises:
        ValueError: as `averaged_axes`.
    """
    axes = averaged_axes(params, layers, streams, feature_axes)

    def law(path: str, x: jax.Array, noise: jax.Array) -> jax.Array:
        return _add_noise(x, _mean(noise, axes[path]), scale, relative)

    return _change(params, axes, _normal(params, key), law)


def unequal_init(
    params: Tree,
    feature_axes: Tree,
    key: jax.Array,
    scale: Scale,
    count: int,
    layers: str = '.*',
    *,
    streams: tuple[str, ...] = (),
) -> Tree:
    """Adds scale · N(0, 1), the same to all features d + n · count along every named axis.

    `feature_axes` is the declaration of `params`, nested dictionaries, see `zerojax.symmetry`.
    Equal features become `count` unique ones, or as many as there are if that is less. Aimed at
    `streams`, what would be added is averaged, see `averaged_axes`, and those of other streams
    stay equal.

    Raises:
        ValueError: as `averaged_axes`.
    """
    axes = averaged_axes(params, layers, streams, feature_axes)
    declared = flatten_dict(feature_axes, sep='/')

    def law(path: str, x: jax.Array, noise: jax.Array) -> jax.Array:
        for axis, name in enumerate(declared[path]):
            if name is not None:
                noise = jnp.take(noise, np.arange(x.shape[axis]) % count, axis=axis)
        return _add_noise(x, _mean(noise, axes[path]), scale, relative=False)

    return _change(params, axes, _normal(params, key), law)


def _random_hits(params: Tree, key: jax.Array, count: int, paths: Collection[str]) -> jax.Array:
    """Chooses `count` different random weights at `paths` that are not 0: bools, for `_change`.

    All of them where there are fewer; each is as likely as any other.
    """
    weights = zip(paths_of(params), jax.tree.leaves(params), strict=True)
    eligible = jnp.concatenate(
        [
            (x != 0).ravel() & (path in paths)
            for path, x in sorted(weights, key=lambda each: each[0])
        ]
    )
    # Random numbers decide the order; 0 is kept for what may not be chosen.
    rank = jnp.maximum(jax.random.bits(key, eligible.shape, jnp.uint32), 1)
    rank = jnp.where(eligible, rank, 0)
    number = min(count, eligible.size)
    _, index = jax.lax.top_k(rank, number)
    return jnp.zeros(eligible.shape, bool).at[index].set(True) & eligible


def one_weight(
    params: Tree,
    key: jax.Array,
    scale: Scale,
    layers: str = '.*',
    *,
    streams: tuple[str, ...] = (),
    feature_axes: Tree = None,
) -> Tree:
    """Multiplies a single random weight by 1 + scale, among those chosen that are not 0.

    Aimed at `streams`, it is one of an array that they index, and what it gets is averaged, see
    `averaged_axes`: with n weights that differ from it only in features of other streams, each of
    these n is multiplied by 1 + scale / n. Without any such weight the parameters come back as
    they are.

    Raises:
        ValueError: as `averaged_axes`.
    """
    axes = averaged_axes(params, layers, streams, feature_axes)

    def law(path: str, x: jax.Array, hit: jax.Array) -> jax.Array:
        share = _mean(hit.astype(jnp.float32), axes[path])
        return jnp.where(share > 0, _add_noise(x, share, scale, True), x)

    return _change(params, axes, _random_hits(params, key, 1, axes), law)


def ulp(params: Tree, key: jax.Array, count: int = 1, layers: str = '.*') -> Tree:
    """Moves `count` random weights to the next representable number above.

    Chosen are weights that are not 0, as the number next to 0 is subnormal, and XLA computes with 0
    in its place; all of them if there are fewer.
    """
    paths = chosen(params, layers)

    def law(_: str, x: jax.Array, hit: jax.Array) -> jax.Array:
        return jnp.where(hit, jnp.nextafter(x, jnp.asarray(jnp.inf, x.dtype)), x)

    return _change(params, paths, _random_hits(params, key, count, paths), law)


def perturb_weights(
    perturbation: Perturbation,
    params: Tree,
    key: jax.Array,
    step: jax.Array,
    feature_axes: Tree = None,
    *,
    frozen: str = '',
) -> Tree:
    """The weights that update number `step` (int32 [], from 0) computes its gradient with.

    Where no perturbation of the weights is due, they come back bit for bit. The noise is drawn from
    `fold_in(key, step)`. `feature_axes`, the declaration of `params`, is needed by 'unequal_init'
    and where the perturbation is aimed at streams. Parameters that the regular expression `frozen`
    chooses stay as they are ('': none), also where `layers` chooses them.

    Raises:
        ValueError: as `averaged_axes`.
    """
    if perturbation.kind not in WEIGHT_KINDS:
        return params
    p, key = perturbation, jax.random.fold_in(key, step)
    layers = p.layers
    if frozen:
        paths = '|'.join(re.escape(path) for path in chosen_but(params, layers, frozen))
        layers = rf'({paths})\Z' if paths else '(?!)'
    aim: dict[str, Any] = {'streams': p.streams, 'feature_axes': feature_axes}

    def change(params: Tree) -> Tree:
        if p.kind == 'gaussian':
            return gaussian(params, key, p.scale, layers, relative=p.relative, **aim)
        if p.kind == 'one_weight':
            return one_weight(params, key, p.scale, layers, **aim)
        if p.kind == 'ulp':
            return ulp(params, key, p.count, layers)
        return unequal_init(params, feature_axes, key, p.scale, p.count, layers, streams=p.streams)

    return jax.lax.cond(p.due(step), change, lambda params: params, params)


# Within a step.


def perturb_gradients(
    perturbation: Perturbation,
    grads: Tree,
    key: jax.Array,
    step: jax.Array,
    feature_axes: Tree = None,
) -> Tree:
    """The gradients of update number `step`, with noise where kind 'gradient' is due.

    `feature_axes`, the declaration of the parameters, is needed where it is aimed at streams.

    Raises:
        ValueError: as `averaged_axes`.
    """
    if perturbation.kind != 'gradient':
        return grads
    p, key = perturbation, jax.random.fold_in(key, step)
    aim: dict[str, Any] = {'streams': p.streams, 'feature_axes': feature_axes}
    return jax.lax.cond(
        p.due(step),
        lambda x: gaussian(x, key, p.scale, p.layers, relative=True, **aim),
        lambda x: x,
        grads,
    )


def output_layers(feature_axes: Tree) -> dict[str, str]:
    """{module path: kernel path} of all modules whose outputs can be perturbed.

    They hold a kernel with features along its last axis. `feature_axes` is the declaration of the
    parameters.
    """
    outputs = symmetry.output_axes(feature_axes).items()
    return {path.rpartition('/')[0]: path for path, name in outputs if name is not None}


def chosen_outputs(perturbation: Perturbation, feature_axes: Tree) -> list[str]:
    """The modules of `output_layers` that `layers` and `streams` choose, in that order.

    Raises:
        ValueError: as `check_streams`.
    """
    p = perturbation
    check_streams(p.streams, feature_axes)
    names = symmetry.output_axes(feature_axes)
    return [
        module
        for module, path in output_layers(feature_axes).items()
        if re.match(p.layers, path) and (not p.streams or names[path] in p.streams)
    ]


@contextlib.contextmanager
def perturbed_outputs(
    perturbation: Perturbation, feature_axes: Tree, key: jax.Array
) -> Iterator[None]:
    """Within it, `apply` of a Linen model perturbs the outputs of its layers as the kind says.

    When the perturbation is due is left to the caller. Each layer draws from a key of its own,
    whichever are chosen.

    Raises:
        ValueError: a kind that does not act on outputs, or as `check_streams`.
    """
    p = perturbation
    if p.kind not in OUTPUT_KINDS:
        raise ValueError(f'kind={p.kind!r}: must be one of {", ".join(OUTPUT_KINDS)}')
    perturbed = chosen_outputs(p, feature_axes)
    keys = {
        module: jax.random.fold_in(key, i)
        for i, module in enumerate(output_layers(feature_axes))
        if module in perturbed
    }

    def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = call(*args, **kwargs)
        module = '/'.join(context.module.path)
        if context.method_name != '__call__' or module not in keys:
            return output
        return perturb_output(p, output, keys[module])

    with nn.intercept_methods(intercept):
        yield


def _rate(scale: Scale) -> Scale:
    """A traced scale in float32, also of runs in float64."""
    return scale.astype(jnp.float32) if isinstance(scale, jax.Array) else scale


def _bernoulli(key: jax.Array, share: Scale, shape: tuple[int, ...]) -> jax.Array:
    """True for about this share of the entries; `jax.random` would draw in the dtype of `share`."""
    return jax.random.bernoulli(key, jnp.asarray(share, jnp.float32), shape)


def perturb_output(perturbation: Perturbation, x: jax.Array, key: jax.Array) -> jax.Array:
    """A layer's output x [..., C], perturbed as the kind says."""
    p = perturbation
    if p.kind == 'dropout':
        kept = _bernoulli(key, 1 - _rate(p.scale), x.shape)
        return jnp.where(kept, x / jnp.asarray(1 - p.scale, x.dtype), jnp.zeros_like(x))
    if p.kind == 'disout':
        return disout(x, key, p.scale, p.strength)

    def add_noise(x: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, x.shape, jnp.float32)
        return _add_noise(x, noise, p.scale, p.relative)

    if not p.backward:
        return add_noise(x)

    @jax.custom_vjp
    def identity(x: jax.Array) -> jax.Array:
        return x

    identity.defvjp(lambda x: (x, None), lambda _, gradient: (add_noise(gradient),))
    return identity(x)


def disout(
    x: jax.Array, key: jax.Array, rate: Scale, strength: float = DISOUT_STRENGTH
) -> jax.Array:
    """Feature-map distortion: Tang et al., "Beyond Dropout: Feature Map Distortion", 2020.

    As in DropBlock (Ghiasi et al. 2018), blocks of `DISOUT_BLOCK` squared positions (less where the
    map is smaller; single entries where there is no space) are chosen in every example and feature,
    about a share `rate` of all entries. They are replaced by strength · σ · N(0, 1), with σ the
    standard deviation of x, and all is divided by the share that was kept.

    The published code (github.com/huawei-noah/Disout) has alpha · 0.01 in place of `strength` where
    it does not know the next layer's weights, with alpha 1 by default: the default here. Its
    training script for CIFAR-10 takes alpha 5, here a strength of 0.05, a rate that rises to 0.09
    over the run, and, in place of 0.01, a mean of the next convolution's largest weights; the last
    two are not offered.

    Args:
        x: [B, H, W, C] or [..., C], any float.
        key: of the draws.
        rate: share of the entries, at least 0 and below 1.
        strength: of the noise, in standard deviations of x, at least 0.

    Returns:
        The distorted x, same shape and dtype.
    """
    seed_key, noise_key = jax.random.split(key)
    rate = _rate(rate)
    if x.ndim == 4:
        _, height, width, _ = x.shape
        block = min(DISOUT_BLOCK, height, width)
        places = (height - block + 1) * (width - block + 1)
        seed_rate = jnp.minimum(1.0, rate * height * width / (block**2 * places))
        shape = (x.shape[0], height - block + 1, width - block + 1, x.shape[-1])
        seeds = _bernoulli(seed_key, seed_rate, shape).astype(jnp.float32)
        pad = ((0, 0), (block - 1, block - 1), (block - 1, block - 1), (0, 0))
        distorted = nn.max_pool(jnp.pad(seeds, pad), (block, block)) > 0
    else:
        distorted = _bernoulli(seed_key, rate, x.shape)
    kept = jnp.maximum(1 - jnp.mean(distorted.astype(jnp.float32)), 1 / x.size)
    wide = _at_least_float32(x)
    x_wide = x.astype(wide)
    deviation = strength * jax.lax.stop_gradient(jnp.std(x_wide))
    noise = deviation * jax.random.normal(noise_key, x.shape, jnp.float32).astype(wide)
    return (jnp.where(distorted, noise, x_wide) / kept.astype(wide)).astype(x.dtype)


# In anyone's chain.


class PerturbationState(NamedTuple):
    """Of `as_transformation`: number of updates done, int32 [], and the key of all noise."""

    step: jax.Array
    key: jax.Array


def as_transformation(
    perturbation: Perturbation, seed: int = 0, feature_axes: Tree = None
) -> optax.GradientTransformationExtraArgs:
    """The perturbation as an optax transformation, for any optimizer and any pytree of parameters.

    Paths that `layers` is matched with are those of `paths_of`. Aimed at streams it needs
    `feature_axes`, the declaration of the parameters, which then are nested dictionaries.

    Kind 'gradient' is put first in the chain, and perturbs the gradients that come in. Kinds that
    change weights are put last: the update that makes weights after which the perturbation is due
    includes it, up to the rounding of the sum of both; so weights of step 0 cannot be reached,
    perturb these with `perturb_weights` before `init`. Noise is drawn from
    fold_in(key(seed), step).

    Raises:
        ValueError: a kind that acts on outputs or within layers, or weights at step 0, or as
            `check_streams`.
    """
    p = perturbation
    if p.kind != 'none':
        check_streams(p.streams, feature_axes)
    if p.kind in OUTPUT_KINDS:
        raise ValueError(f'kind={p.kind!r}: acts on outputs of layers; use perturbed_outputs')
    if p.kind == 'order':
        raise ValueError(f'kind={p.kind!r}: acts within layers; use step.order.reordered_sums')
    if p.kind in WEIGHT_KINDS and p.at_step == 0:
        raise ValueError(
            f'at_step={p.at_step}: the initial weights come before the first update; '
            'change them with perturb_weights, or choose a later step'
        )

    def init(params: Tree) -> PerturbationState:
        del params
        return PerturbationState(jnp.int32(0), jax.random.key(seed))

    def update(
        updates: Tree, state: PerturbationState, params: Tree = None, **extra: Any
    ) -> tuple[Tree, PerturbationState]:
        del extra
        if p.kind == 'gradient':
            updates = perturb_gradients(p, updates, state.key, state.step, feature_axes)
        elif p.kind != 'none':
            if params is None:
                raise ValueError(f'kind={p.kind!r}: update needs the parameters')
            new = optax.apply_updates(params, updates)
            perturbed = perturb_weights(p, new, state.key, state.step + 1, feature_axes)
            updates = jax.tree.map(lambda u, x, y: u + (y - x), updates, new, perturbed)
        return updates, PerturbationState(state.step + 1, state.key)

    return optax.GradientTransformationExtraArgs(init, update)
