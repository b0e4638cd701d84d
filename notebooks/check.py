#!/usr/bin/env python3
"""Checks what the notebooks say against what they show.

    notebooks/check.py [--executed target/notebooks] notebooks/[0-9]*.ipynb

In each notebook:
  - a number in backticks in a text appears in the output of the next cell that runs, rounded as it is written; after the
    last cell, anywhere in the notebook;
  - links to files resolve;
  - every cell that shows something has its output saved, and the file is not too large;
  - it has 10 to 40 cells, none too long to read.
With --executed, the saved outputs are also those of a fresh run: the same numbers, whole ones exactly, others within
3 %. Cells tagged `machine` (times, the machine's own properties) are left out.
"""

import argparse
import html
import re
import sys
from pathlib import Path

import nbformat

SAVE = "run `tunebook-kernel run --save`"
LARGEST = 300_000
MOST_CELLS, MOST_LINES, WIDEST = 40, 15, 116
CODE_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
# A number alone, with a unit at most.
NUMBER_SPAN = re.compile(r"[-+−]?(\d[\d,]*(?:\.\d+)?)(?: ?(?:%|x|bits?|bytes?|[kMG]i?B|s|ms))?")
NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SPARKLINE = re.compile(r"[▁▂▃▄▅▆▇█▏▎▍▌▋▊▉]+")


def text_of(cell):
    """What a cell shows, as text: streams, the plain text of displays, and the text of their HTML."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            parts.append(output.text)
        elif output.output_type == "error":
            parts.append("\n".join(output.traceback))
        else:
            parts.append(output.data.get("text/plain", ""))
            markup = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", output.data.get("text/html", ""), flags=re.S)
            parts.append(html.unescape(re.sub(r"<[^>]+>", " ", markup)))
    return "\n".join(parts)


def plain_text_of(cell):
    """As text_of, without the HTML, which says the same, and without what belongs to charts."""
    parts = []
    for output in cell.outputs:
        parts.append(output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", ""))
    return SPARKLINE.sub(" ", "\n".join(parts))


def shown(text, wanted):
    """Whether a number appears in a text, when that is rounded to as many places as `wanted` has."""
    wanted = wanted.replace(",", "")
    places = len(wanted.partition(".")[2])
    for found in NUMBER.findall(text):
        value = float(found.replace(",", ""))
        if f"{abs(value):.{places}f}" == wanted or (places == 0 and found.lstrip("-").replace(",", "") == wanted):
            return True
    return False


def check_numbers(nb):
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    for index, cell in enumerate(nb.cells):
        if cell.cell_type != "markdown":
            continue
        following = [c for c in nb.cells[index + 1 :] if c.cell_type == "code"][:1]
        text = "\n".join(text_of(c) for c in following or code)
        for span in CODE_SPAN.findall(cell.source):
            number = NUMBER_SPAN.fullmatch(span)
            if number and not shown(text, number[1]):
                yield index, f"`{span}` is not in the output of the next cell"


def check_links(nb, path):
    for index, cell in enumerate(nb.cells):
        if cell.cell_type != "markdown":
            continue
        for target in LINK.findall(cell.source):
            if re.match(r"https?://|#", target):
                continue
            if not (path.parent / target.partition("#")[0]).exists():
                yield index, f"the link {target} leads nowhere"


def check_shape(nb, path):
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    if not 10 <= len(code) <= MOST_CELLS and "solutions" not in path.parts:
        yield None, f"{len(code)} code cells; a lesson has 10 to {MOST_CELLS}"
    if path.stat().st_size > LARGEST:
        yield None, f"{path.stat().st_size:,} bytes, at most {LARGEST:,}"
    for index, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        lines = cell.source.splitlines()
        if len(lines) > MOST_LINES:
            yield index, f"{len(lines)} lines, at most {MOST_LINES}"
        yield from ((index, f"a line of {len(l)} columns: {l[:50]}…") for l in lines if len(l) > WIDEST)
        last = lines[-1].strip() if lines else ""
        if last and not last.endswith((";", "}")) and not cell.outputs:
            yield index, f"its output is not saved: {SAVE}"


def check_current(nb, executed):
    fresh = nbformat.read(executed, as_version=4)
    if [c.source for c in fresh.cells] != [c.source for c in nb.cells]:
        yield None, f"{executed} was made from another version"
        return
    for index, (saved, new) in enumerate(zip(nb.cells, fresh.cells)):
        if saved.cell_type != "code" or "machine" in saved.metadata.get("tags", []):
            continue
        if "raises-exception" in saved.metadata.get("tags", []):
            said = next((o.evalue.splitlines()[0] for o in saved.outputs if o.output_type == "error"), None)
            if said is None or said not in text_of(new):
                yield index, f"a fresh run does not say {said!r}: {SAVE}"
            continue
        a, b = (NUMBER.findall(plain_text_of(c)) for c in (saved, new))
        if len(a) != len(b):
            yield index, f"the saved output has {len(a)} numbers, a fresh one {len(b)}: {SAVE}"
            continue
        for x, y in zip(a, b):
            p, q = (float(v.replace(",", "")) for v in (x, y))
            close = abs(p - q) <= 0.03 * max(abs(p), abs(q)) or max(abs(p), abs(q)) < 1e-4
            if x != y and (not close or "." not in x + y):
                yield index, f"the saved output says {x}, a fresh one {y}: {SAVE}"
                break


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--executed", type=Path, help="where `tunebook-kernel run` left the executed notebooks")
    args = parser.parse_args()
    wrong = 0
    for path in args.notebooks:
        nb = nbformat.read(path, as_version=4)
        found = [*check_numbers(nb), *check_links(nb, path), *check_shape(nb, path)]
        if args.executed:
            found += check_current(nb, args.executed / path.name)
        for index, message in found:
            print(f"{path}{'' if index is None else f', cell {index}'}: {message}")
        wrong += len(found)
    print(f"{len(args.notebooks)} notebooks, {wrong or 'nothing'} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
