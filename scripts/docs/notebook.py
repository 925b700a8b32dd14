"""The tutorial as a notebook: ``docs/tutorial.ipynb`` is written from ``docs/tutorial.md``, and can be executed.

    python -m scripts.docs.notebook           # write it
    python -m scripts.docs.notebook --run     # execute it in a temporary folder, with two small steps

Files become ``%%writefile`` cells, commands ``!`` cells, Python blocks cells of Python; outputs are left out.
"""

import argparse
import os
import re
import shutil
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from scripts.docs.pages import Block, blocks, commands

PAGE = Path("docs/tutorial.md")
NOTEBOOK = Path("docs/tutorial.ipynb")
SMOKE = """\
# GOPO_TUTORIAL_SMOKE=1 runs every cell with two small steps, to see whether it runs.
import os

SMALL = (
    "--trainer.max_steps=2 --trainer.val_check_interval=2 --data.init_args.prompts_per_step=2 "
    "--data.init_args.validation.limit=2 --data.init_args.predict.limit=2 --model.init_args.rollout.num_completions=2 "
    "--model.init_args.rollout.sampling.max_new_tokens=8"
    if os.environ.get("GOPO_TUTORIAL_SMOKE")
    else ""
)"""


def notebook(page: str) -> nbformat.NotebookNode:
    """The cells of ``page``."""
    cells = [new_code_cell(SMOKE)]
    end = 0
    for block in blocks(page):
        cells.append(new_markdown_cell(page[end : block.start]))
        end = block.end
        if (cell := code_of(block)) is not None:
            cells.append(new_code_cell(cell))
    cells.append(new_markdown_cell(page[end:]))
    kept = [cell for cell in cells if cell.source.strip()]
    for number, cell in enumerate(kept):
        cell.source, cell.id = cell.source.strip(), f"cell-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=kept, metadata={"kernelspec": kernel})


def code_of(block: Block) -> str | None:
    """A cell of code; None for what a command printed."""
    if block.title:
        return f"%%writefile {block.title}\n{block.text}"
    if block.language == "python":
        return block.text
    if block.language == "console":
        return "\n".join("!" + shortened(command) for command in commands(block))
    return None


def shortened(command: str) -> str:
    """With the options of a smoke test, where the command takes those of a configuration."""
    return f"{command} {{SMALL}}" if re.match(r"gopo-lightning (fit|predict|inspect) ", command) else command


def execute(path: Path) -> None:
    """Run the notebook in an empty folder; an error in a cell, or a command that fails, ends it."""
    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code" and cell.source.startswith("!"):
            cell.source += "\nassert _exit_code == 0, _exit_code"
    environment = {"GOPO_TUTORIAL_SMOKE": "1", "PYTHONPATH": f"{Path.cwd()}:{os.environ.get('PYTHONPATH', '')}"}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(environment)
        NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()


def main() -> None:
    """Write the notebook, or run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="execute the notebook instead of writing it")
    if parser.parse_args().run:
        if shutil.which("gopo-lightning") is None:
            raise FileNotFoundError("gopo-lightning is not on PATH: activate the virtual environment first")
        execute(NOTEBOOK)
        return
    nbformat.write(notebook(PAGE.read_text(encoding="utf-8")), NOTEBOOK)


if __name__ == "__main__":
    main()
