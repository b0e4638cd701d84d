#!/usr/bin/env python3
"""Types the first notebook's cells into stock evcxr 0.22 as its REPL evaluates them, and looks at the text.

    kernels/jupyter/tests/check_repl.py PROGRAM      a compiled tunebook-kernel

Every stage must show aligned text, and nothing that is meant for a browser.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
# A part of what each stage shows.
STAGES = {
    "model": "parameters",
    "plan": "arena",
    "step": "gradient norm",
    "training": "loss",
    "merge": "merge",
}


def main():
    notebook = json.loads((REPOSITORY / "notebooks/00_start_here.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    done = subprocess.run([sys.argv[1], "stock-repl"], input="\n//---\n".join(cells), text=True, capture_output=True,
                          cwd=REPOSITORY / "notebooks")
    print(done.stdout)
    if done.returncode != 0 or done.stderr.strip():
        sys.exit(f"check_repl: a cell went wrong:\n{done.stderr}")
    text = done.stdout
    for stage, part in STAGES.items():
        if part not in text.lower():
            sys.exit(f"check_repl: the {stage} shows no {part!r}")
    html = re.search(r"<(div|svg|table|style)\b", text)
    if html:
        sys.exit(f"check_repl: HTML in a terminal: {text[html.start() - 80:html.end() + 80]!r}")
    print(f"check_repl: {len(cells)} cells show text")


if __name__ == "__main__":
    main()
