"""Do the arms differ on real images as they do on the digits?

    python -m experiments.images --config=configs/fashion_mnist.py:cpu --seeds=3
    python -m experiments.images

The second is CIFAR-10 (configs/cifar.py:cpu) with one seed: an hour a run on two CPU cores, six
hours in all, by the time of a step. `--seeds` are those of the contrast (injected, none and the
random control); the other arms have one; on a GPU 'hardware', the paper's own, is among them
(elsewhere it is none). Both data sets must have been prepared, see the configs. See
`experiments.runs` for flags and restarts, `experiments.arms` for more arms.
"""

import sys

import jax

from experiments import arms, runs

LAST_STREAM = 'block3_0'
CONTRAST = ('ConstNet, injected 1e-6', 'ConstNet, deterministic', 'random control')
OTHERS = ('ConstNet, emulated order of additions', 'ConstNet, deterministic, dropout 0.01')


def others() -> dict[str, dict[str, object]]:
    """Arms beside those of the contrast; name of each: the fields that make it."""
    injected = arms.arms()['ConstNet, injected 1e-6']
    hardware = ('ConstNet, hardware',) if jax.default_backend() == 'gpu' else ()
    return {name: arms.arms()[name] for name in (*hardware, *OTHERS)} | {
        'ConstNet, last stream alone, injected 1e-6': {
            **injected,
            'perturbation.streams': (LAST_STREAM,),
        }
    }


def run(experiment: runs.Experiment) -> None:
    contrast = runs.train_all(experiment, {name: arms.arms()[name] for name in CONTRAST})
    arms.report(experiment, contrast + runs.train_all(experiment, others(), only_seed=0))


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=1, config_file='configs/cifar.py:cpu'))
