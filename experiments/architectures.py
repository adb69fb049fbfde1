"""Which architectures keep equal features equal to the bit, and when does noise let them learn?

    python -m experiments.architectures [--steps=300] [--workdir=DIR]

Small networks as they are written in Flax and Equinox, with constant initial weights and residual
branches that start at 0, on scikit-learn's digits or, the GPT, on the descriptions of its data
sets. Their feature axes are inferred and tried out. Each is trained without noise, to see whether
and when the symmetry breaks by itself, and with noise of 1e-6 on all weights; the onset of the
latter is predicted by the linear law. Needs the extra `test` (Equinox).
"""

import math
import pathlib
import shlex
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.nn.initializers import zeros
from sklearn import datasets

from experiments import runs
from zerojax import own_model, symmetry
from zerojax.host import figures, paths
from zerojax.host.command import run_command
from zerojax.host.stop import exit_on_signals
from zerojax.host.terminal import say
from zerojax.measure.prediction import largest
from zerojax.measure.stability import ONSET
from zerojax.models.initializers import averaging
from zerojax.run import checks, cli, data

SCALE = 1e-6
SGD = optax.sgd(0.1, momentum=0.9)
FASTER_SGD = optax.sgd(0.3, momentum=0.9)
BATCH = 32
CONTEXT = 32  # characters
Tree = Any


def constant_fan(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any) -> Any:
    """1 / number of inputs: every output is their mean. For kernels of any number of axes."""
    del key
    return jnp.full(shape, shape[-1] / math.prod(shape), dtype)


def same_for_features(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    """N(0, 1) for each word or position, the same in all features."""
    return jnp.broadcast_to(jax.random.normal(key, (*shape[:-1], 1), dtype), shape)


def attend(x: Any, mask: Any = None) -> Any:
    """Attention of two heads as Flax has it, which puts out 0 at the start."""
    return nn.MultiHeadDotProductAttention(
        num_heads=2, kernel_init=constant_fan, out_kernel_init=zeros
    )(x, mask=mask)


def mix(x_BxTxC: Any, hidden: int) -> Any:
    y_BxTxH = nn.gelu(nn.Dense(hidden, kernel_init=constant_fan)(x_BxTxC))
    return nn.Dense(x_BxTxC.shape[-1], kernel_init=zeros)(y_BxTxH)


def patches(images_BxHxW: Any) -> Any:
    """Of 2x2 pixels, [B, 16, 4]."""
    return images_BxHxW.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)


class Mixer(nn.Module):
    epsilon: float | None = None  # of LayerNorm; None: there is none

    @nn.compact
    def __call__(self, images: Any) -> Any:
        def norm(x: Any) -> Any:
            return x if self.epsilon is None else nn.LayerNorm(self.epsilon)(x)

        x_BxTxC = nn.Dense(32, kernel_init=constant_fan)(patches(images))
        x_BxTxC += mix(norm(x_BxTxC).swapaxes(1, 2), 32).swapaxes(1, 2)
        x_BxTxC += mix(norm(x_BxTxC), 64)
        return nn.Dense(10, kernel_init=zeros)(norm(x_BxTxC).mean(axis=1))


class ViT(nn.Module):
    @nn.compact
    def __call__(self, images: Any) -> Any:
        x_BxTxC = nn.Dense(32, kernel_init=constant_fan)(patches(images))
        x_BxTxC += self.param('positions', same_for_features, (16, 32))
        x_BxTxC += attend(nn.LayerNorm()(x_BxTxC))
        x_BxTxC += mix(nn.LayerNorm()(x_BxTxC), 64)
        return nn.Dense(10, kernel_init=zeros)(nn.LayerNorm()(x_BxTxC).mean(axis=1))


class GPT(nn.Module):
    words: int

    @nn.compact
    def __call__(self, words_BxT: Any) -> Any:
        x_BxTxC = nn.Embed(self.words, 32, embedding_init=same_for_features)(words_BxT)
        x_BxTxC += self.param('positions', same_for_features, (CONTEXT, 32))
        mask = nn.make_causal_mask(words_BxT)
        x_BxTxC += attend(nn.LayerNorm()(x_BxTxC), mask)
        x_BxTxC += mix(nn.LayerNorm()(x_BxTxC), 64)
        return nn.Dense(self.words, kernel_init=zeros)(nn.LayerNorm()(x_BxTxC))


