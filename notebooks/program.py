#!/usr/bin/env python3
"""A notebook as one Rust program: compiled once instead of cell by cell, and for machines with a GPU but no Rust.

    notebooks/program.py run notebooks/solutions/*.ipynb  # compiles them together, runs each; --save keeps the outputs
    notebooks/program.py write notebooks/10_*.ipynb       # examples/lesson_10.rs, for `cargo run --example lesson_10`
    notebooks/program.py check notebooks/10_*.ipynb       # whether that file is current
    notebooks/program.py fill notebooks/10_*.ipynb LOG    # puts what the program printed back into the notebook

The program of `write` is run in notebooks/, e.g. `(cd notebooks && cargo run --example lesson_10 >10.log)`.
`run` compiles the library first, as `cargo build` does. Notebooks whose metadata say `needs_gpu` are only
compiled where there is none.

The program runs the cells in order, as the kernel would: the last expression of a cell shows itself, `?` ends it. It
prints evcxr's markers (EVCXR_IS_RUNTIME=1 is set by the program) and one line before each cell, so that `fill` finds
each cell's output. A cell tagged raises-exception runs in a closure of its own and must fail.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MARK = "TUNEBOOK_CELL"
# Statements that end with their brace.
BLOCKS = re.compile(r"\s*(pub |fn |for |while |loop\b|if |match |struct |enum |impl |unsafe |\{)")

HEAD = """\
//! Made from {name} by notebooks/program.py; edit the notebook.

#![allow(unused, missing_docs, clippy::all)]

use std::fmt::Debug;

/// Shows a cell's last expression as the kernel does: by its display where it has one, else by `Debug`.
struct Last<'a, T>(&'a T);
trait ByDisplay {{
    fn show(&self);
}}
impl<T: tunebook::display::Show> ByDisplay for Last<'_, T> {{
    fn show(&self) {{
        tunebook::display::show(self.0);
    }}
}}
trait ByDebug {{
    fn show(&self);
}}
impl<T: Debug> ByDebug for &Last<'_, T> {{
    fn show(&self) {{
        println!("EVCXR_BEGIN_CONTENT text/plain\\n{{:?}}\\nEVCXR_END_CONTENT", self.0);
    }}
}}

fn main() {{
    // Before any thread is there.
    unsafe {{ std::env::set_var("EVCXR_IS_RUNTIME", "1") }};
    if let Err(e) = cells() {{
        eprintln!("{{e}}");
        std::process::exit(1);
    }}
}}

