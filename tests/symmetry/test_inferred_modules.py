"""Models written by others: Flax's own modules, Linen and NNX, and Equinox's."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from tests.symmetry.permuting import broken_streams
from zerojax import symmetry

TOKENS_BxTxC = np.random.default_rng(0).normal(size=(2, 7, 5))
IMAGES_BxHxWxC = np.random.default_rng(0).normal(size=(2, 8, 8, 3))


@pytest.fixture(autouse=True)
def usual_promotion():
    """Flax's and Equinox's modules need it."""
    with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
        yield


def inferred_axes(module, *inputs, collection='params'):
    """{path: names} of a Linen module's parameters; that each stream may be permuted is checked."""
    with jax.enable_x64(True):
        variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        inferred, broken = broken_streams(module.apply, variables, inputs)
    assert not broken
    return flatten_dict(inferred.axes[collection], sep='/'), inferred.report


class Block(nn.Module):
    """Of a transformer."""

    @nn.compact
    def __call__(self, x, _=None):
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        attention = nn.MultiHeadDotProductAttention(3, param_dtype=np.float64, name='attention')
        x = x + attention(nn.LayerNorm(name='norm1')(x), mask=mask)
        hidden = nn.gelu(nn.Dense(24, name='up')(nn.RMSNorm(name='norm2')(x)))
        return x + nn.Dense(x.shape[-1], name='down')(hidden), None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12, name='embed')(x)
        x = x + self.param('positions', nn.initializers.normal(), x.shape[1:])
        if self.scanned:
            layers = nn.scan(
                nn.remat(Block), variable_axes={'params': 0}, split_rngs={'params': True}, length=2
            )
            x, _ = layers(name='layers')(x, None)
        else:
            x, _ = Block(name='layers')(x)
        return nn.Dense(4, name='head')(nn.LayerNorm(name='norm')(x).mean(1))

    scanned: bool = False


@pytest.mark.parametrize('scanned', [False, True])
def test_a_transformer(scanned):
    """The residual stream, heads, their features and hidden features are streams; positions, inputs
    and classes are not. Layers that a scan goes over have the same ones."""
    axes, report = inferred_axes(Transformer(scanned), TOKENS_BxTxC)
    stream = 'params/embed'
    query, value, up = (
        f'params/layers/{name}' for name in ('attention/query', 'attention/value', 'up')
    )
    stacked = (None,) if scanned else ()
    first = len(stacked)
    heads, features = f'{query}/kernel.{first + 1}', f'{query}/kernel.{first + 2}'
    assert axes['embed/kernel'] == (None, stream)
    assert axes['positions'] == (None, stream)
    assert axes['layers/attention/query/kernel'] == (*stacked, stream, heads, features)
    assert axes['layers/attention/key/bias'] == (*stacked, heads, features)
    assert axes['layers/attention/value/kernel'] == (*stacked, stream, heads, value)
    assert axes['layers/attention/out/kernel'] == (*stacked, heads, value, stream)
    assert axes['layers/norm2/scale'] == (*stacked, stream)
    assert axes['layers/up/kernel'] == (*stacked, stream, up)
    assert axes['layers/down/kernel'] == (*stacked, up, stream)
    assert axes['head/kernel'] == (stream, None)
    assert 'positions axis 0' in report
    assert ('a loop goes along it' in report) == scanned


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(8, (3, 3), name='stem')(x)), (2, 2), (2, 2))
        y = nn.BatchNorm(use_running_average=True, name='batch_norm')(x)
        y = nn.Conv(8, (3, 3), feature_group_count=8, name='each')(y)
        x = x + nn.Conv(8, (1, 1), name='mix')(nn.InstanceNorm(name='instance_norm')(y))
        x = nn.GroupNorm(num_groups=1, name='one_group')(nn.Conv(6, (3, 3), name='next')(x))
        x = nn.ConvTranspose(9, (2, 2), strides=(2, 2), name='larger')(nn.PReLU(name='prelu')(x))
        x = nn.avg_pool(nn.Conv(8, (3, 3), name='grouped')(x), (2, 2))
        x = nn.GroupNorm(num_groups=4, name='groups')(x)
        x = nn.relu(nn.Conv(5, (3, 3), name='last')(x))
        return nn.Dense(4, name='head')(x.reshape(len(x), -1))


