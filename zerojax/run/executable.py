"""Jitted functions as executables."""

from typing import Any


class Executable:
    """A jitted function for arguments of one shape, compiled ahead or at its first call."""

    def __init__(self, jitted: Any) -> None:
        self._jitted = jitted
        self._compiled: Any = None

    def compile(self, *args: Any) -> Any:
        """What XLA made of it for such arguments, the first time that this is asked."""
        if self._compiled is None:
            self._compiled = self._jitted.lower(*args).compile()
        return self._compiled

    def __call__(self, *args: Any) -> Any:
        return self.compile(*args)(*args)
