"""Sphinx: `python -m sphinx -W docs docs/_build`, or `make docs`."""

from importlib.metadata import version as installed_version

project = "repom"
project_copyright = "repom contributors, MIT licence"
release = version = installed_version("repom")

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_benchmarks"]  # the latter is included by benchmarks.md

myst_heading_anchors = 3  # so that links to `page.md#heading` work here as on GitHub

html_theme = "furo"
html_title = "repom"
html_copy_source = False
