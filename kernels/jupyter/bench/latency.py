#!/usr/bin/env python3
"""Latency, start and memory of the kernel beside stock evcxr_jupyter 0.22, in one run on one machine.

    latency.py KERNEL_PROGRAM [--cells 20] [--many 500] [--only ours|stock]

KERNEL_PROGRAM is target/<host>/release/tunebook-kernel, whose `kernel` and `stock` start the two. Everything is compiled before
(`tunebook-kernel run --stock` of any notebook does it). Prints medians and minima in milliseconds, and the ratio of medians.
"""

import argparse
import os
import statistics
import subprocess
import time
from pathlib import Path

from jupyter_client import KernelManager

REPOSITORY = Path(__file__).resolve().parents[3]
DEP = f':dep tunebook = {{ path = "{REPOSITORY}" }}'
CELLS = {
    "i + 1": "{i} + 1",
    "library expression": 'tunebook::plan::Gpu::preset("t4")?',
    "let of a library value": 'let gpu_{i} = tunebook::plan::Gpu::preset("t4")?;',
    "fn and its call": "fn f_{i}(x: u64) -> u64 {{ x + {i} }}\nf_{i}(1)",
}


class Kernel:
    def __init__(self, program, kind):
        self.manager = KernelManager()
        self.manager._kernel_spec = self.manager.kernel_spec_manager.get_kernel_spec("rust")
        self.manager.kernel_spec.argv = [program, kind, *self.target(program), "{connection_file}"]
        self.began = time.monotonic()
        self.manager.start_kernel(cwd=str(REPOSITORY / "notebooks"), stderr=subprocess.DEVNULL)
        self.client = self.manager.client()
        self.client.start_channels()

    @staticmethod
    def target(program):
        return ["--target", str(Path(program).resolve().parents[2])]

    def ready(self):
        self.client.wait_for_ready(timeout=300)
        return time.monotonic() - self.began

    def run(self, code):
        """Seconds from the request until reply and idle are here."""
        began = time.monotonic()
        reply = self.client.execute_interactive(code, timeout=600, output_hook=lambda m: None)
        assert reply["content"]["status"] == "ok", (code, reply["content"])
        return time.monotonic() - began

    def processes(self):
        root = self.manager.provisioner.process.pid
        children = {}
        for p in filter(str.isdigit, os.listdir("/proc")):
            try:
                parent = Path(f"/proc/{p}/stat").read_text().rsplit(")", 1)[1].split()[1]
            except OSError:
                continue
            children.setdefault(int(parent), []).append(int(p))
        found, todo = [], [root]
        while todo:
            p = todo.pop()
            found.append(p)
            todo += children.get(p, [])
        return found

    def status(self, field):
        """Sum of a field of /proc/PID/status over all processes."""
        total = 0
        for p in self.processes():
            try:
                lines = Path(f"/proc/{p}/status").read_text().splitlines()
            except OSError:
                continue
            total += next((int(l.split()[1]) for l in lines if l.startswith(field + ":")), 0)
        return total

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=False)


def measure(program, kind, cells):
    out = {}
    kernel = Kernel(program, kind)
    out["start to ready"] = [kernel.ready()]
    first = f"{DEP}\nuse tunebook::prelude::*;\nGpu::preset(\"t4\")?"
    kernel.run(first)
    out["start to the first library value"] = [time.monotonic() - kernel.began]
    kernel.run('let spec = ModelSpec::preset("mistral-7b-v0.1")?;')
    out["start to the first let of one"] = [time.monotonic() - kernel.began]
    for name, code in CELLS.items():
        kernel.run(code.format(i=1000))
        out[name] = [kernel.run(code.format(i=i)) for i in range(cells)]
    memory = kernel.status("VmRSS") / 1024
    kernel.close()
    return out, memory


def many(program, cells):
    """The same kind of cell again and again: nothing grows."""
    kernel = Kernel(program, "kernel")
    kernel.ready()
    kernel.run("let mut n = 0_u64;")
    times, threads = [], []
    for i in range(cells):
        times.append(kernel.run(f"n += {i}; n"))
        threads.append(kernel.status("Threads"))
    kernel.close()
    fifth = max(1, cells // 5)
    early, late = statistics.median(times[:fifth]), statistics.median(times[-fifth:])
    print(f"{cells} cells: {early * 1000:.0f} ms at first, {late * 1000:.0f} ms at last ({late / early - 1:+.0%}), "
          f"threads {threads[min(5, cells - 1)]} to {threads[-1]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--cells", type=int, default=20)
    parser.add_argument("--many", type=int, default=500)
    parser.add_argument("--only", choices=["ours", "stock"])
    args = parser.parse_args()
    kinds = {"ours": "kernel", "stock": "stock"}
    results = {name: measure(args.program, kind, args.cells)
               for name, kind in kinds.items() if args.only in (None, name)}
    print(f"{'ms, median/min of ' + str(args.cells):36}" + "".join(f"{name:>16}" for name in results) + f"{'ratio':>8}")
    for row in next(iter(results.values()))[0]:
        times = [r[0][row] for r in results.values()]
        shown = "".join(f"{statistics.median(t) * 1000:>8.0f}/{min(t) * 1000:<7.0f}" for t in times)
        ratio = f"{statistics.median(times[0]) / statistics.median(times[1]):8.2f}" if len(times) == 2 else ""
        print(f"{row:36}{shown}{ratio}")
    print(f"{'memory of all its processes, MB':36}" + "".join(f"{r[1]:>16.0f}" for r in results.values()))
    if args.only != "stock" and args.many:
        many(args.program, args.many)


if __name__ == "__main__":
    main()
