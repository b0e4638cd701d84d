#!/usr/bin/env python3
"""The notebooks as a small site that can be read without running anything.

    notebooks/gallery.py notebooks/[0-9]*.ipynb --out target/gallery
    notebooks/gallery.py notebooks/[0-9]*.ipynb --pictures notebooks/images   # the README's, with Chromium

Each page stands alone: no script, no font and no picture from elsewhere, light and dark. Outputs are shown as they are
saved in the notebook.
"""

import argparse
import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mistune
import nbformat
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import RustLexer

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
STYLE = """
:root{color-scheme:light dark;--line:#d9dde3;--soft:#f4f6f8;--link:#1f5f99;--text:#1b1f24;--page:#fff}
@media (prefers-color-scheme:dark){:root{--line:#363c45;--soft:#1d2127;--link:#86b9ea;--text:#e4e7eb;--page:#14171c}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:980px;margin:0 auto;padding:24px 20px 64px}
p,ul,ol,blockquote,h1,h2,h3,table.md{max-width:760px}
a{color:var(--link)}
h1{line-height:1.2;margin:.6em 0 .4em}h2{margin:2em 0 .4em;line-height:1.25}h3{margin:1.6em 0 .3em}
blockquote{margin:0 0 1em;padding:0 0 0 14px;border-left:3px solid var(--line);opacity:.85}
code{font:.87em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--soft);padding:.1em .3em;border-radius:3px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre code{font:inherit;background:none;padding:0}
.in{background:var(--soft);border:1px solid var(--line);border-radius:6px;padding:10px 12px;margin:18px 0 0;overflow-x:auto}
.out{padding:8px 2px 0;margin:0 0 18px;overflow-x:auto}
.err{border-left:3px solid #c8502d;padding-left:10px}
table.md{border-collapse:collapse}table.md td,table.md th{padding:2px 12px 2px 0;border-bottom:1px solid var(--line);text-align:left}
nav{display:flex;justify-content:space-between;gap:12px;border-top:1px solid var(--line);margin-top:40px;padding-top:12px}
.cards{display:grid;gap:14px;padding:0;list-style:none}
.cards li{border:1px solid var(--line);border-radius:8px;padding:12px 16px}
.cards h2{font-size:1.1em;margin:0 0 4px}.cards p{margin:0;opacity:.85}
"""
CODE = (
    HtmlFormatter(style="xcode", cssclass="in").get_style_defs(".in")
    + "@media (prefers-color-scheme:dark){"
    + HtmlFormatter(style="github-dark", cssclass="in").get_style_defs(".in")
    + "}.in{background:var(--soft)!important}"
)


# The README's pictures: file, notebook, beginning of the display's text, and which of those, width and height in pixels.
PICTURES = [
    ("plan.png", "01", "Memory plan: QLoRA of mistral-7b-v0.1", 0, 760, 780),
    ("block.png", "02", "Block 0 in NF4", 0, 600, 398),
    ("lora.png", "04", "2 B A [5, 6]", 0, 800, 190),
]


def page(title, body):
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}{CODE}</style></head><body><main>{body}</main></body></html>\n"
    )


def output(out):
    if out.output_type == "stream":
        error = " err" if out.name == "stderr" else ""
        return f'<div class="out{error}"><pre>{html.escape(ANSI.sub("", out.text))}</pre></div>'
    if out.output_type == "error":
        trace = ANSI.sub("", "\n".join(out.traceback))
        return f'<div class="out err"><pre>{html.escape(trace)}</pre></div>'
    if "text/html" in out.data:
        return f'<div class="out">{out.data["text/html"]}</div>'
    return f'<div class="out"><pre>{html.escape(out.data.get("text/plain", ""))}</pre></div>'


def rendered(nb):
    markdown = mistune.create_markdown(escape=False, plugins=["table", "strikethrough"])
    parts = []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            # Pages link to pages.
            source = re.sub(r"\(((?:solutions/|\.\./)?\d\d_\w+)\.ipynb", r"(\1.html", cell.source)
            parts.append(markdown(source).replace("<table>", '<table class="md">'))
        elif cell.cell_type == "code" and cell.source.strip():
            parts.append(highlight(cell.source, RustLexer(), HtmlFormatter(cssclass="in")))
            parts.extend(output(out) for out in cell.outputs)
    return "\n".join(parts)


def heading(nb):
    """Title and promise: the first two paragraphs of the first cell."""
    lines = nb.cells[0].source.split("\n\n")
    promise = " ".join(line.lstrip("> ").strip() for line in (lines[1] if len(lines) > 1 else "").splitlines())
    return lines[0].lstrip("# ").strip(), promise


def pictures(lessons, out):
    """Draws single outputs, at twice the size that they have on a page."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        sys.exit("no Chromium on this machine: apt install chromium")
    out.mkdir(parents=True, exist_ok=True)
    for name, number, begins, which, width, height in PICTURES:
        nb = next(nb for path, nb in lessons if path.name.startswith(number))
        shown = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
        found = [o for o in shown if o.data.get("text/plain", "").startswith(begins)]
        with tempfile.TemporaryDirectory() as tmp:
            source = Path(tmp) / "output.html"
            source.write_text(page(name, output(found[which])).replace("<main>", '<main style="padding:8px 16px">'), encoding="utf-8")
            command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=2"]
            size = [f"--window-size={width},{height}", f"--screenshot={(out / name).resolve()}", source.as_uri()]
            subprocess.run(command + size, check=True, capture_output=True)
        print(out / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("target/gallery"), help="where the pages go")
    parser.add_argument("--pictures", type=Path, help="draws the README's pictures there instead")
    args = parser.parse_args()
    lessons = [(path, nbformat.read(path, as_version=4)) for path in sorted(args.notebooks)]
    if args.pictures:
        return pictures(lessons, args.pictures)
    args.out.mkdir(parents=True, exist_ok=True)
    cards = []
    for i, (path, nb) in enumerate(lessons):
        title, promise = heading(nb)
        cards.append(f'<li><h2><a href="{path.stem}.html">{path.stem[:2]} · {html.escape(title)}</a></h2><p>{html.escape(promise)}</p></li>')
        before = f'<a href="{lessons[i - 1][0].stem}.html">← {heading(lessons[i - 1][1])[0]}</a>' if i else "<span></span>"
        after = f'<a href="{lessons[i + 1][0].stem}.html">{heading(lessons[i + 1][1])[0]} →</a>' if i + 1 < len(lessons) else ""
        nav = f'<nav>{before}<a href="index.html">all lessons</a>{after}</nav>'
        (args.out / f"{path.stem}.html").write_text(page(title, rendered(nb) + nav), encoding="utf-8")
        solution = path.parent / "solutions" / path.name
        if solution.exists():
            (args.out / "solutions").mkdir(exist_ok=True)
            body = rendered(nbformat.read(solution, as_version=4))
            (args.out / "solutions" / f"{path.stem}.html").write_text(page(f"Solutions: {title}", body), encoding="utf-8")
    intro = "<h1>tunebook: the lessons</h1><p>QLoRA, run and seen one step at a time, in Rust notebooks.</p>"
    index = page("tunebook: the lessons", f'{intro}<ul class="cards">{"".join(cards)}</ul>')
    (args.out / "index.html").write_text(index, encoding="utf-8")
    print(f"{len(lessons)} lessons in {args.out}")


if __name__ == "__main__":
    main()
