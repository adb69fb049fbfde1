"""How much symmetry breaking does a network of identical features need before it can learn?

Import the module you need (`zerojax.models`, `zerojax.step`, `zerojax.symmetry`, ...). Importing
the package itself imports nothing else, takes no device and changes no global state.
"""

__version__ = '0.1.0'
