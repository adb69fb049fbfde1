"""Models that zerojax does not ship, from function and weights to predicted and measured onset.

python -m experiments.own_model
python -m zerojax.predict --model=experiments.own_model:mixer
"""

import flax.linen as nn
import jax
import numpy as np
import optax
from flax import nnx

from zerojax import own_model
from zerojax.models.initializers import averaging, zeros
from zerojax.run import data


class Mixer(nn.Module):  # rows of pixels are tokens T; features C are mixed, H are hidden
    @nn.compact
    def __call__(self, x_BxTxW):
        x_BxTxC = nn.Dense(32, kernel_init=averaging(), name='embed')(x_BxTxW)
        y_BxCxT = nn.gelu(x_BxTxC).swapaxes(1, 2)
        x_BxTxC += nn.Dense(8, kernel_init=zeros, name='tokens')(y_BxCxT).swapaxes(1, 2)
        y_BxTxH = nn.gelu(nn.Dense(64, kernel_init=averaging(), name='up')(x_BxTxC))
        x_BxTxC += nn.Dense(32, kernel_init=zeros, name='down')(y_BxTxH)
        return nn.Dense(10, kernel_init=zeros, name='head')(x_BxTxC.mean(axis=1))


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 48, kernel_init=averaging(), rngs=rngs)
        self.head = nnx.Linear(48, 10, kernel_init=zeros, rngs=rngs)

    def __call__(self, x_BxHxW):
        return self.head(nnx.gelu(self.hidden(x_BxHxW.reshape(-1, 64))))


def batches():
    train = data.load('digits', None, 'train', 'test').train
    images, rng = train.images[..., 0].astype(np.float32) / 8 - 1, np.random.default_rng(0)
    chosen = [rng.permutation(len(images))[:128] for _ in range(300)]
    return [(images[batch], train.labels[batch]) for batch in chosen]


def loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mixer():
    params = Mixer().init(jax.random.key(0), batches()[0][0])
    return Mixer().apply, params, optax.sgd(0.1, 0.9), loss, batches()


def mlp():
    graph, params = nnx.split(MLP(nnx.Rngs(0)))

    def apply(params, x):
        return nnx.merge(graph, params)(x)

    return apply, params, optax.adam(1e-3, eps_root=1e-8), loss, batches()


if __name__ == '__main__':
    for parts in (mixer, mlp):
        model = own_model.Model(*parts())
        print(f'\n{parts.__name__}\n{model.report}')
        print(own_model.predict(model, scales=(1e-8, 1e-6, 1e-4)))
        for scale in (0, 1e-8, 1e-6, 1e-4):
            largest = np.max(list(own_model.measure(model, scale).values()), axis=0)
            onset = np.argmax(largest >= 0.1) if (largest >= 0.1).any() else 'never'
            print(f'noise of {scale:g}: asymmetry {np.nanmax(largest):.2g} at most, onset {onset}')
