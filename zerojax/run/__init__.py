"""From a config to a finished run.

`train` is the place to begin: one run from top to bottom. It takes its data from `data`, has what
can be wrong found by `checks`, compiles a `program`, and measures with `evaluate`; `cli` are the
flags. A new field is a line in `zerojax.config`, and its use here.
"""
