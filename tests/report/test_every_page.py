"""The pages beside that of a run: narrow, in forced colours, on paper, by keyboard, under axe-core."""

import json
from types import SimpleNamespace

import pytest
import torch

import tokdyn as td
from tokdyn.loading import load_tokenizer
from tokdyn.objectives import DPO
from tokdyn.report import diff, recompute, scan, served
from tokdyn.runs.difference import Difference
from tokdyn.studies import figures, gallery, load
from tokdyn.studies.result import Claim, Result, Verdict
from tokdyn.testing import random_chis, tiny

PAIRS = [
    {"prompt": f"Where is the {a}?", "chosen": f" The {a} is on the {b}, I think.", "rejected": f" In the {b}, I think."}
    for a, b in (("cat", "mat"), ("dog", "sea"), ("bird", "tree"))
]  # fmt: skip


def a_training(place):
    model, chis = tiny("llama"), random_chis([(3, 6), (2, 5)], seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    probe = {"chosen": random_chis([(3, 5)], seed=5), "rejected": random_chis([(3, 3)], seed=6)}
    with td.Monitor(model, optimizer, probe=probe, out=place / "training", on_error="raise") as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            for chi in chis:
                model(chi.ids[None], labels=torch.where(chi.scored, chi.ids, -100)[None]).loss.backward()
            optimizer.step()
            monitor.step_end()
    return td.watch(place / "training")


def a_gallery(place):
    for name, verdict in (("squeezing", Verdict.HOLDS), ("zig-zag", Verdict.NO)):
        figure, axes = figures.figure(title=name)
        figures.band(axes, [0, 1], [[0, 1], [0, 3]], figures.BLUE, "mean")
        axes.legend()
        claims = [
            Claim("The argmax rises (arXiv 2407.10490 §3.3).", "its interval lies above 0", "0.1 ± 0.2 nats a token", verdict)
        ] * 3
        result = Result(f"A study of {name}", claims, {}, {"one": figure}, "What it means.")
        gallery.save(result, load(name), place / "studies" / name, gallery.Settings(True), seconds=1.0)
    return gallery.page(gallery.saved(place / "studies"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One of each kind, of tiny models with the demo's tokenizer."""
    place, tokenizer = tmp_path_factory.mktemp("pages"), load_tokenizer("demo")
    model = tiny("llama", vocabulary=4096)
    probe = td.probes.load(tokenizer, PAIRS[:1], types=["chosen", "rejected"])
    scanned = td.scan(model, PAIRS, probe, DPO(), out=place / "scan", tokenizer=tokenizer)
    pair = td.preference(tokenizer, *PAIRS[0].values(), group=0)
    runs = [td.profile(tiny("llama", seed=seed, vocabulary=4096), pair, pair, DPO(), tokenizer=tokenizer) for seed in (0, 1)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (place / "run.yaml").write_text(json.dumps(dict(model="demo", data=str(place / "pairs.jsonl"), objective="dpo", rows=2)))
    texts = {
        "scan": scan.render(scanned),
        "diff": diff.render(Difference.of(*runs), ("runs/a", "runs/b")),
        "gallery": a_gallery(place),
        "again": served.document("run, again", recompute.form_of(place, "/again/run")),
    }
    for name, text in texts.items():
        (place / f"{name}.html").write_text(text, encoding="utf-8")
    return SimpleNamespace(training=a_training(place), **{name: place / f"{name}.html" for name in texts})


@pytest.mark.parametrize("kind", ["training", "scan", "diff", "gallery", "again"])
def test_every_page_holds_in_every_way_of_reading(visit, serious, pages, kind):
    """`visit` fails the test when a script does, or when anything is fetched."""
    path = getattr(pages, kind)
    wide = visit(path, bypass_csp=True)
    words = wide.locator("body").inner_text()
    assert serious(wide) == []
    wide.emulate_media(color_scheme="dark")
    assert serious(wide) == []
    narrow = visit(path, viewport={"width": 400, "height": 800}, forced_colors="active")
    assert narrow.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    narrow.keyboard.press("Tab")
    assert narrow.evaluate("document.activeElement !== document.body") or kind == "diff"  # which has nothing to operate
    narrow.emulate_media(media="print")
    assert len(narrow.locator("body").inner_text()) > 0.8 * len(words)  # tools are left out on paper, results are not
