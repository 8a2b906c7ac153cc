"""Settings of the documentation: `python -m sphinx -W -n -b html docs OUT`, with the extra `docs`."""

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

import dpn_jax
from dpn_jax import explain, finetune

ROOT = Path(__file__).parents[1]
for folder, kind in (("notebooks", "*.ipynb"), ("recipes", "*.md")):  # Sphinx takes pages from its own folder only
    shutil.rmtree(ROOT / "docs" / folder, ignore_errors=True)
    (ROOT / "docs" / folder).mkdir()
    for page in (ROOT / folder).glob(kind):
        text = page.read_text(encoding="utf-8").replace("](../docs/", "](../")
        (ROOT / "docs" / folder / page.name).write_text(text, encoding="utf-8")

project = "dpn_jax"
author = "the dpn_jax authors"
copyright = f"2026, {author}"
version = release = dpn_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
default_role = "code"  # docstrings name code as Markdown does

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the notebooks' tests run them
nb_merge_streams = True

autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

nitpicky = True
# other projects' objects: linked where the site is built with a network, plain text elsewhere
if os.environ.get("READTHEDOCS") or os.environ.get("DPN_JAX_DOCS_ONLINE"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
    }
nitpick_ignore_regex = [
    ("py:.*", r"(?!dpn_jax\.).*"),
    ("py:.*", r"dpn_jax\..*\.(Features|Forward|FastForward|Runner|Saved|Setup|Tree|_\w+)"),  # names within signatures
]

html_theme = "furo"
html_title = f"dpn_jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def public_names(*packages: ModuleType) -> dict[str, str]:
    """Where each class and function that a package re-exports is defined -> the name it is offered under."""
    return {
        f"{value.__module__}.{value.__qualname__}": f"{package.__name__}.{name}"
        for package in packages
        for name, value in vars(package).items()
        if not name.startswith("_") and not inspect.ismodule(value) and value.__module__.startswith("dpn_jax.")
    }


PUBLIC = public_names(dpn_jax, explain, finetune)


def every_public_name_is_documented(app: Sphinx, _env: BuildEnvironment) -> None:
    """Fails the build where the API reference lacks a public name."""
    missing = sorted(set(PUBLIC.values()) - set(app.env.domains["py"].objects))
    if missing:
        raise ExtensionError(f"docs/api lacks public names: {', '.join(missing)}")


def link_to_public_name(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Signatures name `dpn_jax.model.DPN`, which is documented as `dpn_jax.DPN`."""
    name = PUBLIC.get(node.get("reftarget", ""))
    if name is None or app.builder is None:
        return None
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, content)


class CommandHelp(SphinxDirective):
    """`dpn-jax COMMAND --help`, as it is printed; `-m MODULE` runs a module instead."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Runs the command."""
        words = self.arguments[0].split()
        command = [sys.executable, *(words if words[0] == "-m" else ["-m", "dpn_jax", *words]), "--help"]
        environment = os.environ | {"COLUMNS": "88", "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
        return [nodes.literal_block(done.stdout, done.stdout.rstrip(), language="text")]


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    app.add_directive("command-help", CommandHelp)
    app.connect("env-check-consistency", every_public_name_is_documented)
    app.connect("missing-reference", link_to_public_name)
