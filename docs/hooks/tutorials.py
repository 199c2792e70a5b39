"""Makes a page of each executed notebook in `docs/tutorials`; the notebook itself can be downloaded beside it."""

from base64 import b64decode
from pathlib import Path

import nbformat
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

FOLDER = Path(__file__).parents[1] / "tutorials"


def on_files(files, config):
    """Add the pages, and the figures that the notebooks contain."""
    for notebook in sorted(FOLDER.glob("*.ipynb")):
        images, content = f"{notebook.stem}_files", nbformat.read(notebook, as_version=4)
        films = _take_films(content, images)
        text, resources = MarkdownExporter().from_notebook_node(content, {"output_files_dir": images})
        title, rest = text.lstrip().split("\n", 1)
        download = f"[Notebook with outputs]({notebook.name}){{download}}\n"
        page = File.generated(config, f"tutorials/{notebook.stem}.md", content=f"{title}\n\n{download}\n{rest}")
        files.append(page)
        for name, image in {**resources["outputs"], **films}.items():
            files.append(File.generated(config, f"tutorials/{name}", content=image))
    return files


def _take_films(notebook, folder):
    """Replace GIF outputs, which nbconvert does not write, by links to files. Return the files."""
    films = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/gif" in output.get("data", {}):
                name = f"{folder}/film_{len(films)}.gif"
                films[name] = b64decode(output.data["image/gif"])
                output.data = nbformat.from_dict({"text/markdown": f"![film]({name})"})
    return films
