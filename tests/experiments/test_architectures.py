"""The networks of other people's libraries: what is inferred of them, and the table they end in."""

import csv

import jax
import numpy as np
import pytest

from experiments import architectures
from zerojax import own_model
from zerojax.host.errors import UsageError


@pytest.fixture(autouse=True)
def standard_promotion():
    """As users have it."""
    with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
        yield


STREAMS = {  # numbers of features; of attention those that queries and keys share, and values
    'Mixer, no LayerNorm': [32, 32, 64],
    'Mixer, no LayerNorm, AdamW': [32, 32, 64],
    'Mixer': [32, 32, 64],
    'Mixer, epsilon 0.1': [32, 32, 64],
    'ViT': [2, 16, 16, 32, 64],
    'GPT block, AdamW': [2, 16, 16, 32, 64],
    'ResNet, BatchNorm': [16, 16, 32, 32],
    'Equinox MLP, 32 wide': [32],
    'Equinox MLP, 7 wide, 3 classes': [7],
    'NNX residual MLP': [32, 48],
}


@pytest.mark.parametrize('name', architectures.ARCHITECTURES)
def test_every_architectures_streams_are_found_and_start_equal(name):
    model = architectures.ARCHITECTURES[name](2)
    assert sorted(count for count in model.streams.values() if count > 1) == STREAMS[name]
    own_model.check_predictable(model)


def test_it_ends_in_a_table_and_a_figure(monkeypatch, tmp_path, capsys):
    chosen = {name: architectures.ARCHITECTURES[name] for name in ('NNX residual MLP',)}
    monkeypatch.setattr(architectures, 'ARCHITECTURES', chosen)
    architectures.run(['architectures', '--steps=3', f'--workdir={tmp_path}/a'])
    with open(tmp_path / 'a' / 'table.csv') as file:
        (row,) = csv.DictReader(file)
    assert row['architecture'] == 'NNX residual MLP' and row['streams'] == '2'
    assert (row['without noise'], row['onset then']) == ('equal to the bit', '-')
    assert row['onset predicted'] == row['onset measured'] == '-'
    assert float(row['growth a step']) < 1
    assert 'experiments.architectures --steps=3' in (tmp_path / 'a' / 'table.md').read_text()
    assert (tmp_path / 'a' / 'figure.png').exists()
    assert 'NNX residual MLP' in capsys.readouterr().out
    with pytest.raises(UsageError, match='--steps=1: must be a whole number of at least 2'):
        architectures.run(['architectures', '--steps=1'])


def test_the_text_is_of_characters_and_the_next_one_is_asked_for():
    count, ((words, following), *_) = architectures.text(2)
    assert words.shape == following.shape == (32, 32) and words.dtype == np.int32
    np.testing.assert_array_equal(words[:, 1:], following[:, :-1])
    assert 50 < count < 200 and words.max() < count
