"""How fast the page of a large run is in a browser: first paint, and an answer to the pointer.

    python benchmarks/page.py [--side 2000] [--moves 40]

A made-up run of `side` observed and update tokens (forces of rank one and noise). Printed: seconds to write the page and its
size, first paint, when all is drawn, and the time from a pointer's move to the end of the frame in which its tooltip stands.
Bars: first paint 3 s, pointer 50 ms.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from playwright.sync_api import sync_playwright

from tokdyn.report import render

MOVE = """async ([selector, x, y]) => {
    const node = document.querySelector(selector);
    const box = node.getBoundingClientRect();
    const at = { clientX: box.left + x * box.width, clientY: box.top + y * box.height, bubbles: true };
    await new Promise(requestAnimationFrame);
    const start = performance.now();
    (document.elementFromPoint(at.clientX, at.clientY) || node).dispatchEvent(new PointerEvent("pointermove", at));
    await new Promise(requestAnimationFrame);
    await new Promise((done) => setTimeout(done));
    return [performance.now() - start, !document.getElementById("tip").hidden];
}"""


def made_up(side: int) -> tuple[dict, pa.Table, np.ndarray]:
    """A run of 2 x `side` tokens in sequences of 100."""
    rng = np.random.default_rng(0)
    matrix = np.outer(rng.normal(size=side), rng.normal(size=side)) + 0.1 * rng.normal(size=(side, side))
    rows, sequences = [], []
    for name in ("updated", "observed"):
        for i in range(side):
            s = i // 100
            role, group = ("chosen", "rejected")[s % 2], s // 2
            row = dict.fromkeys(("c", "force", "predicted", "actual"))
            row |= dict(side=name, row=i, sequence=s, group=group, role=role, position=i % 100, token_id=i)
            row |= dict(token=f" word{i % 997}", log_prob=-2.0, entropy=1.0, g_norm=0.9, rank=3)
            if name == "updated":
                row["c"] = 0.1 if role == "chosen" else -0.1
            else:
                row["force"] = float(matrix[i].sum())
                row["predicted"] = row["actual"] = 1e-3 * row["force"]
            rows.append(row)
            if i % 100 == 0:
                sequences.append(dict(side=name, sequence=s, group=group, role=role, prompt=f"p{s}", response=""))
    about = {"objective": {"name": "DPO", "arguments": {}}, "model": {"name": "made up"}, "settings": {"eta": 1e-3},
             "status": "complete", "sequences": sequences, "findings": []}  # fmt: skip
    return about, pa.Table.from_pylist(rows), matrix.astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=2000)
    parser.add_argument("--moves", type=int, default=40)
    asked = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    about, tokens, matrix = made_up(asked.side)
    start = time.perf_counter()
    page = render(about, tokens, matrix)
    written = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        file = Path(folder) / "report.html"
        file.write_text(page, encoding="utf-8")
        chromium = started.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        tab = chromium.new_page(viewport={"width": 1400, "height": 1000})
        tab.goto(file.as_uri())
        paint = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        loaded = tab.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart") / 1e3
        print(f"{asked.side} x {asked.side} tokens, {platform.processor() or platform.machine()}, Chromium {chromium.version}")
        print(
            f"page: written in {written:.2f} s, {len(page) / 1e6:.1f} MB; first paint {paint / 1e3:.2f} s, drawn {loaded:.2f} s"
        )
        rng = np.random.default_rng(1)
        for name, selector in (("matrix", "#forces .map-frame"), ("answers", "#observed .texts")):
            tab.evaluate("selector => document.querySelector(selector).scrollIntoView()", selector)
            tab.wait_for_timeout(500)
            found = [tab.evaluate(MOVE, [selector, *(0.25 + 0.7 * rng.random(2)).tolist()]) for _ in range(asked.moves)]
            spent = [ms for ms, shown in found if shown]
            print(
                f"pointer on the {name}: median {statistics.median(spent):.1f} ms, largest {max(spent):.1f} ms of {len(spent)}"
            )
        chromium.close()


if __name__ == "__main__":
    main()
