"""How the site is built: python -m sphinx -W --keep-going -n -b html docs OUT."""

import inspect
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


def parameters(obj):
    """Names of what a function or a class takes."""
    try:
        return inspect.signature(obj).parameters
    except (TypeError, ValueError):  # it is neither
        return ()


def make_plain(app, what, name, obj, options, lines):
    """Docstrings are plain text: what is indented after a colon is code, a table or a command."""
    if what == 'module' and 'python -m zerojax.' in '\n'.join(lines):  # what --help prints
        lines[:] = ['::', '', *(f'    {line}' for line in lines)]
        return
    own = parameters(obj)

    def in_place(found):
        text = found[0]
        if text in '*|':
            return f'\\{text}'
        return f'`{text}`' if found[1] in own else text  # no link, whatever else has that name

    code = None  # its indentation
    for i, line in enumerate(lines):
        if code is not None and line and not line.startswith(code):
            code = None
        if code is None:
            lines[i] = re.sub(r'`([^`]*)`|\*\w[\w ]*\*|[*|]', in_place, line)
            code = line[: len(line) - len(line.lstrip())] + '    '
            blank, text = [*lines[i + 1 : i + 3], '', ''][:2]
            if line.endswith(':') and not blank and text.startswith(code):
                lines[i] += ':'
            else:
                code = None


def leave_out(app, what, name, obj, skip, options):
    """What a named tuple says of its fields, which its own docstring says better."""
    return True if str(obj.__doc__).startswith('Alias for field number') else None


def shorten(app, what, name, obj, options, signature, returns):
    """Without what each Linen module takes beside its own fields."""
    if what == 'class' and signature and ', parent: ' in signature:
        return signature.partition(', parent: ')[0] + ')', returns
    return None


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
    app.connect('autodoc-skip-member', leave_out)
    app.connect('autodoc-process-signature', shorten)
    app.connect('missing-reference', link)
    app.connect('env-check-consistency', check_reference)
