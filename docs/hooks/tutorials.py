"""Makes a page of each executed notebook in `docs/tutorials`; the notebook itself can be downloaded beside it."""

from pathlib import Path

import nbformat
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

FOLDER = Path(__file__).parents[1] / "tutorials"


def on_files(files, config):
    """Add the pages, and the figures that the notebooks contain."""
    for notebook in sorted(FOLDER.glob("*.ipynb")):
        images = f"{notebook.stem}_files"
        text, resources = MarkdownExporter().from_notebook_node(
            nbformat.read(notebook, as_version=4), {"output_files_dir": images}
        )
        title, rest = text.lstrip().split("\n", 1)
        download = f"[Notebook with outputs]({notebook.name}){{download}}\n"
        page = File.generated(config, f"tutorials/{notebook.stem}.md", content=f"{title}\n\n{download}\n{rest}")
        files.append(page)
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    return files
