"""How do signal and gradient travel through the layers at the start, for every initialisation?

    python -m experiments.signal

Nothing is trained: one batch of the config's training images goes forward and backward through each
network at depth 28 (BatchNorm by the batch), in three minutes on two CPU cores. All heads start at
0, which stops every gradient, so the gradient here is that of a random linear readout of the pooled
features, N(0, 1/features). Measured at the output of each layer: mean square of the signal, mean
square of the gradient, the effective width, the number of unique features; geometric means over
seeds. `--config` gives width, batch and images; layers.csv holds every number. See
`experiments.runs` for flags.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import runs
from zerojax import models
from zerojax.host import records
from zerojax.host.terminal import say
from zerojax.measure import metrics
from zerojax.run import data
from zerojax.run.checks import resolve
from zerojax.step.batch import normalize
from zerojax.step.determinism import jit_in_mode

DEPTH = 28
NETWORKS: dict[str, dict[str, Any]] = {
    'ConstNet': {'name': 'constnet', 'init': 'averaging'},
    'random control': {'name': 'constnet', 'init': 'random'},
    'He': {'name': 'constnet', 'init': 'he'},
    'Delta-Orthogonal': {'name': 'constnet', 'init': 'delta_orthogonal'},
    'ZerO (Hadamard)': {'name': 'constnet', 'init': 'hadamard'},
    'LeakyNet, averaging': {'name': 'leakynet', 'init': '1' * (DEPTH - 3)},
    'LeakyNet, identity': {'name': 'leakynet', 'init': 'i' * (DEPTH - 3)},
    'LeakyNet, random': {'name': 'leakynet', 'init': 'h' * (DEPTH - 3)},
    'Wide ResNet': {'name': 'wideresnet', 'init': 'he'},
    'Wide ResNet, Fixup': {'name': 'wideresnet', 'init': 'fixup'},
}
QUANTITIES = {
    'signal': 'mean square of the signal',
    'gradient': 'mean square of the gradient',
    'effective_width': 'effective width',
    'unique_activations': 'unique features',
}

Measured = dict[str, dict[str, float]]


def make_measurement(
    model: models.Network, images: jax.Array, mode: str
) -> Callable[[int], Measured]:
    """A function of a seed: {quantity: {layer: value}} of the newly initialised network.

    `images` [B, H, W, C] are what it is measured on.
    """

    def measure(key: jax.Array, images: jax.Array) -> dict[str, Any]:
        init_key, readout_key = jax.random.split(key)
        variables = model.init(init_key, images[:1], train=False)
        head = variables['params']['head']['kernel']
        readout = jax.random.normal(readout_key, (len(head),)) / jnp.sqrt(len(head))
        variables['params']['head']['kernel'] = jnp.zeros_like(head).at[:, 0].set(readout)

        def loss() -> jax.Array:
            logits, _ = model.apply(variables, images, train=True, mutable=['batch_stats'])
            return jnp.sum(logits[:, 0])

        return metrics.of_layer_outputs(*metrics.layer_outputs(loss, model.layers()))

    compiled = jit_in_mode(measure, mode)

    def measure_seed(seed: int) -> Measured:
        measured = jax.device_get(compiled(jax.random.key(seed), images))
        return {
            quantity: {layer: measured[quantity][layer].item() for layer in model.layers()}
            for quantity in QUANTITIES
        }

    return measure_seed


def run(experiment: runs.Experiment) -> None:
    dataset = data.load_of(experiment.config)
    config = resolve(experiment.config, dataset)
    images = jnp.asarray(dataset.train.images[: config.batch_size])
    images = normalize(images, *data.normalization(config))
    measured: dict[str, list[Measured]] = {}
    for network, arguments in NETWORKS.items():
        say(f'-- signal: {network}')
        model = models.create(
            **arguments,
            depth=DEPTH,
            width=config.model.width,
            num_classes=dataset.num_classes,
            convolution=config.model.convolution,
        )
        measure = make_measurement(model, images, config.determinism.mode)
        measured[network] = [measure(seed) for seed in range(experiment.seeds)]
    layers = [
        {
            'network': network,
            'seed': seed,
            'position': position,
            'layer': layer,
            **{quantity: values[quantity][layer] for quantity in QUANTITIES},
        }
        for network, per_seed in measured.items()
        for seed, values in enumerate(per_seed)
        for position, layer in enumerate(values['signal'])
    ]
    records.write_csv(experiment.workdir / 'layers.csv', layers)
    draw(experiment, measured)

    def ends(per_seed: list[Measured], quantity: str, position: int) -> list[float]:
        return [list(values[quantity].values())[position] for values in per_seed]

    def geometric_mean(values: list[float]) -> str:
        return f'{np.exp(np.mean(np.log(values))):.3g}'

    runs.write_table(
        experiment,
        [
            {
                'network': network,
                'n': len(per_seed),
                'signal at the stem': geometric_mean(ends(per_seed, 'signal', 0)),
                'at the last block': geometric_mean(ends(per_seed, 'signal', -1)),
                'gradient at the last block': geometric_mean(ends(per_seed, 'gradient', -1)),
                'at the stem': geometric_mean(ends(per_seed, 'gradient', 0)),
                'effective width of the last block': geometric_mean(
                    ends(per_seed, 'effective_width', -1)
                ),
                'its unique features': geometric_mean(ends(per_seed, 'unique_activations', -1)),
            }
            for network, per_seed in measured.items()
        ],
    )


def draw(experiment: runs.Experiment, measured: dict[str, list[Measured]]) -> None:
    figure, panels = runs.new_figure(2, 2, width=11, height=8)
    for axes, (quantity, label) in zip(panels.ravel(), QUANTITIES.items(), strict=True):
        axes.set(xlabel='depth (0: stem, 1: last block)', ylabel=label, yscale='log')
        for i, (network, per_seed) in enumerate(measured.items()):
            values = [list(seed[quantity].values()) for seed in per_seed]
            position = np.linspace(0, 1, len(values[0]))
            look = {**runs.style(i), **runs.marks(i), 'label': network, 'lw': 1.5}
            runs.plot_band(axes, position.tolist(), values, **look)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc='outside lower center',
        ncols=5,
        frameon=False,
    )
    runs.save_figure(experiment, figure)


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=3))