def test_a_convolutional_network():
    """A residual stream through BatchNorm, depthwise convolutions and pooling; groups of features
    and a flattened image have none, and the report says why."""
    axes, report = inferred_axes(ConvNet(), IMAGES_BxHxWxC)
    space = (None, None)
    assert axes['stem/kernel'] == (*space, None, 'params/stem')
    assert axes['each/kernel'] == (*space, None, 'params/stem')
    assert axes['mix/kernel'] == (*space, 'params/stem', 'params/stem')
    assert axes['batch_norm/scale'] == axes['instance_norm/bias'] == ('params/stem',)
    assert axes['next/kernel'] == (*space, 'params/stem', 'params/next')
    assert axes['one_group/scale'] == ('params/next',)
    assert axes['larger/kernel'] == (*space, 'params/next', 'params/larger')
    assert axes['grouped/kernel'] == (*space, 'params/larger', None)
    assert axes['last/kernel'] == axes['head/kernel'] + space == (None,) * 4
    assert 'its 8 positions are taken apart as 4 x 2' in report
    assert 'params/last/kernel axis 3: its 245 positions are taken apart as 49 x 5' in report
    statistics, _ = inferred_axes(ConvNet(), IMAGES_BxHxWxC, collection='batch_stats')
    assert statistics['batch_norm/mean'] == ('params/stem',)


class Language(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 6, name='embed', param_dtype=np.float64)
        x = embed(tokens)
        x = x + nn.RNN(nn.LSTMCell(6, param_dtype=np.float64), name='lstm')(x)
        x = x + nn.RNN(nn.OptimizedLSTMCell(6, param_dtype=np.float64), name='joined')(x)
        return embed.attend(nn.RNN(nn.GRUCell(6, param_dtype=np.float64), name='gru')(x))


def test_recurrent_cells_and_a_tied_embedding():
    """Each cell's state is a stream, tied to what it is added to; words are numbered."""
    axes, report = inferred_axes(Language(), np.array([[1, 2, 3], [4, 0, 1]]))
    assert axes['embed/embedding'] == (None, 'params/embed')
    assert axes['LSTMCell_0/hi/kernel'] == ('params/embed', 'params/embed')
    assert axes['OptimizedLSTMCell_0/hi/kernel'] == ('params/embed', 'params/embed')
    assert axes['GRUCell_0/hn/kernel'] == ('params/embed', 'params/embed')
    assert 'no name for params/embed/embedding axis 0: positions are chosen' in report


class Perceptron(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(5, 9, rngs=rngs)
        self.norm = nnx.BatchNorm(9, use_running_average=True, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(9, 9, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(9, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        for block in self.blocks:
            x = x + nnx.gelu(block(x))
        return self.head(x)


def test_an_nnx_module():
    """As a state, whose tree comes back with names in it, and as nested dictionaries."""
    graph, state = nnx.split(Perceptron(nnx.Rngs(0)))

    def apply(params, x):
        return nnx.merge(graph, params)(x)

    inferred, broken = broken_streams(apply, nnx.to_pure_dict(state), TOKENS_BxTxC)
    assert not broken
    assert inferred.axes['first']['kernel'] == (None, 'first')
    assert inferred.axes['norm']['mean'] == ('first',)
    assert inferred.axes['blocks'][1]['kernel'] == ('first', 'first')
    assert inferred.axes['head']['kernel'] == ('first', None)
    of_state = symmetry.infer_feature_axes(apply, state, TOKENS_BxTxC).axes
    assert nnx.to_pure_dict(of_state)['blocks'][1]['bias'] == inferred.axes['blocks'][1]['bias']


def equinox_function(module):
    """Its arrays, and the function of them and a batch of inputs."""
    arrays, rest = eqx.partition(module, eqx.is_array)
    return arrays, lambda arrays, *inputs: jax.vmap(eqx.combine(arrays, rest))(*inputs)


def test_an_equinox_perceptron():
    """Features put out stand first in Equinox's kernels; the module comes back with names in it."""
    arrays, apply = equinox_function(eqx.nn.MLP(5, 4, 8, 2, key=jax.random.key(0)))
    inferred, broken = broken_streams(apply, arrays, TOKENS_BxTxC[:, 0])
    assert not broken
    assert isinstance(inferred.axes, eqx.nn.MLP)
    assert [each.weight for each in inferred.axes.layers] == [
        ('layers/0', None), ('layers/1', 'layers/0'), (None, 'layers/1'),
    ]  # fmt: skip


def test_equinox_attention():
    """Heads and their features share an axis of the parameter there: neither is a stream."""
    arrays, apply = equinox_function(eqx.nn.MultiheadAttention(2, 6, key=jax.random.key(0)))
    inferred, broken = broken_streams(apply, arrays, (np.ones((3, 7, 6)),) * 3)
    assert not broken
    assert inferred.axes.query_proj.weight == (None, None)
    assert 'query_proj/weight axis 0' in inferred.report
    assert 'its 6 positions are taken apart as 2 x 3' in inferred.report
