"""Orbax checkpoints of all that decides the next step."""

import contextlib
import functools
import pathlib
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from zerojax.host import distributed, objectstore
from zerojax.host.errors import DamagedCheckpoint, RunError, UsageError
from zerojax.host.hashes import tree_sha256
from zerojax.step import TrainState

KEEP = 3  # newest checkpoints that are kept
COMMITTED = 'commit_success.txt'  # in a checkpoint on object storage that is complete


def checkpoint_steps(workdir: pathlib.Path) -> list[int]:
    """Steps of the checkpoints of the run in `workdir`, without reading them.

    Raises:
        UsageError: the folder cannot be read.
    """
    folder = workdir / 'checkpoints'
    try:
        if not folder.is_dir():
            return []
        return sorted(
            int(x.name)
            for x in folder.iterdir()
            if x.name.isdigit()
            and x.is_dir()
            and (not objectstore.in_store(x) or (x / COMMITTED).exists())
        )
    except OSError as error:
        reason = error.strerror or objectstore.one_line(error)
        raise UsageError(
            f'--workdir={workdir}: cannot be read ({reason}); name another folder'
        ) from error


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Whether a run can be resumed there."""
    return bool(checkpoint_steps(workdir))


def move_aside(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Moves a checkpoint into the folder damaged_checkpoints beside; returns where it is then."""
    aside = directory.with_name('damaged_checkpoints') / str(step)
    if distributed.is_first():
        if objectstore.in_store(directory):
            objectstore.move(directory / str(step), aside)
        else:
            if aside.exists():
                shutil.rmtree(aside)
            aside.parent.mkdir(exist_ok=True)
            (directory / str(step)).rename(aside)
    distributed.wait_for_all()
    return aside


def with_damaged_metadata(directory: pathlib.Path) -> tuple[list[int], list[int]]:
    """Steps of the checkpoints whose metadata cannot be read, and of all others."""
    damaged, whole = [], []
    for folder in directory.iterdir():
        if folder.name.isdigit():
            try:
                ocp.checkpointables_metadata(folder)
            except Exception:  # Orbax raises many kinds
                damaged.append(int(folder.name))
            else:
                whole.append(int(folder.name))
    return sorted(damaged), sorted(whole)


def _shapes(tree: Any) -> dict[str, str]:
    """dtype[shape] of each array, by '/'-joined path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): f'{x.dtype}{list(x.shape)}'
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _without_keys(x: Any) -> Any:
    """Typed PRNG keys as the integers that Orbax saves."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


class OtherState(DamagedCheckpoint):
    """A checkpoint that is whole, as far as one can tell, holds other arrays than are asked for."""


