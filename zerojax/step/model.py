"""What a model must have to be trained here."""

from typing import Any, Protocol


class Model(Protocol):
    """A Linen model that declares its feature axes, or anything that has these two methods."""

    def apply(self, variables: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Logits [B, N] of images [B, ...]; with `mutable`, (logits, updated statistics)."""

    def feature_axes(self) -> Any:
        """{'params', 'batch_stats'}: the declaration of both, see `zerojax.symmetry`."""
