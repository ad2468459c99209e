"""Local Sphinx extension: every script that a page needs comes from the installed packages, none from the network.

It copies MathJax, plotly.js and the DataTables bundle out of the wheels into the built book, loads the last two only on
pages that use them, removes the script tags of sphinx-thebe (which name a server), and fills the numbers that the prose
quotes (``{{ name }}``) from the generated ``book/_generated/substitutions.json``.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "book" / "_generated"
PLOTLY_MARK = "plotly-graph-div"
ITABLES_MARK = "window._itables_"
THEBE_BLOCK = re.compile(r"<script[^>]*text/x-thebe-config[^>]*>.*?</script>", re.DOTALL)


def _wheel_folder(package: str, inside: str) -> Path:
    found = Path(str(distribution(package).locate_file(inside)))
    if not found.exists():
        raise FileNotFoundError(f"{package} is installed without {inside}; reinstall it with `make setup`")
    return found


def _itables_script() -> str:
    """The script that `itables.init_notebook_mode` would put into every notebook, as one file."""
    from itables.javascript import _itables_ready_event, _itables_underscore_version
    from itables.utils import find_package_file

    script = Path(find_package_file("html/dt_bundle.js")).read_bytes()
    style = Path(find_package_file("html/dt_bundle.css")).read_bytes()
    name, event = _itables_underscore_version(), _itables_ready_event()
    return (
        "(function () {\n"
        f"if (window.{name}) {{ return; }}\n"
        "const style = document.createElement('style');\n"
        f"style.textContent = atob('{base64.b64encode(style).decode()}');\n"
        "document.head.appendChild(style);\n"
        f"const bytes = Uint8Array.from(atob('{base64.b64encode(script).decode()}'), c => c.charCodeAt(0));\n"
        "const url = URL.createObjectURL(new Blob([bytes], {type: 'application/javascript'}));\n"
        f"window.{name} = import(url).finally(() => URL.revokeObjectURL(url));\n"
        f"window.{name}.then(() => window.dispatchEvent(new Event('{event}')));\n"
        "})();\n"
    )


def copy_assets(app: Any) -> None:
    """Puts the scripts into a folder that Sphinx copies to ``_static``."""
    if app.builder.format != "html":
        return
    folder = Path(app.doctreedir) / "offline_static"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "mathjax").mkdir(parents=True)
    source = _wheel_folder("sphinx-mathjax-offline", "sphinx-mathjax-offline/static/mathjax")
    shutil.copy(source / "tex-svg-full.js", folder / "mathjax" / "tex-svg-full.js")
    shutil.copy(_wheel_folder("plotly", "plotly/package_data/plotly.min.js"), folder / "plotly.min.js")
    (folder / "itables.js").write_text(_itables_script(), encoding="utf-8")
    app.config.html_static_path.append(str(folder))


def load_substitutions(app: Any, config: Any) -> None:
    """Gives the generated numbers to the pages."""
    path = GENERATED / "substitutions.json"
    config.myst_substitutions = {
        **(config.myst_substitutions or {}),
        **json.loads(path.read_text(encoding="utf-8")),
    }


def trim_page(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Adds the scripts that this page needs and drops those that point outside."""
    body = context.get("body") or ""
    if "text/x-thebe-config" in body:
        context["body"] = body = THEBE_BLOCK.sub("", body)
    if PLOTLY_MARK in body:
        app.add_js_file("plotly.min.js", priority=400)
    if ITABLES_MARK in body:
        app.add_js_file("itables.js", priority=400)
    for key in ("script_files", "css_files"):
        if key in context:
            context[key] = [item for item in context[key] if not _is_thebe(item)]


def _is_thebe(item: Any) -> bool:
    text = " ".join([str(item), str(getattr(item, "filename", "")), str(getattr(item, "attributes", ""))])
    return "thebe" in text.lower()


def setup(app: Any) -> dict[str, Any]:
    """Registers the extension; collects the runs where `grass book` has not (a plain ``jupyter-book build``)."""
    if not (GENERATED / "substitutions.json").is_file():
        sys.path.insert(0, str(ROOT))
        from grass_lib.report.book import assemble

        assemble(ROOT)
    app.connect("config-inited", load_substitutions, priority=200)
    app.connect("builder-inited", copy_assets)
    app.connect("html-page-context", trim_page, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
