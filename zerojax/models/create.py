"""A network from its name and plain arguments, as a config holds them."""

import inspect
from collections.abc import Callable

from zerojax.models import constnet, leakynet, mlp, wide_resnet
from zerojax.models.arguments import require, require_default, require_one_of
from zerojax.models.constnet import DROPOUT_PLACES, SHORTCUTS, ConstNet
from zerojax.models.convolutions import CHOICES
from zerojax.models.layers import PRECISIONS
from zerojax.models.leakynet import LeakyNet
from zerojax.models.mlp import MLP
from zerojax.models.wide_resnet import WideResNet

Network = ConstNet | LeakyNet | MLP | WideResNet

# Each takes those arguments of `create` that its network has a use for, and checks what only it
# can: depth, init and what goes with them. Values that no network allows are refused before.
NETWORKS: dict[str, Callable[..., Network]] = {
    'constnet': constnet.create,
    'leakynet': leakynet.create,
    'mlp': mlp.create,
    'wideresnet': wide_resnet.create,
}
DTYPES = (None, 'bfloat16')


def create(
    name: str,
    *,
    depth: int = 16,
    width: int = 10,
    num_classes: int = 10,
    init: str = 'averaging',
    dropout: float = 0.0,
    dropout_at: str = 'blocks',
    shortcut: str = 'post_relu',
    sigma_w: float | None = None,
    negative_slope: float = 0.01,
    unique_features: int | None = None,
    convolution: str = 'auto',
    precision: str = 'highest',
    dtype: str | None = None,
) -> Network:
    """Builds a network.

    Args:
        name: 'constnet', 'leakynet', 'mlp' (the toy) or 'wideresnet' (the ordinary baseline).
        depth: of 'constnet' and 'leakynet' 3n + 4, of 'wideresnet' 6n + 4, with n >= 1 blocks in
            each of the three stages; 'mlp' has no use for it.
        width: the widen factor k: stages have 16k, 32k and 64k features; of 'mlp' the number of
            hidden features.
        num_classes: number of logits.
        init: of 'constnet' one of `constnet.INITS`, see `constnet.kernels`; of 'leakynet' a letter
            for the stem and for each block, see `initializers.lettered`, underscores ignored; of
            'mlp' 'random' or 'averaging'; of 'wideresnet' 'he' or 'fixup'. The head starts at 0.
        dropout: rate of dropout, in [0, 1).
        dropout_at: 'blocks' (of 'constnet' on each block convolution's output, of 'leakynet' behind
            each leaky ReLU, of 'wideresnet' before the second convolution of each block) or 'stem'
            (on the stem's output only; 'constnet').
        shortcut: what the 1x1 shortcut of 'constnet' reads, 'post_relu' (the paper's code) or
            'pre_relu'; see `ConstNetBlock`.
        sigma_w: noise of 'constnet', from 0 to 1e6: with init 'averaging' the block convolutions
            start as N(0, 2 sigma_w / fan_out) (default 0), with 'random' all of them scale
            (default 1).
        negative_slope: of the leaky ReLU of 'leakynet', 0 or from 1e-6 to below 1.
        unique_features: of 'mlp' with init 'random', from 1 to `width` (default: all).
        convolution: how a convolution is computed: 'direct' (XLA's convolution), 'patches' (one
            matrix product), 'mixed' (each pass as is fastest on a CPU, with BatchNorm's sums as
            products too) or 'auto': 'mixed' on CPUs, else 'direct'. Equal up to rounding. On CPUs
            'direct' and 'mixed' are slow inside of loops, `jax.vmap` and `jax.lax.cond` (as of a
            perturbation of layers that acts in some steps); there take 'patches'. 'mlp' has no use
            for it.
        precision: of all products, forward and backward, see `jax.lax.Precision`: 'highest' (of
            float32 in float32), 'high' or 'default'. With 'default' GPUs round the factors to TF32
            and TPUs to bfloat16, to which 1 + 1e-6 is 1; CPUs make no difference.
        dtype: 'bfloat16' is mixed precision: convolutions and activations in bfloat16, but
            parameters, statistics of BatchNorm, head and loss in float32. None: all in the dtype
            of the parameters. 'mlp' has no use for it.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    arguments = locals()
    require_one_of(NETWORKS, 'name', arguments.pop('name'))
    require_one_of(DROPOUT_PLACES, 'dropout_at', dropout_at)
    require_one_of(SHORTCUTS, 'shortcut', shortcut)
    require_one_of(CHOICES, 'convolution', convolution)
    require_one_of(PRECISIONS, 'precision', precision)
    require(dtype in DTYPES, 'dtype', dtype, 'must be None or bfloat16')
    require(1 <= width <= 2**20, 'width', width, f'must be from 1 to {2**20}')
    require(num_classes >= 1, 'num_classes', num_classes, 'must be at least 1')
    require(0 <= dropout < 1, 'dropout', dropout, 'must be at least 0 and below 1')
    slope_fits = negative_slope == 0 or 1e-6 <= negative_slope < 1
    slopes = 'must be 0, or from 1e-6 to below 1'
    require(slope_fits, 'negative_slope', negative_slope, slopes)
    defaults = inspect.signature(create).parameters
    used = inspect.signature(NETWORKS[name]).parameters
    for argument, value in arguments.items():
        if argument not in used:
            require_default(defaults[argument].default, argument, value, name, init)
    return NETWORKS[name](**{argument: arguments[argument] for argument in used})
