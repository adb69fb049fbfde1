import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zerojax.host.errors import UsageError
from zerojax.run import data

KEY = jax.random.key(0)


def test_digits_are_split_without_overlap_and_evenly():
    digits = data.load('digits', None, 'train', 'test')
    assert digits.train.images.shape == (1437, 8, 8, 1)
    assert digits.eval.images.shape == (360, 8, 8, 1)
    assert digits.train.images.dtype == np.uint8
    assert digits.train.labels.dtype == np.int32
    assert set(np.bincount(digits.eval.labels)) <= {34, 35, 36, 37}
    train = {image.tobytes() for image in digits.train.images}
    assert not any(image.tobytes() in train for image in digits.eval.images)


def test_an_epoch_uses_every_example_at_most_once_and_drops_only_the_rest():
    order = data.epoch_order(KEY, jnp.int32(3), 103)
    used = np.concatenate([data.batch_indices(order, jnp.int32(30 + n), 10) for n in range(10)])
    assert len(np.unique(used)) == 100
    assert used.min() >= 0
    assert used.max() < 103


def test_the_order_depends_on_key_and_epoch_alone():
    first, again, next_epoch, other_key = (
        np.asarray(data.epoch_order(key, jnp.int32(epoch), 50))
        for key, epoch in ((KEY, 0), (KEY, 0), (KEY, 1), (jax.random.key(1), 0))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != next_epoch).any()
    assert (first != other_key).any()


def test_augmentation_yields_crops_of_the_reflected_image_and_mirrors_half():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (400, 12, 12, 2)), jnp.uint8)
    images = jnp.broadcast_to(images[:1], images.shape)
    augmented = np.asarray(data.augment(KEY, images))
    assert augmented.dtype == np.uint8
    padded = np.pad(np.asarray(images[0]), ((4, 4), (4, 4), (0, 0)), mode='reflect')
    crops = {}
    for i in range(9):
        for j in range(9):
            crop = padded[i : i + 12, j : j + 12]
            crops.setdefault(crop.tobytes(), (i, j, False))
            crops.setdefault(crop[:, ::-1].tobytes(), (i, j, True))
    seen = [crops[image.tobytes()] for image in augmented]
    assert len({(i, j) for i, j, _ in seen}) > 60
    assert 150 < sum(flip for _, _, flip in seen) < 250
    assert (np.asarray(data.augment(KEY, images)) == augmented).all()


def test_normalization_is_in_units_of_0_to_255():
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3)).astype(np.uint8)
    mean, std = data.channel_statistics(images)
    normalized = np.asarray(data.normalize(jnp.asarray(images), mean, std))
    np.testing.assert_allclose(normalized.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(normalized.std((0, 1, 2)), 1, rtol=1e-6)


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


# TFDS itself warns of deprecations on import and leaves files to the garbage collector.
tfds_warnings = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def prepared(tmp_path_factory) -> pathlib.Path:
    """A real TFDS directory with sets of 40 + 20 random images, made without TensorFlow."""
    root = tmp_path_factory.mktemp('tfds')
    script = pathlib.Path(__file__).parent / 'make_tiny_tfds.py'
    names = [name for name in data.TFDS_NAMES if name != 'fashion_mnist']  # as mnist
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


def test_cutout_sets_one_square_to_zero():
    images = jnp.ones((500, 9, 12, 2))
    holes = np.asarray(data.cutout(KEY, images, 4)) == 0
    assert (holes[..., 0] == holes[..., 1]).all()
    sizes = set()
    for hole in holes[..., 0]:
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        assert hole.sum() == len(rows) * len(columns), 'a rectangle'
        assert len(rows) == rows[-1] - rows[0] + 1
        sizes.add((len(rows), len(columns)))
    assert max(sizes) == (4, 4)
    assert min(sizes) == (2, 2), 'cut by the border, its centre inside the image'
    assert holes.any(0).all(), 'anywhere'


def test_mixup_mixes_images_and_labels_by_one_share():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3, 3, 1)), jnp.float32)
    labels = jnp.arange(12)
    mixed, probabilities = data.mixup(KEY, images, labels, 12, 1.0)
    share = float(probabilities.max(1).min())  # an example mixed with itself has 1
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        mixed.reshape(12, 9), probabilities @ images.reshape(12, 9), atol=1e-6
    )
    distances = np.abs(np.asarray(probabilities)[..., None] - np.array([0, 1, share, 1 - share]))
    assert distances.min(-1).max() < 1e-6, 'only 0, 1, the share and its complement'
    shares = [
        float(data.mixup(jax.random.key(i), images[:2], labels[:2], 2, 0.2)[1].max())
        for i in range(60)
    ]
    assert np.mean(np.array(shares) > 0.95) > 0.4, 'Beta(0.2, 0.2) is mostly near 0 or 1'


def test_the_newest_dataset_is_kept(tiny_config):
    first = data.load_of(tiny_config)
    assert data.load_of(tiny_config) is first
    tiny_config.dataset.eval_split = 'train'
    assert data.load_of(tiny_config).eval is not first.eval
    tiny_config.dataset.eval_split = 'test'
    again = data.load_of(tiny_config)
    assert again is not first
    assert again.train.sha256() == first.train.sha256()