class ResNet(nn.Module):  # as in Flax's examples: the last scale of a block starts at 0
    @nn.compact
    def __call__(self, images_BxHxW: Any) -> Any:
        def conv(features: int, size: int = 3, stride: int = 1) -> Any:
            return nn.Conv(features, (size, size), stride, use_bias=False, kernel_init=averaging())

        def norm(scale_init: Any = nn.initializers.ones) -> Any:
            return nn.BatchNorm(use_running_average=False, scale_init=scale_init)

        x = nn.relu(norm()(conv(16)(images_BxHxW[..., None])))
        for features, stride in ((16, 1), (32, 2)):
            y = nn.relu(norm()(conv(features, stride=stride)(x)))
            y = norm(zeros)(conv(features)(y))
            if x.shape != y.shape:
                x = norm()(conv(features, 1, stride)(x))
            x = nn.relu(x + y)
        return nn.Dense(10, kernel_init=zeros)(x.mean(axis=(1, 2)))


class Residual(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(64, 32, kernel_init=constant_fan, rngs=rngs)
        self.up = nnx.Linear(32, 48, kernel_init=constant_fan, rngs=rngs)
        self.down = nnx.Linear(48, 32, kernel_init=zeros, rngs=rngs)
        self.head = nnx.Linear(32, 10, kernel_init=zeros, rngs=rngs)

    def __call__(self, images: Any) -> Any:
        x = self.embed(images.reshape(-1, 64))
        return self.head(x + self.down(nnx.gelu(self.up(x))))


def digits(steps: int) -> list[tuple[Any, Any]]:
    train = data.load('digits', None, 'train', 'test').train
    images = np.asarray(train.images[..., 0], np.float32) / 8 - 1
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(len(images))[:BATCH] for _ in range(steps)]
    return [(images[batch], train.labels[batch]) for batch in chosen]


def text(steps: int) -> tuple[int, list[tuple[Any, Any]]]:
    """Number of different characters; batches of contexts, and of the characters that follow."""
    loaders = (datasets.load_breast_cancer, datasets.load_diabetes, datasets.load_digits,
               datasets.load_iris, datasets.load_linnerud, datasets.load_wine)  # fmt: skip
    letters = ''.join(load()['DESCR'] for load in loaders)
    alphabet = sorted(set(letters))
    words = np.array([alphabet.index(letter) for letter in letters], np.int32)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(steps):
        at = rng.integers(0, len(words) - CONTEXT, (BATCH, 1)) + np.arange(CONTEXT + 1)
        found.append((words[at[:, :-1]], words[at[:, 1:]]))
    return len(alphabet), found