pub fn cells() -> std::result::Result<(), Box<dyn std::error::Error>> {{
"""


def split(source):
    """(statements, last expression or "") of a cell: scans brackets, strings and comments."""
    depth, start, i, n = 0, 0, 0, len(source)
    while i < n:
        two, c = source[i : i + 2], source[i]
        if two == "//":
            i = source.find("\n", i)
            i = n if i < 0 else i
            continue
        raw = re.match(r'r(#*)"', source[i:])
        if raw:
            i = source.index('"' + raw[1], i + raw.end()) + 1 + len(raw[1])
            continue
        if c == '"':
            i += 1
            while source[i] != '"':
                i += 2 if source[i] == "\\" else 1
        elif c == "'" and re.match(r"'(\\.|[^\\'])'", source[i:]):
            i += re.match(r"'(\\.|[^\\'])'", source[i:]).end() - 1
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
            goes_on = source[i + 1 :].lstrip().startswith((".", "?", "else"))
            if c == "}" and depth == 0 and BLOCKS.match(source[start:]) and not goes_on:
                start = i + 1
        elif c == ";" and depth == 0:
            start = i + 1
        i += 1
    last = source[start:]
    code = "\n".join(line for line in last.splitlines() if line.strip() and not line.strip().startswith("//"))
    return (source[:start], code) if code.strip() else (source, "")


def program(nb, name):
    out = [HEAD.format(name=name)]
    for index, cell in enumerate(nb["cells"]):
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        source = "\n".join(line for line in source.splitlines() if not line.startswith(":"))
        statements, last = split(source)
        out.append(f'    println!("\\n{MARK} {index}");\n')
        shown = f"let last = {{ {last.strip()} }};\n(&Last(&last)).show();\n" if last else ""
        if "raises-exception" in cell["metadata"].get("tags", []):
            body = f"{statements}\n{shown}"
            out.append(
                "    let failed = (|| -> std::result::Result<(), Box<dyn std::error::Error>> {\n"
                f"{body}Ok(())\n    }})();\n"
                '    match failed { Err(e) => println!("TUNEBOOK_STDERR\\n{e}\\nTUNEBOOK_END"), Ok(()) => '
                f'return Err("cell {index} should fail".into()) }}\n'
            )
        else:
            out.append(statements.strip("\n") + "\n")
            if shown:
                out.append("    {\n" + shown + "    }\n")
    out.append(f'    println!("\\n{MARK} end");\n    Ok(())\n}}\n')
    return "".join(out)


def formatted(source):
    """As `cargo fmt` wants it."""
    command = ["rustfmt", "--edition=2024", f"--config-path={EXAMPLES.parent}"]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else sys.exit(done.stderr)


def outputs(text):
    """The outputs of one cell from what was printed: streams and displays in their order."""
    found = []

    def stream(name, lines):
        text = "\n".join(lines).strip("\n")
        if text:
            found.append({"name": name, "output_type": "stream", "text": (text + "\n").splitlines(keepends=True)})

    lines, plain = text.split("\n"), []
    data = {}
    i = 0
    while i < len(lines):
        begin = re.fullmatch(r"EVCXR_BEGIN_CONTENT (\S+)", lines[i])
        if begin or lines[i] == "TUNEBOOK_STDERR":
            end = lines.index("EVCXR_END_CONTENT" if begin else "TUNEBOOK_END", i)
            content = "\n".join(lines[i + 1 : end])
            if begin:
                data[begin[1]] = content.splitlines(keepends=True)
            else:
                stream("stderr", content.split("\n"))
            i = end
        else:
            plain.append(lines[i])
        i += 1
    stream("stdout", plain)
    if data:
        found.append({"data": data, "execution_count": None, "metadata": {}, "output_type": "execute_result"})
    return found


def fill(nb, log):
    parts = re.split(rf"\n{MARK} (\w+)\n", log)
    by_cell = dict(zip(parts[1::2], parts[2::2]))
    if "end" not in by_cell:
        sys.exit(f"the program did not reach its end: it stopped in cell {parts[-2] if len(parts) > 1 else 'none'}")
    for index, cell in enumerate(nb["cells"]):
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = outputs(by_cell[str(index)]), None
    return nb


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(nb, path):
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def compiled(paths, directory):
    """One program of all notebooks, which takes the number of the one to run. Compiled as a cell is: not optimised."""
    modules, arms = "", ""
    for i, path in enumerate(paths):
        (directory / f"notebook_{i}.rs").write_text(program(read(path), path.name), encoding="utf-8")
        modules += f"mod notebook_{i};\n"
        arms += f'        Some("{i}") => notebook_{i}::cells(),\n'
    main = directory / "main.rs"
    main.write_text(
        f"#![allow(unused, missing_docs, clippy::all)]\n{modules}fn main() {{\n"
        '    unsafe { std::env::set_var("EVCXR_IS_RUNTIME", "1") };\n'
        f"    let result = match std::env::args().nth(1).as_deref() {{\n{arms}        _ => Ok(()),\n    }};\n"
        '    if let Err(e) = result {\n        eprintln!("{e}");\n        std::process::exit(1);\n    }\n}\n',
        encoding="utf-8",
    )
    version = subprocess.run(["rustc", "-vV"], capture_output=True, text=True, check=True).stdout
    host = re.search("host: (.*)", version)[1]
    target = Path(os.environ.get("CARGO_TARGET_DIR", EXAMPLES.parent / "target")) / host / "debug"
    library = the_library()
    # The host's are the procedural macros.
    paths_to = [f"-Ldependency={d / 'deps'}" for d in (target, target.parents[1] / "debug")]
    command = ["rustc", "--edition=2024", "-Cprefer-dynamic", *paths_to, f"--extern=tunebook={library}"]
    if subprocess.run([*command, str(main), "-o", str(directory / "notebooks")]).returncode:
        sys.exit("the notebooks do not compile")
    return directory / "notebooks"


def the_library():
    """The compiled library; cargo says which of those in the target directory it is, and compiles it if need be."""
    command = ["cargo", "build", "--quiet", "--message-format=json"]
    built = subprocess.run(command, cwd=EXAMPLES.parent, stdout=subprocess.PIPE, text=True, check=True).stdout
    artifacts = [json.loads(line) for line in built.splitlines()]
    files = [f for a in artifacts if a.get("target", {}).get("name") == "tunebook" and "lib" in a["target"]["kind"]
             for f in a["filenames"]]
    return next(Path(f).with_suffix(".rlib") for f in files if Path(f).parent.name == "deps")


def run(paths, save):
    """Runs notebooks as programs, each in its own directory. True if none failed."""
    libraries = subprocess.run(["rustc", "--print", "target-libdir"], capture_output=True, text=True, check=True).stdout
    env = {**os.environ, "LD_LIBRARY_PATH": libraries.strip()}
    failed = 0
    with tempfile.TemporaryDirectory() as tmp:
        binary = compiled(paths, Path(tmp))
        for i, path in enumerate(paths):
            if read(path)["metadata"].get("needs_gpu") and not Path("/dev/nvidiactl").exists():
                print(f"compiled {path}: it needs a GPU", flush=True)
                continue
            began = time.monotonic()
            done = subprocess.run([binary, str(i)], cwd=path.parent, env=env, capture_output=True, text=True)
            print(f"{'FAIL' if done.returncode else 'ok'} {path} ({time.monotonic() - began:.1f} s)", flush=True)
            if done.returncode:
                failed += 1
                where = re.findall(rf"^{MARK} (\w+)$", done.stdout, flags=re.M)
                print(f"--- cell {where[-1] if where else 'none'}\n{done.stderr}")
            elif save:
                write(fill(read(path), done.stdout), path)
    return failed == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    runs = actions.add_parser("run", help="compile and run notebooks")
    runs.add_argument("notebooks", nargs="+", type=Path)
    runs.add_argument("--save", action="store_true", help="keep the outputs in notebooks that passed")
    for name in ("write", "check"):
        actions.add_parser(name).add_argument("notebooks", nargs="+", type=Path)
    fills = actions.add_parser("fill", help="put what a program printed into its notebook")
    fills.add_argument("notebook", type=Path)
    fills.add_argument("log", type=Path)
    args = parser.parse_args()
    if args.action == "run":
        return 0 if run(args.notebooks, args.save) else 1
    if args.action == "fill":
        write(fill(read(args.notebook), args.log.read_text(encoding="utf-8")), args.notebook)
        return 0
    for path in args.notebooks:
        rust = EXAMPLES / f"lesson_{path.name[:2]}.rs"
        source = formatted(program(read(path), path.name))
        if args.action == "write":
            rust.write_text(source, encoding="utf-8")
            print(rust)
        elif not rust.exists() or rust.read_text(encoding="utf-8") != source:
            sys.exit(f"{rust} is not what {path} says: run 'notebooks/program.py write {path}'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
