import pathlib
import subprocess
import sys

import numpy as np
import pytest

from zerojax.config import DATASETS, default_config
from zerojax.host.errors import UsageError
from zerojax.run import building, data


def test_digits_are_split_without_overlap_and_evenly():
    digits = data.load('digits', None, 'train', 'test')
    assert digits.train.images.shape == (1437, 8, 8, 1)
    assert digits.eval.images.shape == (360, 8, 8, 1)
    assert digits.train.images.dtype == np.uint8
    assert digits.train.labels.dtype == np.int32
    assert set(np.bincount(digits.eval.labels)) <= {34, 35, 36, 37}
    train = {image.tobytes() for image in digits.train.images}
    assert not any(image.tobytes() in train for image in digits.eval.images)


@pytest.mark.parametrize(
    'arguments,message',
    [
        (('imagenet', None, 'train', 'test'), "dataset.name='imagenet': must be one of digits, "),
        (('digits', None, 'train[:10]', 'test'), r"dataset.train_split='train\[:10\]'"),
        (('digits', None, 'train', 'all'), "dataset.eval_split='all'"),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        data.load(*arguments)


@pytest.mark.parametrize('name', DATASETS)
def test_what_stands_for_a_set_has_its_size_and_takes_no_memory(name):
    config = default_config()
    config.dataset.name = name
    facts = DATASETS[name]
    config.dataset.eval_split = list(facts.splits)[1]
    dataset = data.stand_in(config)
    assert (dataset.image_shape, dataset.num_classes) == (facts.image_shape, facts.num_classes)
    for split, of in ((dataset.train, 'train'), (dataset.eval, config.dataset.eval_split)):
        assert split.images.shape == (facts.splits[of], *facts.image_shape)
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        assert split.images.base.nbytes == 1
        rows = building.examples_of(split)['image']
        assert rows.shape == (facts.splits[of], np.prod(facts.image_shape)), 'see examples_of'
        assert np.shares_memory(rows, split.images)


def test_the_facts_of_the_digits_are_true():
    digits, facts = data.load('digits', None, 'train', 'test'), DATASETS['digits']
    assert (digits.image_shape, digits.num_classes) == (facts.image_shape, facts.num_classes)
    assert {'train': len(digits.train.labels), 'test': len(digits.eval.labels)} == facts.splits


# TFDS itself warns of deprecations on import and leaves files to the garbage collector.
tfds_warnings = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def prepared(tmp_path_factory) -> pathlib.Path:
    """A real TFDS directory with sets of 40 + 20 random images, made without TensorFlow."""
    root = tmp_path_factory.mktemp('tfds')
    script = pathlib.Path(__file__).parent / 'make_tiny_tfds.py'
    names = [name for name in DATASETS if name not in ('digits', 'fashion_mnist')]  # as mnist
    command = [sys.executable, str(script), str(root), *names]
    subprocess.run(command, check=True, capture_output=True)
    return root


def expected_pixels(split: str, index: int) -> np.ndarray:
    return np.random.default_rng([split == 'train', index]).integers(0, 256, (32, 32, 3), np.uint8)


@tfds_warnings
def test_a_prepared_tfds_set_is_read_exactly(prepared):
    cifar = data.load('cifar10', str(prepared), 'train', 'test[:5]')
    assert cifar.num_classes == 10
    assert cifar.train.images.shape == (40, 32, 32, 3)
    assert cifar.eval.images.shape == (5, 32, 32, 3)
    expected = {expected_pixels('train', i).tobytes(): i % 10 for i in range(40)}
    read = {
        image.tobytes(): label
        for image, label in zip(cifar.train.images, cifar.train.labels, strict=True)
    }
    assert read == expected


@tfds_warnings
@pytest.mark.parametrize('split', ['validation', 'train[:', 'train[:0]'])
def test_a_bad_split_is_named(prepared, split):
    with pytest.raises(UsageError, match=r'^dataset\.train_split='):
        data.load('cifar10', str(prepared), split, 'test')
    config = default_config()
    config.dataset.name, config.dataset.train_split = 'cifar10', split
    with pytest.raises(UsageError, match=r'^dataset\.train_split='):
        data.stand_in(config)


@tfds_warnings
@pytest.mark.parametrize(
    'split,count', [('train[:5000]', 5000), ('train[10%:30%]', 10_000), ('train+test', 60_000)]
)
def test_parts_of_a_set_are_counted_without_it(split, count):
    config = default_config()
    config.dataset.name, config.dataset.train_split = 'cifar10', split
    assert len(data.stand_in(config).train.labels) == count


@tfds_warnings
def test_a_damaged_set_is_named(prepared, tmp_path):
    import shutil

    shutil.copytree(prepared, tmp_path / 'copy')
    (record,) = (tmp_path / 'copy').glob('cifar10/*/cifar10-train.array_record*')
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(UsageError, match=r'dataset\.data_dir: .* cannot be read'):
        data.load('cifar10', str(tmp_path / 'copy'), 'train', 'test')


@tfds_warnings
def test_a_half_prepared_set_is_named(prepared, tmp_path):
    import shutil

    shutil.copytree(prepared, tmp_path / 'copy')
    (damaged,) = (tmp_path / 'copy').glob('cifar10/*/dataset_info.json')
    damaged.unlink()
    with pytest.raises(
        UsageError, match=rf'{damaged.parent} cannot be read \(dataset_info\.json is'
    ):
        data.load('cifar10', str(tmp_path / 'copy'), 'train', 'test')


@tfds_warnings
def test_a_damaged_archive_is_named_before_tensorflow_is_needed(tmp_path):
    archive = tmp_path / 'downloads' / 'manual' / 'cifar-10-binary.tar.gz'
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b'half of it')
    with pytest.raises(UsageError, match=rf'{archive} is damaged, its SHA-256 is not that of http'):
        data.load('cifar10', str(tmp_path), 'train', 'test')
    assert list(tmp_path.iterdir()) == [tmp_path / 'downloads']


def test_damaged_digits_are_a_mistake(monkeypatch):
    def load_digits():
        raise EOFError('Compressed file ended before the end-of-stream marker was reached')

    monkeypatch.setattr('sklearn.datasets.load_digits', load_digits)
    with pytest.raises(UsageError, match=r"'digits': .* \(Compressed file .*\); install"):
        data.load('digits', None, 'train', 'test')


@tfds_warnings
@pytest.mark.parametrize(
    'name,shape,classes,held_out',
    [
        ('cifar100', (32, 32, 3), 100, 'test'),
        ('mnist', (28, 28, 1), 10, 'test'),
        ('svhn_cropped', (32, 32, 3), 10, 'test'),
        ('imagenet_resized/32x32', (32, 32, 3), 1000, 'validation'),
    ],
)
def test_every_set_is_read(prepared, name, shape, classes, held_out):
    loaded = data.load(name, str(prepared), 'train', held_out)
    assert loaded.num_classes == classes
    assert loaded.train.images.shape == (40, *shape)
    assert loaded.eval.images.shape == (20, *shape)
    assert sorted(loaded.train.labels) == sorted(i % 10 for i in range(40))
