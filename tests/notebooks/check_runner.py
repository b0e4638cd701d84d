#!/usr/bin/env python3
"""Checks notebooks/run.py against a real kernel: what must fail fails, at the right cell; what must pass passes.

    tests/notebooks/check_runner.py [--kernel rust]

Small notebooks are made in a temporary directory and run by notebooks/run.py with this Python.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

RUNNER = Path(__file__).parents[2] / "notebooks" / "run.py"

# name -> (cells, index of the cell that must be named, a part of the message). "!" in front: tagged raises-exception.
FAILING = {
    "panic": (["let x = 1;", 'panic!("the panic\'s text")', "x"], 1, "the panic's text"),
    "question_mark": (['"many".parse::<i32>()?'], 0, "invalid digit"),
    "failing_assert": (["let x = 2;", 'assert_eq!(x, 3, "two is not three");'], 1, "two is not three"),
    "exit": (["std::process::exit(3);"], 0, "terminated"),
    "compile_error": (["let x: i32 = 1.5;"], 0, "mismatched types"),
    "stderr_of_a_thread": (
        ['std::thread::spawn(|| eprintln!("from a thread")).join().unwrap();'], 0, "from a thread"),
    "time_out": (["let x = 1;", "loop {}"], 1, "not finished after"),
    "expected_failure_missing": (["!1 + 1"], 0, "nothing went wrong"),
    "no_code": ([], None, "no code cells"),
}
PASSING = {
    "good": (["let x = 20;", 'println!("{x}");', "x + 22"], "42"),
    "expected_failures": (['!panic!("as said")', "!let y: i32 = 1.5;", "6 * 7"], "42"),
}


def make(directory, name, cells):
    nb = new_notebook(cells=[new_markdown_cell(f"# {name}")] if not cells else [])
    for source in cells:
        cell = new_code_cell(source.lstrip("!"))
        if source.startswith("!"):
            cell.metadata["tags"] = ["raises-exception"]
        nb.cells.append(cell)
    path = directory / f"{name}.ipynb"
    nbformat.write(nb, path)
    return path


def run(kernel, paths, out, *more):
    command = [sys.executable, RUNNER, "--kernel", kernel, "--out", out, *more, *paths]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    return done.returncode, done.stdout


def check(ok, what):
    if not ok:
        sys.exit(f"check_runner: {what}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kernel", default="rust")
    kernel = parser.parse_args().kernel
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        out = directory / "out"

        paths = [make(directory, name, cells) for name, (cells, _) in PASSING.items()]
        code, text = run(kernel, paths, out)
        check(code == 0 and f"{len(paths)} passed, 0 failed" in text, "a good notebook did not pass")
        for name, (_, value) in PASSING.items():
            last = nbformat.read(out / f"{name}.ipynb", as_version=4).cells[-1]
            check(value in str(last.outputs), f"{name}: its value {value} is not in the executed notebook")
            check("<html" in (out / f"{name}.html").read_text(), f"{name}: no HTML")

        paths = [make(directory, name, cells) for name, (cells, _, _) in FAILING.items()]
        code, text = run(kernel, paths, out, "--timeout", "20")
        check(code == 1 and f"0 passed, {len(paths)} failed" in text, "a bad notebook passed")
        for name, (_, index, message) in FAILING.items():
            report = re.search(rf"^--- \S*/{name}\.ipynb(.*?)(?=^\S*/\w+\.ipynb$|\Z)", text, re.M | re.S)
            check(report is not None, f"{name}: no report")
            if index is not None:
                check(report[1].startswith(f", cell {index}\n"), f"{name}: not reported at cell {index}")
            check(message in report[1], f"{name}: the report does not say {message!r}")

        code, text = run("no-such-kernel", [directory / "good.ipynb"], out)
        check(code == 1 and "did not start" in text, "a missing kernel passed")
        broken = directory / "broken.ipynb"
        broken.write_text("{")
        code, text = run(kernel, [broken], out)
        check(code == 1 and "0 passed, 1 failed" in text, "a broken file passed")
    print(f"check_runner: {len(PASSING)} passed as they must, {len(FAILING) + 2} failed as they must")


if __name__ == "__main__":
    main()
