#!/usr/bin/env python3
"""Runs notebooks headlessly and strictly: a cell that went wrong in any way fails the notebook.

    notebooks/run.py notebooks/*.ipynb --out target/notebooks

The stock Rust kernel answers "ok" to a cell whose panic, failing `?` or failing `assert!` only shows on stderr, so
nbclient and nbmake pass such a notebook. Here a cell fails on

  - an error reply or an error output,
  - anything at all on stderr,
  - a time-out, or the death of the kernel,

and a cell tagged `raises-exception` fails when none of the first two happened. A notebook without code fails too.
A failed cell ends its notebook; the notebook, the cell's index and source and the message are printed. What was
executed is saved either way: OUT/<name>.ipynb and OUT/<name>.html.

Exit status: 0 all passed, 1 some failed, 2 the command line is wrong.
"""

import argparse
import asyncio
import re
import sys
import time
from pathlib import Path
from queue import Empty

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbclient.util import ensure_async
from nbconvert import HTMLExporter

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# stderr travels to the kernel, and on, beside the reply: the reply can win the race by this much, in seconds.
GRACE = 0.3
SHOWN_LINES = 40


class CellFailed(Exception):
    """A cell, or the notebook as a whole (index None), went wrong."""

    def __init__(self, index, source, message):
        super().__init__(message)
        self.index, self.source, self.message = index, source, message


class StrictClient(NotebookClient):
    """nbclient, which also waits for output that comes after the reply and judges it."""

    reply = None

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        try:
            await super().async_execute_cell(cell, cell_index, **kwargs)
        except DeadKernelError:
            raise CellFailed(cell_index, cell.source, "the kernel died") from None
        except CellTimeoutError:
            raise CellFailed(cell_index, cell.source, f"not finished after {self.timeout} s") from None
        await self.collect_late_output(cell, cell_index)
        message = judge(cell, self.reply["content"])
        if message:
            raise CellFailed(cell_index, cell.source, message)
        return cell

    async def collect_late_output(self, cell, cell_index):
        while True:
            try:
                msg = await ensure_async(self.kc.iopub_channel.get_msg(timeout=GRACE))
            except Empty:
                return
            # Output alone: a second "idle" would raise, and another cell's output is its own.
            mine = msg["parent_header"].get("msg_id") == self.reply["parent_header"].get("msg_id")
            if mine and msg["msg_type"] != "status":
                self.process_message(msg, cell, cell_index)


def judge(cell, reply):
    """What is wrong with an executed cell, or None."""
    errors = [o for o in cell.outputs if o.output_type == "error"]
    stderr = "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stderr")
    message = None
    if errors:
        message = "\n".join("\n".join(o.traceback) or f"{o.ename}: {o.evalue}" for o in errors)
    elif reply["status"] != "ok":
        text = f"{reply.get('ename', '')}: {reply.get('evalue', '')}".strip(": ")
        message = f"the reply's status is {reply['status']}. {text}"
    if stderr:
        message = "\n".join(filter(None, [message, "on stderr:", stderr]))
    if "raises-exception" in cell.metadata.get("tags", []):
        return None if message else "tagged raises-exception, but nothing went wrong"
    return message


async def execute(nb, directory, args):
    """Executes a notebook in place, printing seconds per cell. Raises CellFailed."""
    code = [i for i, cell in enumerate(nb.cells) if cell.cell_type == "code" and cell.source.strip()]
    if not code:
        raise CellFailed(None, "", "no code cells")
    client = StrictClient(
        nb,
        kernel_name=args.kernel,
        timeout=args.timeout,
        startup_timeout=args.startup_timeout,
        allow_errors=True,  # judged here, late output included
        coalesce_streams=True,
        iopub_timeout=30,
        raise_on_iopub_timeout=True,
        record_timing=False,
        shutdown_kernel="immediate",
        resources={"metadata": {"path": str(directory)}},
    )
    client.on_cell_executed = lambda cell, cell_index, execute_reply: setattr(client, "reply", execute_reply)
    began = time.monotonic()
    try:
        setup = client.async_setup_kernel()
        await setup.__aenter__()
    except Exception as error:
        raise CellFailed(None, "", f"kernel {args.kernel!r} did not start: {error}") from None
    try:
        print(f"  start {time.monotonic() - began:8.2f} s")
        for index in code:
            began = time.monotonic()
            try:
                await client.async_execute_cell(nb.cells[index], index)
            finally:
                first_line = nb.cells[index].source.strip().splitlines()[0][:80]
                print(f"  [{index:3}] {time.monotonic() - began:8.2f} s  {first_line}", flush=True)
    finally:
        await setup.__aexit__(None, None, None)


def save(nb, name, out):
    """Writes the executed notebook and its HTML."""
    out.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, out / f"{name}.ipynb")
    html, _ = HTMLExporter().from_notebook_node(nb, {"metadata": {"name": name}})
    (out / f"{name}.html").write_text(html, encoding="utf-8")


def save_in_place(nb, path):
    """Keeps the outputs in the notebook itself, without what would differ from run to run."""
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = None
    nbformat.write(nb, path)


def run(path, args):
    """Runs one notebook. True if it passed."""
    print(f"{path}", flush=True)
    began = time.monotonic()
    failed, nb = None, None
    try:
        nb = nbformat.read(path, as_version=4)
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        asyncio.run(execute(nb, path.resolve().parent, args))
    except CellFailed as error:
        failed = error
    except Exception as error:  # a broken file, or a defect of a kernel: this notebook's failure, not the runner's end
        failed = CellFailed(None, "", f"{type(error).__name__}: {error}")
    if nb is not None:
        save(nb, path.stem, args.out)
    print(f"{'FAIL' if failed else 'ok'} {path} ({time.monotonic() - began:.1f} s)", flush=True)
    if failed:
        where = "" if failed.index is None else f", cell {failed.index}"
        lines = ANSI.sub("", failed.message).strip().splitlines()
        if len(lines) > SHOWN_LINES:
            lines = lines[:SHOWN_LINES] + [f"... {len(lines) - SHOWN_LINES} more lines"]
        print(f"--- {path}{where}")
        print("\n".join(f"    | {line}" for line in failed.source.splitlines()))
        print("\n".join(f"    {line}" for line in lines), flush=True)
    elif args.save:
        save_in_place(nb, path)
    return not failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--kernel", default="rust", help="name of the kernel (default: rust)")
    parser.add_argument("--out", type=Path, default=Path("target/notebooks"), help="where executed notebooks go")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one cell (default: 600)")
    parser.add_argument("--startup-timeout", type=int, default=300, help="seconds for the kernel (default: 300)")
    parser.add_argument("--save", action="store_true", help="keep the outputs in notebooks that passed")
    args = parser.parse_args()
    names = [path.stem for path in args.notebooks]
    if len(set(names)) != len(names):
        parser.error("two notebooks of the same name would overwrite each other's output")
    passed = sum([run(path, args) for path in args.notebooks])
    print(f"{passed} passed, {len(names) - passed} failed")
    return 0 if passed == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
