"""One question a file, see docs/howto/experiments.md; `runs` is what they have in common."""

import os

# Figures are drawn without Matplotlib's backends; a name that it does not know keeps it from being
# imported.
os.environ.pop('MPLBACKEND', None)
