"""Hooks of MkDocs: pages made from files outside docs/, and the notebook.

The home page is README.md, so that nothing is said in two places.
"""

import json
import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[2]
_ADDED = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files, config):
    """Adds the generated pages to the files of the site."""
    pages = {"index.md": linked((ROOT / "README.md").read_text())}
    for name, page in _ADDED.items():
        pages[page] = linked((ROOT / name).read_text())
    pages["quickstart.md"] = notebook(ROOT / "docs" / "quickstart.ipynb")
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def linked(text):
    """A page of the repository's root with links that hold in the site."""
    text = text.replace("](docs/", "](")
    text = text.replace("](quickstart.ipynb)", "](quickstart.md)")
    for name, page in _ADDED.items():
        text = text.replace(f"]({name}", f"]({page}")
    # Files that are not pages are named without a link.
    return re.sub(r"\[([^\]]+)\]\((?:LICENSE|CITATION\.cff)\)", r"\1", text)


def notebook(path):
    """A notebook as Markdown: its texts, code and printed results."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        shown = [
            "".join(one.get("text", one.get("data", {}).get("text/plain", "")))
            for one in cell["outputs"]
        ]
        if any(shown):
            parts.append("```text\n" + "".join(shown).rstrip() + "\n```")
    return "\n\n".join(parts)
