"""Several runs, side by side: `python -m zerojax.compare RUN_A RUN_B [RUN_C ...]`.

`several` puts a comparison together, of pairs (`pair`) and of all runs (`ensemble`); `saved_runs`
reads workdirs; `report` is the screen. What they measure are functions of arrays: `parting`,
`interpolation`, `similarity`, `ensemble`. A new measurement is a function there, and a line in
`pair` or `several`.
"""