class Checkpoints:
    """The checkpoints of one run, in `directory`/STEP.

    A checkpoint is written beside its place and renamed into it, or on object storage, completed
    by the file `COMMITTED`, so a process that is killed while saving leaves the older ones as they
    are.
    """

    def __init__(
        self, directory: pathlib.Path, keep_at: Sequence[int] = (), *, read_only: bool = False
    ) -> None:
        """`keep_at` are steps whose checkpoints are kept for good, beside the newest.

        With `read_only` the folder must exist, and what another process is writing in it is left
        alone. Otherwise checkpoints whose metadata is damaged are moved out of the way, into
        `moved`, as long as any is whole.

        Raises:
            DamagedCheckpoint: metadata is damaged, and no checkpoint may or can take its place.
        """
        policies = ocp.training.preservation_policies
        open_all = functools.partial(
            ocp.training.Checkpointer,
            directory if objectstore.in_store(directory) else directory.absolute(),
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(KEEP), policies.CustomSteps(list(keep_at))]
            ),
            cleanup_tmp_directories=not read_only,
        )
        self._directory = directory
        self.moved: dict[int, pathlib.Path] = {}
        self._saved: Any = None  # Orbax's answer to the last save
        try:
            self._checkpointer = open_all()
        except Exception as error:  # of one damaged checkpoint, none can be read
            damaged, whole = with_damaged_metadata(directory)
            if not damaged:
                raise
            if read_only or not whole:
                names = ', '.join(str(directory / str(step)) for step in damaged)
                raise DamagedCheckpoint(
                    f'{names}: damaged metadata; move that away to use the others'
                ) from error
            distributed.wait_for_all()  # all have looked
            for step in damaged:
                self.moved[step] = move_aside(directory, step)
            self._checkpointer = open_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._saving():
            try:
                self._settle()
            finally:
                self._checkpointer.close()

    def _settle(self) -> None:
        """Waits for the last save, whose answer holds a thread and open files until it is heard."""
        saved, self._saved = self._saved, None
        if saved is not None:
            saved.result()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, seconds: float, metrics_sha256: str | None = None) -> None:
        """Saves the state under its step, with the run time so far; writes in the background.

        The state is copied first, so its buffers may be donated at once. A checkpoint of this step
        that is already there is kept. `metrics_sha256` is that of the metrics that the checkpoint
        presumes; None if it presumes none.
        """
        step = int(state.step)
        if step == self.latest_step:
            return
        copied = jax.tree.map(jnp.copy, state)
        metadata = {
            'seconds': seconds,
            'metrics_sha256': metrics_sha256,
            'sha256': tree_sha256(copied),
            'variables_sha256': tree_sha256(
                {'params': copied.params, 'batch_stats': copied.batch_stats}
            ),
        }
        with self._saving():
            self._settle()
            self._saved = self._checkpointer.save_async(
                step, copied, force=True, custom_metadata=metadata
            )

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds
            full = re.search(r'No space left on device|Read-only file system', str(error))
            raise RunError(
                f'{self._checkpointer.directory}: a checkpoint could not be saved '
                f'({full[0] if full else type(error).__name__}); the same command goes on from the '
                'newest that could'
            ) from error

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, rising."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def read_variables(self, step: int) -> dict[str, Any]:
        """{'params', 'batch_stats'} of the checkpoint of `step`, on the host and in their dtypes.

        Raises:
            UsageError: it is the checkpoint of another step.
            DamagedCheckpoint: it is damaged.
        """
        try:
            variables = self._load_parts(step, ('params', 'batch_stats', 'step'))
            digest = self._checkpointer.metadata(step).custom_metadata['variables_sha256']
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise self._unreadable(step, type(error).__name__) from error
        saved_at = variables.pop('step')
        if tree_sha256(variables) != digest:
            raise self._unreadable(step, 'its bytes are not those that were saved')
        self._check_step(step, saved_at)
        return variables

    def read_broken_streams(self, step: int) -> dict[str, int] | None:
        """`TrainState.broken_streams` of the checkpoint of `step`; None if an older version saved
        it, which did not know them.

        Raises:
            DamagedCheckpoint: it is damaged.
        """
        try:
            if 'broken_streams' not in self._checkpointer.metadata(step).metadata:
                return None
            saved = self._load_parts(step, ('broken_streams',))['broken_streams']
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise self._unreadable(step, type(error).__name__) from error
        return {stream: int(at_step) for stream, at_step in saved.items()}

    def _load_parts(self, step: int, names: Sequence[str]) -> dict[str, Any]:
        """Fields of the state that was saved, as NumPy arrays: JAX would round float64 to float32
        where x64 is off."""
        partial = ocp.options.PyTreeOptions(
            loading=ocp.options.PyTreeOptions.Loading(partial_load=True)
        )
        stored = self._checkpointer.metadata(step).metadata
        abstract = jax.tree.map(
            lambda x: np.empty(x.shape, x.dtype), {name: stored[name] for name in names}
        )
        with ocp.Context(pytree_options=partial):
            return self._checkpointer.load(step, abstract_state=abstract)

    def _check_step(self, step: int, saved_at: Any) -> None:
        if int(saved_at) != step:
            raise UsageError(
                f'{self._checkpointer.directory / str(step)}: holds the checkpoint of step '
                f'{int(saved_at)}, so the folder was renamed; give it that name again'
            )

    def _check_structure(self, step: int, like: TrainState) -> None:
        """Raises OtherState if it lacks the arrays of a state; DamagedCheckpoint: damaged."""
        stored = _shapes(self._checkpointer.metadata(step).metadata)
        if 'step' not in stored:  # which every version has: the metadata are damaged
            raise self._unreadable(step, 'its metadata')
        expected = _shapes(jax.eval_shape(functools.partial(jax.tree.map, _without_keys), like))
        for path in sorted(stored.keys() | expected.keys()):
            there, here = stored.get(path, 'nothing'), expected.get(path, 'nothing')
            if there != here:
                raise OtherState(
                    f'{self._checkpointer.directory / str(step)}: holds another state than this '
                    f'config and version have ({path}: {there} there, {here} here)'
                )

    def _unreadable(self, step: int, reason: str) -> DamagedCheckpoint:
        folder = self._checkpointer.directory / str(step)
        return DamagedCheckpoint(f'checkpoint {folder} is damaged ({reason})')

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The checkpoint of `step`, placed as `like` is, and what was saved beside the state.

        Raises:
            UsageError: it is the checkpoint of another step.
            DamagedCheckpoint: it is damaged; or as `OtherState`, holds other arrays than `like`.
        """
        try:
            self._check_structure(step, like)
        except DamagedCheckpoint:
            raise
        except Exception as error:  # Orbax raises many kinds
            raise self._unreadable(step, type(error).__name__) from error
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        try:
            state = self._checkpointer.load(step, abstract_state=abstract)
            metadata = self._checkpointer.metadata(step).custom_metadata
            digest = metadata['sha256']
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise self._unreadable(step, type(error).__name__) from error
        if tree_sha256(state) != digest:
            raise self._unreadable(step, 'its bytes are not those that were saved')
        self._check_step(step, state.step)
        return state, metadata

    def set_aside(self, step: int) -> pathlib.Path:
        """Moves the checkpoint of `step` out of the way; the folder that it is in then."""
        aside = move_aside(self._directory, step)
        self._checkpointer.reload()
        return aside

    def delete(self, step: int) -> None:
        """Removes the checkpoint of `step`."""
        self._checkpointer.delete(step)

    def wait(self) -> None:
        """Returns when every checkpoint is on disk.

        Raises:
            RunError: one could not be saved.
        """
        with self._saving():
            self._settle()
            self._checkpointer.wait()
