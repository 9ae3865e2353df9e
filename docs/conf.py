"""Sphinx configuration."""

import torch_bilevel

project = "torch_bilevel"
author = "The torch_bilevel developers"
version = release = torch_bilevel.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
html_theme = "furo"
exclude_patterns = ["_build", "gallery/*.ipynb"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "none"
default_role = "code"
napoleon_google_docstring = True
napoleon_use_rtype = False
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "remove_config_comments": True,
    "parallel": 2,
}
suppress_warnings = ["config.cache"]
