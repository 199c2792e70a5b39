"""`python -m tests.support.notebooks FILE.py`: execute a tutorial in an empty folder, and write its notebook beside it.

The source is a Python file whose cells begin with `# %%`. Cells with the tag `remove_cell` are executed and not shown.
"""

import os
import re
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def read_source(file: Path) -> nbformat.NotebookNode:
    """The cells of a tutorial, without outputs, with identifiers that do not change."""
    notebook = jupytext.read(file)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def execute(file: Path, *, timeout: int = 900) -> nbformat.NotebookNode:
    """Run all cells, in an empty folder. Raises CellExecutionError for the first that fails."""
    notebook = read_source(file)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        for output in cell.get("outputs", []):
            if output.output_type == "stream":  # a page shows no colours
                output.text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.text)
    return notebook


if __name__ == "__main__":
    source = Path(sys.argv[1])
    began = time.monotonic()
    made = execute(source)
    nbformat.write(made, source.with_suffix(".ipynb"))
    print(f"{source.with_suffix('.ipynb')}: executed in {time.monotonic() - began:.0f} s")
