"""Jitted functions as executables."""

from typing import Any


class Executable:
    """A jitted function for arguments of one shape, compiled ahead or at its first call."""

    def __init__(self, jitted: Any) -> None:
        self._jitted = jitted
        self._lowered: Any = None
        self._compiled: Any = None

    def lower(self, *args: Any) -> 'Executable':
        """Traces it for such arguments, the first time, under JAX's settings in this thread."""
        if self._lowered is None:
            self._lowered = self._jitted.lower(*args)
        return self

    def compile(self) -> Any:
        """What XLA makes of it once it is lowered, compiled the first time; in any thread."""
        if self._compiled is None:
            self._compiled = self._lowered.compile()
        return self._compiled

    def __call__(self, *args: Any) -> Any:
        return self.lower(*args).compile()(*args)
