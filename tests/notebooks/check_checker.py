#!/usr/bin/env python3
"""Checks notebooks/check.py and notebooks/program.py on small notebooks: what is wrong is found, what is right passes."""

import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
import program  # noqa: E402


def cell(source, text):
    return new_code_cell(source, outputs=[new_output("stream", name="stdout", text=text)] if text else [])


def notebook(*first):
    filler = [cell(f"println!(\"{i}\");", f"{i}\n") for i in range(12)]
    return new_notebook(cells=[*first, *filler])


# name -> (notebook, a part of what is found; None: nothing)
CASES = {
    "right": (notebook(new_markdown_cell("`4.125` GB, `65,536`, `r = 8`, [x](right.ipynb)"), cell("x", "65,536 in 4.12534 GB")), None),
    "number_missing": (notebook(new_markdown_cell("it is `4.13` GB"), cell("x", "4.125 GB, 14.13")), "`4.13` is not in the output"),
    "number_in_html": (
        notebook(new_markdown_cell("`7,241`"), new_code_cell("x", outputs=[new_output("execute_result", {"text/html": "<b>7,241</b>"})])),
        None,
    ),
    "link": (notebook(new_markdown_cell("[x](nowhere.ipynb)"), cell("x", "1")), "nowhere.ipynb leads nowhere"),
    "not_saved": (notebook(cell("x", "")), "its output is not saved"),
    "long_line": (notebook(cell("let x = \"" + 120 * "x" + "\";", "")), "a line of"),
}

CELLS = {
    "let x = 1;\nx + 1": ("let x = 1;", "x + 1"),
    "let x = 1;": ("let x = 1;", ""),
    "for x in 0..3 {\n    y(x);\n}": ("for x in 0..3 {\n    y(x);\n}", ""),
    "fn f() -> i32 {\n    1\n}\nf()": ("fn f() -> i32 {\n    1\n}", "f()"),
    'let s = "a;b}";\nprintln!("{s}");\ncheck("x;", \'}\', 1)?': ('let s = "a;b}";\nprintln!("{s}");', 'check("x;", \'}\', 1)?'),
    "lora::discover(&m, r\".*;\").map(|f| {\n    f\n})": ("", "lora::discover(&m, r\".*;\").map(|f| {\n    f\n})"),
    "if a {\n    b();\n} else {\n    c();\n}": ("if a {\n    b();\n} else {\n    c();\n}", ""),
    "let x = 1; // a; b\n": ("let x = 1;", ""),
}


def main():
    wrong = []
    with tempfile.TemporaryDirectory() as tmp:
        for name, (nb, expected) in CASES.items():
            path = Path(tmp) / f"{name}.ipynb"
            nbformat.write(nb, path)
            done = subprocess.run([sys.executable, NOTEBOOKS / "check.py", path], capture_output=True, text=True)
            ok = done.returncode == 0 if expected is None else done.returncode == 1 and expected in done.stdout
            if not ok:
                wrong.append(f"{name}: {done.stdout}{done.stderr}")
        fresh = notebook(cell("x", "loss 0.5000, 1,000 bytes"))
        (Path(tmp) / "fresh").mkdir()
        nbformat.write(fresh, Path(tmp) / "fresh" / "stale.ipynb")
        for text, passes in [("loss 0.5010, 1,000 bytes", True), ("loss 0.6000, 1,000 bytes", False), ("loss 0.5000, 1,001 bytes", False)]:
            path = Path(tmp) / "stale.ipynb"
            fresh.cells[0] = cell("x", text)
            nbformat.write(fresh, path)
            command = [sys.executable, NOTEBOOKS / "check.py", "--executed", Path(tmp) / "fresh", path]
            done = subprocess.run(command, capture_output=True, text=True)
            if (done.returncode == 0) != passes:
                wrong.append(f"stale, {text}: {done.stdout}")
    for source, (statements, last) in CELLS.items():
        found = program.split(source)
        if (found[0].strip().partition(" //")[0], found[1].strip()) != (statements, last):
            wrong.append(f"split {source!r}: {found}")
    log = "\nTUNEBOOK_CELL 0\nhello\nEVCXR_BEGIN_CONTENT text/html\n<b>1</b>\nEVCXR_END_CONTENT\nEVCXR_BEGIN_CONTENT text/plain\n1\nEVCXR_END_CONTENT\n\nTUNEBOOK_CELL end\n"
    filled = program.fill({"cells": [{"cell_type": "code"}]}, log)["cells"][0]["outputs"]
    if filled[0]["text"] != ["hello\n"] or filled[1]["data"] != {"text/html": ["<b>1</b>"], "text/plain": ["1"]}:
        wrong.append(f"fill: {filled}")
    print("\n".join(wrong) or "the checks of the notebooks find what is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