def loss(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def linen(network: nn.Module, batches: list[Any], tx: Any = SGD) -> own_model.Model:
    """Statistics of BatchNorm are those of the batch; nothing reads their running averages."""
    variables = network.init(jax.random.key(0), batches[0][0])
    rest = {name: x for name, x in variables.items() if name != 'params'}

    def apply(params: Tree, inputs: Any) -> Any:
        return network.apply({'params': params, **rest}, inputs, mutable=list(rest))[0]

    return own_model.Model(apply, variables['params'], tx, loss, batches)


def in_nnx(steps: int) -> own_model.Model:
    graph, params = nnx.split(Residual(nnx.Rngs(0)))
    return own_model.Model(
        lambda params, images: nnx.merge(graph, params)(images), params, SGD, loss, digits(steps)
    )


def in_equinox(width: int, classes: int = 10) -> Callable[[int], own_model.Model]:
    def model(steps: int) -> own_model.Model:
        import equinox as eqx

        key = jax.random.key(0)
        mlp = eqx.nn.MLP(64, classes, width, depth=1, activation=jnp.tanh, key=key)
        params, rest = eqx.partition(mlp, eqx.is_array)
        params = jax.tree.map(
            lambda x: jnp.full_like(x, 1 / x.shape[-1] if x.ndim == 2 else 0.0), params
        )

        def apply(params: Tree, images: Any) -> Any:
            return jax.vmap(eqx.combine(params, rest))(images.reshape(-1, 64))

        batches = [(images, labels % classes) for images, labels in digits(steps)]
        return own_model.Model(apply, params, SGD, loss, batches)

    return model


def gpt(steps: int) -> own_model.Model:
    words, batches = text(steps)
    return linen(GPT(words), batches, optax.adamw(1e-3, eps_root=1e-8))


ARCHITECTURES: dict[str, Callable[[int], own_model.Model]] = {
    'Mixer, no LayerNorm': lambda steps: linen(Mixer(), digits(steps), FASTER_SGD),
    'Mixer, no LayerNorm, AdamW': lambda steps: linen(
        Mixer(), digits(steps), optax.adamw(3e-3, eps_root=1e-8)
    ),
    'Mixer': lambda steps: linen(Mixer(1e-6), digits(steps)),
    'Mixer, epsilon 0.1': lambda steps: linen(Mixer(0.1), digits(steps)),
    'ViT': lambda steps: linen(ViT(), digits(steps)),
    'GPT block, AdamW': gpt,
    'ResNet, BatchNorm': lambda steps: linen(ResNet(), digits(steps), FASTER_SGD),
    'Equinox MLP, 32 wide': in_equinox(32),
    'Equinox MLP, 7 wide, 3 classes': in_equinox(7, 3),
    'NNX residual MLP': in_nnx,
}


def first(reached: np.ndarray) -> str:
    """The first step at which something holds."""
    return str(int(np.argmax(reached))) if reached.any() else '-'


def study(name: str, steps: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The row of an architecture; the largest asymmetry [steps + 1], predicted and measured."""
    model = ARCHITECTURES[name](steps)
    inputs, _ = model.batches[0]
    symmetry.check_feature_axes(
        lambda params, x: model.call(model.apply, params, x), model.params, inputs[:2], model.axes
    )
    alone = own_model.measure(model, 0.0, steps)
    broken = {stream: x for stream, x in alone.items() if x.any()}
    noisy = np.max(list(own_model.measure(model, SCALE, steps).values()), axis=0)
    prediction = own_model.predict(model, (SCALE,), steps)
    predicted = np.exp(np.minimum(largest(prediction.linear[SCALE]), 100))  # beyond, all is lost
    unperturbed = np.max(list(alone.values()), axis=0)
    row = {
        'architecture': name,
        'streams': sum(count > 1 for count in model.streams.values()),
        'without noise': 'equal to the bit'
        if not broken
        else f'{len(broken)} broken at step {first(unperturbed > 0)}',
        'onset then': first(unperturbed >= ONSET),
        'growth a step': f'{max(x or 0.0 for x in prediction.growth.values()):+.3f}',
        'onset predicted': first(predicted >= ONSET),
        'onset measured': first(noisy >= ONSET),
    }
    return row, {'predicted': predicted, 'measured': noisy, 'without noise': unperturbed}


def draw(curves: dict[str, dict[str, np.ndarray]], path: pathlib.Path) -> None:
    rows = -(-len(curves) // 3)
    figure, panels = runs.new_figure(rows, 3, width=11, height=3 * rows)
    for axes, (name, of_name) in zip(np.ravel(panels), curves.items(), strict=False):
        for i, (label, curve) in enumerate(of_name.items()):
            shown = np.where((curve > 0) & (curve < 10), curve, np.nan)
            axes.plot(shown, label=label, **runs.style(i))
        axes.axhline(ONSET, color='0.5', lw=0.8)
        axes.set(yscale='log', title=name, xlabel='step', ylabel='asymmetry')
    for axes in np.ravel(panels)[len(curves) :]:
        axes.set_axis_off()
    np.ravel(panels)[0].legend()
    for suffix in ('.png', '.pdf'):
        figure.savefig(path.with_suffix(suffix), dpi=150)


def run(argv: list[str]) -> None:
    values = cli.text_flags(steps='300', workdir='runs/experiments/architectures')
    cli.parse(argv, values)
    steps = cli.count(values, 'steps', least=2)
    workdir = paths.meant(values.workdir, f'--workdir={values.workdir}')
    checks.check_devices()
    cli.make_folder(workdir)
    rows, curves = [], {}
    for name in ARCHITECTURES:
        row, curves[name] = study(name, steps)
        say(', '.join(f'{key}: {value}' for key, value in row.items()))
        rows.append(row)
    path = workdir / 'figure.png'
    figures.try_to_draw(path, lambda: draw(curves, path))
    command = shlex.join(['python', '-m', 'experiments.architectures', *argv[1:]])
    runs.save_table(workdir, command, f'{steps} steps, batches of {BATCH}; {runs.machine()}.', rows)


if __name__ == '__main__':
    sys.exit(run_command(run, sys.argv, __doc__, exit_on_signals))
