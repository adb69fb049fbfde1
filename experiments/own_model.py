"""Models that zerojax does not ship, from their declaration to the predicted and measured onset.

python -m experiments.own_model
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from zerojax import perturb, symmetry
from zerojax.measure import noise, stability
from zerojax.models.initializers import averaging, zeros
from zerojax.run import data
from zerojax.step import jit_in_mode


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


def layer(*kernel_axes):  # the features that index each axis of a kernel, and its bias
    return {'kernel': kernel_axes, 'bias': kernel_axes[1:]}


MLP_AXES = {'hidden': layer(None, 'h'), 'head': layer('h', None)}
MIXER_AXES = {'embed': layer(None, 'c'), 'head': layer('c', None), 'tokens': layer(None, None)}
MIXER_AXES |= {'up': layer('c', 'h'), 'down': layer('h', 'c')}


def study(name, apply, params, axes, tx, images, labels):
    def loss(params, batch):
        return optax.softmax_cross_entropy(apply(params, images[batch]), labels[batch]).mean()

    def step(state, batch):  # (params, optimizer state), batch -> the same
        updates, opt_state = tx.update(jax.grad(loss)(state[0], batch), state[1], state[0])
        return optax.apply_updates(state[0], updates), opt_state

    jitted = jit_in_mode(step, 'deterministic')
    start, key = (params, tx.init(params)), jax.random.key(0)
    batches = [jax.random.permutation(jax.random.key(i), 1437)[:128] for i in range(300)]
    floor = noise.measure_noise(step, start, batches[0], compilations=2)['one executable']
    print(f'{name}: noise of its own at most {max(x.ulps for x in floor.values())} ULPs')
    tangents = stability.gaussian_tangents(params, key[None])
    growth = stability.growth(step, start, batches, tangents, axes)
    for epsilon in (1e-8, 1e-6, 1e-4):
        perturbed = perturb.gaussian(params, key, epsilon), start[1]
        states = itertools.accumulate(batches, jitted, initial=perturbed)
        measured = [max(symmetry.asymmetry(state[0], axes).values()) for state in states]
        onset = next((n for n, x in enumerate(measured) if x >= 0.1), None)
        predicted = stability.predict_onset(growth.log_asymmetry[:, 0], epsilon)
        print(f'  epsilon {epsilon:g}: onset predicted at step {predicted}, measured at {onset}')


if __name__ == '__main__':
    train = data.load('digits', None, 'train', 'test').train
    digits = jnp.asarray(train.images[..., 0]) / 8.0 - 1.0, jax.nn.one_hot(train.labels, 10)
    params = Mixer().init(jax.random.key(0), digits[0][:1])['params']
    mixer, tx = lambda params, x: Mixer().apply({'params': params}, x), optax.sgd(0.1, 0.9)
    study('Linen mixer', mixer, params, MIXER_AXES, tx, *digits)
    graph, params = nnx.split(MLP(nnx.Rngs(0)))
    mlp, tx = lambda params, x: nnx.merge(graph, params)(x), optax.adam(1e-3, eps_root=1e-8)
    study('NNX MLP', mlp, nnx.to_pure_dict(params), MLP_AXES, tx, *digits)
