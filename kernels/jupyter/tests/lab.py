#!/usr/bin/env python3
"""A person in JupyterLab: opens the first notebook, runs all cells, sees the plots and the progress, interrupts the training,
and goes on. In headless Chromium; screenshots are left for looking at.

    lab.py OUT_DIR      with the Python of an environment in which JupyterLab, the kernel "rust" and selenium are installed
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

REPOSITORY = Path(__file__).resolve().parents[3]
NOTEBOOK = "00_start_here.ipynb"
TRAINING = "run.train()?;"


def wait(what, condition, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise SystemExit(f"lab: not within {seconds} s: {what}")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Lab:
    """JupyterLab on a copy of the notebooks, and a browser that shows it."""

    def __init__(self, out, work):
        self.out = out
        notebooks = work / "notebooks"
        shutil.copytree(REPOSITORY / "notebooks", notebooks)
        (work / "runs").mkdir()
        self.with_library(notebooks / NOTEBOOK)
        token, port = secrets.token_hex(16), free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = open(out / "jupyter.log", "w")
        environment = dict(os.environ, JUPYTER_CONFIG_DIR=str(work / "config"), JUPYTER_RUNTIME_DIR=str(work / "runtime"))
        self.server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1",
             f"--IdentityProvider.token={token}", f"--notebook-dir={notebooks}", "--LabApp.news_url=None",
             "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.expose_app_in_browser=True"],
            stdout=self.log, stderr=subprocess.STDOUT, env=environment)

        def answers():
            try:
                return urllib.request.urlopen(f"{self.url}/api?token={token}", timeout=2)
            except OSError:
                return None
        wait("JupyterLab's start", answers, 60)
        options = webdriver.ChromeOptions()
        for argument in ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1500",
                         "--disable-gpu", "--no-first-run", "--disable-background-networking",
                         "--disable-component-update", "--disable-sync", f"--user-data-dir={work / 'chrome'}"]:
            options.add_argument(argument)
        options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser")
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        self.browser = webdriver.Chrome(options=options, service=service)
        self.browser.get(f"{self.url}/lab/tree/{NOTEBOOK}?token={token}")

    @staticmethod
    def with_library(path):
        """The notebook finds the library beside it; here it is elsewhere."""
        notebook = json.loads(path.read_text())
        for cell in notebook["cells"]:
            cell["source"] = "".join(cell["source"]).replace('path = ".."', f'path = "{REPOSITORY}"')
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = [], None
        path.write_text(json.dumps(notebook))

    def close(self):
        self.browser.quit()
        self.server.terminate()
        self.server.wait(20)
        self.log.close()

    def shot(self, name):
        self.browser.save_screenshot(str(self.out / f"{name}.png"))

    def js(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def command(self, name, arguments=None):
        """One of JupyterLab's commands, as its menus run it; does not wait for its end."""
        self.js("window.jupyterapp.commands.execute(arguments[0], arguments[1])", name, arguments or {})

    def cells(self):
        """Source, prompt, and text of the outputs of each code cell: of the model, as cells out of sight are not drawn."""
        return self.js("""
            const cells = window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === 'code');
            return cells.map(c => ({
                source: c.model.sharedModel.getSource(),
                count: c.model.executionCount,
                running: c.model.executionState === 'running' || c.promptNode?.textContent?.includes('*') || false,
                outputs: c.model.outputs.toJSON(),
            }));""")

    def cell(self, source):
        return next(c for c in self.cells() if c["source"].strip() == source)

    def show(self, source):
        self.js("""
            const notebook = window.jupyterapp.shell.currentWidget.content;
            const i = notebook.widgets.findIndex(c => c.model.sharedModel.getSource().trim() === arguments[0]);
            notebook.activeCellIndex = i;
            notebook.scrollToItem(i, 'start');""", source)


def html_of(cell):
    return "".join("".join(o.get("data", {}).get("text/html", "")) for o in cell["outputs"])


def errors(cell):
    return [o["ename"] for o in cell["outputs"] if o["output_type"] == "error"]


def main():
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tunebook-lab-") as work:
        lab = Lab(out, Path(work))
        try:
            use(lab)
        finally:
            lab.shot("last")
            lab.close()


def use(lab):
    ready = """const w = window.jupyterapp?.shell?.currentWidget;
               return !!w?.content?.widgets?.length && w.sessionContext?.session?.kernel?.status === 'idle';"""
    wait("the notebook and its kernel", lambda: lab.js(ready), 120)
    lab.shot("1-open")
    lab.command("notebook:run-all-cells")

    def training():
        for c in lab.cells():
            wrong = errors(c)
            if wrong:
                raise SystemExit(f"lab: {wrong} in: {c['source']}\n{c['outputs']}")
        cell = lab.cell(TRAINING)
        return cell if "step " in html_of(cell) else None
    first = html_of(wait("the progress of the training", training, 300))
    lab.show(TRAINING)
    lab.shot("2-training")
    wait("the progress to move", lambda: html_of(lab.cell(TRAINING)) != first, 20)
    began = time.monotonic()
    lab.command("notebook:interrupt-kernel")
    wait("the interrupt", lambda: errors(lab.cell(TRAINING)) == ["Interrupted"], 10)
    print(f"lab: interrupted in {time.monotonic() - began:.2f} s")
    lab.show(TRAINING)
    time.sleep(0.5)
    lab.shot("3-interrupted")
    later = [c for c in lab.cells() if c["source"].strip() == "run.history()?"]
    assert later and later[0]["count"] is None, "cells after the interrupted one must not run"

    lab.show(TRAINING)
    lab.command("notebook:run-cell-and-select-next")
    wait("the training to its end", lambda: not errors(lab.cell(TRAINING)) and lab.cell(TRAINING)["count"], 300)
    lab.command("notebook:run-all-below")
    last = lab.cells()[-1]["source"].strip()
    wait("the last cell", lambda: lab.cell(last)["count"] and lab.cell(last)["outputs"], 300)
    for c in lab.cells():
        assert not errors(c), c
        assert c["count"] is not None, c
    svgs = sum(html_of(c).count("<svg") for c in lab.cells())
    assert svgs > 5, f"{svgs} plots"
    drawn = lab.js("return document.querySelectorAll('.jp-OutputArea-output svg').length")
    assert drawn > 0, "no plot is drawn"
    lab.show("run.history()?")
    time.sleep(0.5)
    lab.shot("4-history")
    print(f"lab: all cells run, {svgs} plots")


if __name__ == "__main__":
    main()
