"""Orbax checkpoints of all that decides the next step."""

import pathlib
from typing import Self

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from zerojax.errors import RunError
from zerojax.step import TrainState

KEEP = 3  # newest checkpoints that are kept


class Checkpoints:
    """The checkpoints of one run, in `directory`/STEP.

    A checkpoint is written beside its place and renamed into it, so a process that is killed while
    saving leaves the older ones as they are.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(KEEP),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, seconds: float) -> None:
        """Saves the state under its step, with the run time so far; writes in the background.

        The state is copied first, so its buffers may be donated at once. A checkpoint of this step
        that is already there is kept.
        """
        step = int(state.step)
        if step == self.latest_step:
            return
        copied = jax.tree.map(jnp.copy, state)
        self._checkpointer.save_async(
            step, copied, force=True, custom_metadata={'seconds': seconds}
        )

    def restore(self, like: TrainState) -> tuple[TrainState, float]:
        """The newest checkpoint as (state, seconds run so far), placed as `like` is.

        Raises:
            RunError: it is damaged.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        try:
            state = self._checkpointer.load(abstract_state=abstract)
            seconds = self._checkpointer.metadata().custom_metadata['seconds']
        except Exception as error:  # Orbax and TensorStore raise many kinds
            folder = self._checkpointer.directory / str(self.latest_step)
            raise RunError(
                f'checkpoint {folder} cannot be read ({type(error).__name__}); remove that folder '
                'to resume from the one before it'
            ) from error
        return state, seconds

    def wait(self) -> None:
        """Returns when every checkpoint is on disk; raises what went wrong in the background."""
        self._checkpointer.wait()
