"""How the site is built: python -m sphinx -W --keep-going -n -b html docs OUT."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's docstrings, whatever is installed

from sphinx.util import logging  # noqa: E402

import zerojax  # noqa: E402

project = 'zerojax'
author = 'The zerojax authors'
copyright = 'The zerojax authors, Apache-2.0'
version = release = zerojax.__version__

extensions = [
    'myst_nb',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
]
html_theme = 'sphinx_book_theme'
html_title = f'zerojax {version}'
html_theme_options = {'show_toc_level': 2, 'navbar_persistent': []}
html_static_path = ['_static']
html_css_files = ['site.css']
html_show_sourcelink = False

# Markdown: links to headings as on GitHub, $formulas$.
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_heading_anchors = 4
highlight_language = 'none'  # an indented block is a command, or what it printed

# The notebook is run by each build, in a folder that is thrown away.
nb_execution_mode = 'force'
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 600
nb_merge_streams = True

autodoc_default_options = {'members': True}
autodoc_member_order = 'bysource'
autodoc_typehints_format = 'short'
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False
python_use_unqualified_type_names = True
default_role = 'py:obj'

# Types of other packages, which are documented elsewhere.
nitpick_ignore_regex = [
    ('py:.*', rf'{package}\..*')
    for package in ('jax', 'jaxlib', 'np', 'numpy', 'nn', 'flax', 'optax', 'ml_collections')
] + [('py:.*', r'(collections|pathlib|typing)\..*')]


def make_plain(app, what, name, obj, options, lines):
    """Docstrings are plain text: what is indented after a colon is code, a table or a command."""
    if what == 'module' and 'python -m zerojax.' in '\n'.join(lines):  # what --help prints
        lines[:] = ['::', '', *(f'    {line}' for line in lines)]
        return
    code = None  # its indentation
    for i, line in enumerate(lines[:-2]):
        if code is not None and line and not line.startswith(code):
            code = None
        if code is None:
            # In `code` and *emphasis* they mean something, elsewhere themselves.
            lines[i] = re.sub(
                r'`[^`]*`|\*\w[\w ]*\*|([*|])', lambda x: f'\\{x[1]}' if x[1] else x[0], line
            )
            code = line[: len(line) - len(line.lstrip())] + '    '
            if line.endswith(':') and not lines[i + 1] and lines[i + 2].startswith(code):
                lines[i] += ':'
            else:
                code = None


def link(app, env, node, content):
    """Names as they stand in docstrings: of any public function or class, or else plain code."""
    if node.get('refdomain') != 'py':
        return None
    objects = env.get_domain('py').objects
    found = {
        full
        for full, entry in objects.items()
        if full.endswith(f'.{node["reftarget"]}')
        and entry.objtype in ('function', 'class', 'exception')
    }
    if len(found) == 1:
        (full,) = found
        return env.get_domain('py').resolve_xref(
            env, node['refdoc'], app.builder, 'obj', full, node, content
        )
    return content if node['reftype'] == 'obj' else None


def check_reference(app, env):
    """Warns of names that are public and not in the reference."""
    for name in zerojax.__all__:
        module = getattr(zerojax, name)
        for each in getattr(module, '__all__', ()):
            value = getattr(module, each)
            where = {module.__name__, getattr(value, '__module__', '')}  # it may be from elsewhere
            if not {f'{x}.{each}' for x in where} & env.get_domain('py').objects.keys():
                logging.getLogger('conf').warning(f'{module.__name__}.{each}: not documented')


def setup(app):
    app.connect('autodoc-process-docstring', make_plain, priority=400)  # before napoleon
    app.connect('missing-reference', link)
    app.connect('env-check-consistency', check_reference)
