"""Makes the notebooks of the workshop from its masters.

    python -m workshop.build      workshop/exercises/*.ipynb and workshop/solutions/*.ipynb

It needs jupytext: pip install jupytext. What the cells' tags mean stands in lesson.py.
"""
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MASTERS = sorted(HERE.glob("[1-9]_*.py"))
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?^ *### END SOLUTION\n", re.M | re.S)
STUB = r'\1raise NotImplementedError("your code")\n'
ONLY_SOLUTIONS = {"mistakes", "teacher"}


def cells_of(master):
    """The cells of a master, as nbformat's."""
    import jupytext
    return jupytext.read(master, fmt="py:percent").cells


def tags(cell):
    return set(cell.metadata.get("tags", ()))


def stub(source):
    """An exercise's source without its solution."""
    return SOLUTION.sub(STUB, source + "\n").rstrip("\n")


def notebook(master, solved):
    """The notebook of a master: with solutions, or with exercises."""
    import nbformat
    book = nbformat.v4.new_notebook()
    book.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3",
                                    "language": "python"},
                     "language_info": {"name": "python"}}
    for i, cell in enumerate(cells_of(master)):
        if tags(cell) & ONLY_SOLUTIONS and not solved:
            continue
        if "start" in tags(cell):
            cell.source = (HERE / "start.py").read_text(encoding="utf-8").rstrip("\n")
        if "exercise" in tags(cell):
            cell.source = re.sub(r"^ *### (BEGIN|END) SOLUTION\n", "", cell.source + "\n",
                                 flags=re.M).rstrip("\n") if solved else stub(cell.source)
        cell.source = re.sub(r"# noqa: [\w, ]+\(", "# (", cell.source)     # no reader needs to know
        if not solved:
            cell.source = cell.source.replace(" mistakes,", "")          # nor what is not there
        cell.id = f"{master.stem.replace('_', '-')}-{i}"               # the same in every build
        book.cells.append(cell)
    return nbformat.writes(book, indent=1) + "\n"


def notebooks():
    """{path: text} of every notebook."""
    return {HERE / folder / f"{master.stem}.ipynb": notebook(master, solved)
            for master in MASTERS for folder, solved in (("exercises", False), ("solutions", True))}


def main():
    try:
        import jupytext  # noqa: F401
    except ImportError:
        sys.exit("workshop.build needs jupytext: pip install jupytext")
    for path, text in notebooks().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        print(path.relative_to(HERE.parent))


if __name__ == "__main__":
    main()
