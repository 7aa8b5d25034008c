"""How the site is built: ``pip install -e '.[docs]' && sphinx-build -W docs build/docs``.

The notebook is run while the site is built, and an error in it ends the build. The options and the
commands of the reference are written by ``generated.py``, from the code.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generated

import catversion_jax

project = "catversion_jax"
author = "the catversion_jax authors"
copyright = "2026, the catversion_jax authors. Apache-2.0"
version = release = catversion_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
templates_path: list[str] = []

html_theme = "sphinx_book_theme"
html_title = "catversion_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
}

myst_enable_extensions = ["colon_fence", "dollarmath", "attrs_block"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_output_stderr = "remove"  # progress bars

# What the PyTorch loader imports; the reference needs its docstrings only.
autodoc_mock_imports = ["torch"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # axis letters such as *C are no emphasis
maximum_signature_line_length = 80
smartquotes_action = "qe"  # two hyphens begin an option's name

copybutton_prompt_text = "$ "


def setup(app: object) -> None:
    """Let ``generated.py`` fill in what pages leave to the code."""
    app.connect("source-read", generated.fill_in)  # type: ignore[attr-defined]
