"""The notebooks are those of the committed sources, executed in order, without an error; a slow test executes them again."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("jupytext")

from tests.support.notebooks import execute, read_source  # noqa: E402

SOURCES = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.py"))
each_tutorial = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


@each_tutorial
def test_the_notebook_is_its_sources(source):
    """If not: `make tutorials`."""
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in read_source(source).cells]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "a figure"
    assert any("image/gif" in str(output.get("data", {})) for output in outputs), "a film"
    assert source.with_suffix(".ipynb").stat().st_size < 1_500_000


@pytest.mark.slow
@each_tutorial
def test_it_runs_as_a_newcomer_runs_it(source):
    execute(source)
