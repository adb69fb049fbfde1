"""The ways in which a run can end badly; commands turn them into exit statuses and one line."""


class UsageError(ValueError):
    """A mistake in flags, config, data or workdir (exit status 2).

    The message is one line that names the field and says what is allowed or what to do.
    """


class RunError(RuntimeError):
    """A failure during the run that has a known cause (exit status 1). The message is one line."""


class DamagedCheckpoint(RunError):
    """A checkpoint cannot be read, or none that can is left."""


def first_line(error: BaseException) -> str:
    """Of what another's exception says, or its type's name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
