"""Image sets, loaded into host memory.

Shapes are written as suffixes: B batch, H and W space, C channels, N examples.
"""

import dataclasses
import hashlib
import http.client
import pathlib
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from zerojax.config import DATASETS
from zerojax.host import paths
from zerojax.host.errors import UsageError, first_line
from zerojax.host.objectstore import SCHEME


@dataclasses.dataclass(frozen=True)
class Split:
    """images uint8 [N, H, W, C], labels int32 [N], both on the host."""

    images: np.ndarray
    labels: np.ndarray

    def sha256(self) -> str:
        """Over the bytes of the images, then of the labels (little-endian int32)."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).data)
        digest.update(self.labels.astype('<i4').tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and held-out examples; labels run from 0 to num_classes - 1."""

    train: Split
    eval: Split
    num_classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of each image."""
        _, height, width, channels = self.train.images.shape
        return height, width, channels


def load(name: str, data_dir: str | None, train_split: str, eval_split: str) -> Dataset:
    """Loads an image set into host memory.

    Args:
        name: 'digits' (scikit-learn's 8x8 digits, part of its package, split at random, stratified
            by class, into 1437 to train on and 360 held out) or the name of a TensorFlow Datasets
            set.
        data_dir: where prepared TFDS sets are; None is TFDS's default place.
        train_split, eval_split: TFDS split expressions such as 'train[:5000]'; for digits only
            'train' and 'test' exist.

    Raises:
        UsageError: the set is unknown, cannot be read or cannot be prepared here.
    """
    if name == 'digits':
        return _load_digits(train_split, eval_split)
    if name in DATASETS:
        if data_dir is not None and not data_dir.startswith(SCHEME):  # TFDS itself opens stores
            folder = paths.meant(data_dir, 'dataset.data_dir')
            obstacle = paths.why_no_folder(folder)
            if obstacle:
                raise UsageError(f'dataset.data_dir={data_dir!r}: is no folder, {obstacle}')
            data_dir = str(folder)
        return _load_tfds(name, data_dir, train_split, eval_split)
    raise UsageError(f'dataset.name={name!r}: must be one of {", ".join(DATASETS)}')


def _load_digits(train_split: str, eval_split: str) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    try:
        digits = load_digits()
    except Exception as error:  # gzip, zlib and NumPy raise many kinds
        raise UsageError(
            f"dataset.name='digits': scikit-learn's copy cannot be read ({first_line(error)}); "
            'install scikit-learn anew'
        ) from error
    images = digits.images.astype(np.uint8)[..., None]  # 0 to 16
    labels = digits.target.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    splits = {
        'train': Split(images[train], labels[train]),
        'test': Split(images[test], labels[test]),
    }
    for field, split in (('train_split', train_split), ('eval_split', eval_split)):
        _check_digits_split(field, split)
    return Dataset(splits[train_split], splits[eval_split], num_classes=10)


def _check_digits_split(field: str, split: str) -> None:
    if split not in DATASETS['digits'].splits:
        raise UsageError(f"dataset.{field}={split!r}: digits have the splits 'train' and 'test'")


def _load_tfds(name: str, data_dir: str | None, train_split: str, eval_split: str) -> Dataset:
    builder = _open_tfds(name, data_dir)
    if not builder.is_prepared():
        if builder.data_path.exists():  # TFDS would take it for the whole set
            raise _damaged(builder.data_path, 'dataset_info.json is missing')
        _prepare_tfds(builder, data_dir)
        builder = _open_tfds(name, data_dir)
    return Dataset(
        _read_tfds(builder, 'train_split', train_split),
        _read_tfds(builder, 'eval_split', eval_split),
        builder.info.features['label'].num_classes,
    )


def _open_tfds(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # of a damaged dataset_info.json, TFDS raises many kinds
        root = data_dir or tfds.core.constants.DATA_DIR
        raise _damaged(f'{root}/{name}', first_line(error)) from error


def _damaged(folder: Any, reason: str) -> UsageError:
    return UsageError(
        f'dataset.data_dir: {folder} cannot be read ({reason}); '
        'prepare the set again in another folder'
    )


def _read_tfds(builder: Any, field: str, split: str) -> Split:
    """Reads one split of a prepared set; without TensorFlow unless the files are TFRecords."""
    from tensorflow_datasets.core import FileFormat

    where = f'dataset.{field}={split!r}'
    try:
        num_examples = builder.info.splits[split].num_examples
    except Exception as error:  # TFDS raises many kinds for a bad split expression
        splits = ', '.join(builder.info.splits)
        raise UsageError(
            f"{where}: not a split of {builder.name} (splits: {splits}; parts as 'train[:5000]'): "
            f'{first_line(error)}'
        ) from error
    if num_examples == 0:
        raise UsageError(f'{where}: holds no examples')
    try:
        if builder.info.file_format == FileFormat.TFRECORD:
            import tensorflow_datasets as tfds

            _import_tensorflow(
                f'dataset.data_dir: {builder.data_path} holds TFRecord files; reading them'
            )
            examples = tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                examples = builder.as_data_source(split=split)
            _check_shards(builder.info.splits[split].file_instructions)
        return _stack(examples, num_examples, builder.info.features)
    except UsageError:
        raise
    except Exception as error:  # a damaged set fails in many ways: array_record, PIL, TFDS
        raise _damaged(builder.data_path, first_line(error)) from error


def _check_shards(shards: Any) -> None:
    """Checks that files hold as many examples as dataset_info.json says; no more are read."""
    from array_record.python.array_record_module import ArrayRecordReader

    for shard in shards:
        reader = ArrayRecordReader(shard.filename)
        count = reader.num_records()
        reader.close()
        if count != shard.examples_in_shard:
            raise ValueError(
                f'{shard.filename} holds {count} examples, '
                f'dataset_info.json says {shard.examples_in_shard}'
            )


def _stack(examples: Iterable[dict[str, Any]], count: int, features: Any) -> Split:
    """Examples in one array, filled as they come: ImageNet leaves no room for two.

    Raises:
        ValueError: the examples are not as many, or not such, as the set is said to hold.
    """
    shape, num_classes = features['image'].shape, features['label'].num_classes
    images, labels = np.empty((count, *shape), np.uint8), np.empty(count, np.int32)
    number = 0
    for number, example in enumerate(examples, start=1):
        image, label = example['image'], example['label']
        if image.shape != shape:  # NumPy would stretch some to fit
            raise ValueError(f'example {number}: image of shape {image.shape} instead of {shape}')
        if not 0 <= label < num_classes:
            raise ValueError(
                f'example {number}: label {label}, must be from 0 to {num_classes - 1}'
            )
        images[number - 1], labels[number - 1] = image, label
    if number != count:
        raise ValueError(f'{number} examples instead of {count}')
    return Split(images, labels)


def _prepare_tfds(builder: Any, data_dir: str | None) -> None:
    """Prepares a set from archives in the manual folder, or from the network."""
    import tensorflow_datasets as tfds

    root = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    manual_dir = root / 'downloads' / 'manual'
    archives = {url: pathlib.PurePosixPath(url).name for url in builder.url_infos}
    missing = {url: name for url, name in archives.items() if not (manual_dir / name).is_file()}
    for url, name in archives.items():
        if url not in missing and _sha256(manual_dir / name) != builder.url_infos[url].checksum:
            raise UsageError(
                f'dataset.data_dir: {manual_dir / name} is damaged, its SHA-256 is not that of '
                f'{url}; get it anew'
            )
    advice = (
        f'put {", ".join(missing.values())} into {manual_dir}, or name a folder that holds a '
        f'prepared {builder.name}/{builder.version} with --config.dataset.data_dir=DIR '
        '(--config=zerojax:digits needs neither)'
    )
    failed = f'dataset.name={builder.name!r}: not prepared in {root}'
    for url in missing:
        problem = _why_unreachable(url, timeout=8)
        if problem:
            raise UsageError(f'{failed} and {url} cannot be reached ({problem}): {advice}')
    _import_tensorflow(f'dataset.name={builder.name!r}: preparing it')
    try:
        builder.download_and_prepare(
            file_format='array_record',
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir),
        )
    except Exception as error:  # network, disk, checksum: TFDS raises many kinds
        raise UsageError(
            f'{failed} and preparing it failed ({first_line(error)}): {advice}'
        ) from error


def _sha256(file: pathlib.Path) -> str:
    with open(file, 'rb') as opened:
        return hashlib.file_digest(opened, 'sha256').hexdigest()


def _why_unreachable(url: str, timeout: float) -> str | None:
    """Why the URL's host does not answer within `timeout` seconds; None if it does.

    TFDS itself would retry for minutes. The thread is there because looking up a host's name knows
    no timeout.
    """
    problems: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method='HEAD')
            with urllib.request.urlopen(request, timeout=timeout):
                problems.append(None)
        except urllib.error.HTTPError:
            problems.append(None)  # the host answered; TFDS will say what it makes of that
        except (OSError, http.client.HTTPException) as error:
            problems.append(str(getattr(error, 'reason', error)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return problems[0] if problems else f'no answer in {timeout:g} s'


def _import_tensorflow(purpose: str) -> None:
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UsageError(f"{purpose} needs TensorFlow: pip install 'zerojax[prepare]'") from error
    tf.config.set_visible_devices([], 'GPU')  # the device is JAX's


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, float32 [C], in the images' units (0 to 255).

    Of sums in integers, so exact; over parts, as a set may leave no room for another of its size.
    """
    channels = images.shape[-1]
    number = images.size // channels
    sums, squares = np.zeros((2, channels), np.int64)
    for part in np.array_split(images, -(-len(images) // 1024)):
        pixels = part.reshape(-1, channels).astype(np.int64)
        sums, squares = sums + pixels.sum(0), squares + (pixels**2).sum(0)
    variances = [
        (number * square - total**2) / number**2
        for total, square in zip(sums.tolist(), squares.tolist(), strict=True)
    ]
    return (sums / number).astype('f4'), np.sqrt(variances).astype('f4')


def normalization(config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, float32 [C], as a resolved config has them."""
    return np.array(config.dataset.mean, np.float32), np.array(config.dataset.std, np.float32)


def stand_in(config: ConfigDict) -> Dataset:
    """A dataset with as many examples as the config's, all of them 0, that takes no memory.

    Raises:
        UsageError: the set or a split is unknown.
    """
    s = config.dataset
    facts = DATASETS[s.name]
    if s.name == 'digits':
        _check_digits_split('train_split', s.train_split)
        _check_digits_split('eval_split', s.eval_split)

    def zeros(field: str, split: str) -> Split:
        count = _number_of_examples(facts.splits, field, split)
        return Split(
            np.broadcast_to(np.uint8(0), (count, *facts.image_shape)),
            np.broadcast_to(np.int32(0), (count,)),
        )

    return Dataset(
        zeros('train_split', s.train_split), zeros('eval_split', s.eval_split), facts.num_classes
    )


def _number_of_examples(splits: dict[str, int], field: str, split: str) -> int:
    if split in splits:
        return splits[split]
    from tensorflow_datasets.core.splits import ReadInstruction, SplitInfo

    infos = {x: SplitInfo(name=x, shard_lengths=[n], num_bytes=0) for x, n in splits.items()}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(infos)
        count = sum(len(range(splits[x.splitname])[x.from_ : x.to]) for x in parts)
    except Exception as error:  # TFDS raises many kinds for a bad split expression
        raise UsageError(
            f'dataset.{field}={split!r}: must be a split (splits: {", ".join(splits)}; parts as '
            f"'train[:5000]'): {first_line(error)}"
        ) from error
    if count == 0:
        raise UsageError(f'dataset.{field}={split!r}: holds no examples')
    return count


def load_of(config: ConfigDict) -> Dataset:
    """The config's data, as `load`."""
    s = config.dataset
    return load(s.name, s.data_dir, s.train_split, s.eval_split)
