"""The two ways in which a run can end badly; `main` turns them into exit statuses."""


class UsageError(ValueError):
    """A mistake in flags, config, data or workdir (exit status 2).

    The message is one line that names the field and says what is allowed or what to do.
    """


class RunError(RuntimeError):
    """A failure during the run that has a known cause (exit status 1). The message is one line."""


class DamagedCheckpoint(RunError):
    """A checkpoint cannot be read, or none that can is left."""
