"""The pages in a browser: their scripts run, and what they show is what the run's table and matrix hold."""

from __future__ import annotations

import csv
import re
import threading
from dataclasses import replace
from xml.etree import ElementTree

import pyarrow as pa
import pytest
import torch

import tokdyn as td
from tokdyn.loading import DEMO_PAIRS, load_model
from tokdyn.report import training
from tokdyn.runs.by_sequence import BySequence
from tokdyn.runs.contexts import Contexts
from tokdyn.testing import random_chis, tiny

DIGITS = 0.5e-2  # numbers on a page have three significant digits: half a unit of the third is at most 0.5 %
POWERS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹−", "-0123456789-")


def numbers(text):
    """The numbers of a text as the page writes them: "−1.26×10⁻⁴ nats" -> [-1.26e-4]."""
    found = re.findall(r"[+-]?\d[\d,]*(?:\.\d+)?(?:×10-?\d+)?", text.translate(POWERS))
    return [float(number.replace(",", "").replace("×10", "e")) for number in found]


@pytest.fixture(scope="module")
def run():
    """A DPO step of the demo model on one demo pair, seen at its chosen answer and at a rejected one of another prompt."""
    model, tokenizer = load_model("demo")
    pairs = [
        td.preference(tokenizer, row["prompt"], row["chosen"], row["rejected"], group=group)
        for group, row in enumerate(td.data.read(DEMO_PAIRS)[:2])
    ]
    observe = [pairs[0][0], pairs[1][1]]
    return td.profile(model, pairs[0], observe, tokenizer=tokenizer, about={"model": {"name": "demo"}})


@pytest.fixture(scope="module")
def file(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    run.to_html(path)
    return path


def details(page):
    """What the panel says of the selected token: heading, place, and its list of facts."""
    panel = page.locator("#inspector")
    names, values = (panel.locator(f".facts-list > {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return panel.locator("h3").inner_text(), panel.locator(".place").inner_text(), dict(zip(names, values, strict=True))


def path_of(line):
    """The points of a drawn line."""
    numbers = [float(x) for x in re.findall(r"-?[\d.]+", line.get_attribute("d"))]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def by_context(run):
    """The run by context, and its step size."""
    return Contexts.of(BySequence.of(run.tokens, run.matrix), run.about["sequences"]), run.about["settings"]["eta"]


def spelled(token):
    """A token as the page spells it in a list: white space at its ends is marked."""
    return re.sub(r"^ | $", "␣", token).replace("\n", "↵")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_run_loads_with_every_token_and_a_drawn_matrix(visit, run, file, scheme):
    page = visit(file, color_scheme=scheme)
    M, L = run.matrix.shape
    assert page.locator("#observed .token").count() == M and page.locator("#updated .token").count() == L
    assert page.locator("html").get_attribute("data-theme") == scheme
    painted = page.locator("#forces canvas").evaluate(
        """canvas => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            const colours = new Map();
            for (let k = 0; k < data.length; k += 4) {
                const rgba = data.slice(k, k + 4).join();
                colours.set(rgba, (colours.get(rgba) || 0) + 1);
            }
            return [colours.size, Math.max(...colours.values()) / (data.length / 4)];
        }"""
    )
    assert painted[0] > 50 and painted[1] < 0.9  # cells of many colours; a blank canvas is one colour all over
    assert page.locator("#verify circle.dot, #verify path.dot").count() >= M  # one for each token, and the residuals
    assert page.locator("#vocabulary tbody tr").count() == 16  # eight risers, eight fallers


def test_a_training_of_which_nothing_was_recorded_says_so(visit, tmp_path):
    about = {"kind": "training", "status": "complete", "steps": 3}
    (tmp_path / "empty.html").write_text(
        training.render(about, {"tokens": None, "probe": None, "steps": None}), encoding="utf-8"
    )
    page = visit(tmp_path / "empty.html")
    assert "Nothing was recorded" in page.locator(".banner").first.inner_text()


def test_a_sequence_has_one_name_in_terminal_findings_and_page(visit, run, file):
    page, table = visit(file), BySequence.of(run.tokens, run.matrix)
    for k, (side, names) in enumerate((("observed", ["chosen 1", "rejected 2"]), ("updated", ["chosen 1", "rejected 1"]))):
        assert names == [name for (of, _), name in table.names.items() if of == side]
        assert names == page.locator(f"#{side} .caption .name").all_inner_texts()
        assert names == page.locator("#forces select").nth(k).locator("option").all_inner_texts()[-2:]
    assert any("rejected 2" in text for text in page.locator(".findings p").all_inner_texts())


@pytest.mark.parametrize("m", [8, 40])
def test_an_observed_token_shows_its_row_of_the_table_and_who_moved_it(visit, run, file, m):
    """One that is trained on in its own place, and one of another prompt."""
    page, table = visit(file), BySequence.of(run.tokens, run.matrix)
    row = table.observed[m]
    page.locator(f'#observed .token[data-i="{row["row"]}"]').click()
    heading, where, facts = details(page)
    assert heading == f"Observed {spelled(row['token'])}" and where == table.place(row)
    assert where in page.locator("#selection").inner_text()
    for name, column in (("actual change", "actual"), ("predicted", "predicted"), ("log-prob", "log_prob"),
                         ("entropy", "entropy")):  # fmt: skip
        assert numbers(facts[name])[0] == pytest.approx(row[column], rel=DIGITS), name
    assert numbers(facts["rank"]) == [row["rank"] + 1]
    contexts, eta = by_context(run)
    ranking, others = page.locator("#inspector .ranking button"), contexts.others[m]
    own = [(int(contexts.own[m]), contexts.itself(m))] if contexts.own[m] >= 0 else []
    expected = own + [(x, float(others[x])) for x in others.abs().argsort(descending=True).tolist()[:6]]
    assert ranking.count() == len(expected) == (7 if m == 8 else 6)
    for k, (x, force) in enumerate(expected):
        tokens = contexts.tokens(x)
        assert ranking.nth(k).locator(".token-text").inner_text() == "/".join(map(spelled, tokens))
        shown = numbers(ranking.nth(k).locator(".value").inner_text())
        assert shown == [pytest.approx(eta * force, rel=DIGITS, abs=1e-6 * eta * float(run.matrix[m].abs().sum()))]
        where = ", ".join(contexts.sequences(x)) if k or not own else "itself"
        assert ranking.nth(k).locator(".where").inner_text() == where
    page.get_by_role("radio", name="per unit lr").click()
    assert "nats per unit lr" in page.locator("#inspector").inner_text()
    page.get_by_role("radio", name="token by token").click()
    forces = run.matrix[m]
    for k, l in enumerate(forces.abs().argsort(descending=True).tolist()[:6]):  # noqa: E741
        assert ranking.nth(k).locator(".token-text").inner_text() == spelled(table.updated[l]["token"])
        assert numbers(ranking.nth(k).locator(".value").inner_text()) == [pytest.approx(float(forces[l]), rel=DIGITS)]
    facts = details(page)[2]
    assert numbers(facts["predicted"])[0] == pytest.approx(row["force"], rel=DIGITS)
    assert numbers(facts["actual change"])[0] == pytest.approx(row["actual"] / eta, rel=DIGITS)
    page.keyboard.press("Escape")
    assert page.locator("#selection").inner_text() == "no token selected"


def test_an_update_token_shows_its_weight_and_whom_it_moved(visit, run, file):
    page, table = visit(file), BySequence.of(run.tokens, run.matrix)
    row = table.updated[-3]
    page.locator(f'#updated .token[data-i="{row["row"]}"]').click()
    heading, where, facts = details(page)
    assert heading == f"Update {spelled(row['token'])}" and where == table.place(row)
    assert numbers(facts["weight c"])[0] == pytest.approx(row["c"], rel=DIGITS) and facts["weight c"].endswith("pushed down")
    assert numbers(facts["‖G‖"]) == [pytest.approx(abs(row["c"]) * row["g_norm"], rel=DIGITS)]
    contexts, eta = by_context(run)
    forces = contexts.others[:, contexts.column[row["row"]]]
    strongest = page.locator("#inspector .ranking button").first
    assert numbers(strongest.locator(".value").inner_text()) == [
        pytest.approx(eta * float(forces[forces.abs().argmax()]), rel=DIGITS)
    ]
    strongest.click()  # and on to the token that it moved most
    assert details(page)[1] == table.place(table.observed[int(forces.abs().argmax())])


@pytest.mark.parametrize("net", [True, False])
def test_cells_of_the_map_are_entries_of_the_matrix_or_net_ones(visit, run, file, net):
    page, (contexts, eta) = visit(file), by_context(run)
    table, matrix = contexts.run, contexts.matrix * eta if net else run.matrix
    if not net:
        page.get_by_role("radio", name="token by token").click()
        page.get_by_role("radio", name="per unit lr").click()
    page.locator("#forces .map-frame").focus()
    walk = {"ArrowRight": (0, 0), "End": (0, -1), "ArrowDown": (1, -1), "ArrowLeft": (1, -2), "PageDown": (26, -2)}
    noise = 1e-6 * float(run.matrix.abs().max()) * (eta if net else 1)  # what cancels leaves rounding
    for key, cell in walk.items():  # the first shows the cursor
        page.keyboard.press(key)
        value = page.locator("#live").inner_text().rpartition(": ")[2]
        assert numbers(value) == [pytest.approx(float(matrix[cell]), rel=DIGITS, abs=noise)], cell
    page.keyboard.press("Enter")
    assert details(page)[1] == table.place(table.observed[26])
    page.get_by_role("radio", name="Sequence sums").click()
    page.locator("#forces .map-frame").focus()
    by = contexts.forces()["chosen 1"] if net else table.forces()["chosen 1"]
    for k, (name, total) in enumerate(by.items()):
        page.keyboard.press("ArrowRight")
        said = page.locator("#live").inner_text()
        assert said.startswith(f"chosen 1 from {name}: ")
        assert numbers(said.rpartition(": ")[2]) == [pytest.approx(total * (eta if net else 1), rel=DIGITS)], k


def test_a_matrix_too_large_for_a_page_still_answers_a_click(visit, run, tmp_path, monkeypatch):
    monkeypatch.setattr("tokdyn.report.page.MATRIX_CELLS", 10)
    run.to_html(tmp_path / "large.html")
    page, (contexts, eta) = visit(tmp_path / "large.html"), by_context(run)
    m = len(contexts.run.observed) // 2
    page.locator(f'#observed .token[data-i="{m}"]').click()
    ranking, others = page.locator("#inspector .ranking button"), contexts.others[m]
    order = others.abs().argsort(descending=True).tolist()[:6]
    own = [contexts.itself(m)] if contexts.own[m] >= 0 else []
    shown = [numbers(text)[0] for text in page.locator("#inspector .ranking .value").all_inner_texts()[: len(order) + len(own)]]
    noise = 1e-6 * eta * float(run.matrix[m].abs().sum())
    assert ranking.count() == len(shown)
    assert shown == pytest.approx([eta * x for x in [*own, *others[order].tolist()]], rel=DIGITS, abs=noise)
    page.locator('#updated .token[data-i="20"]').click()
    forces = contexts.others[:, contexts.column[20]]
    assert numbers(page.locator("#inspector .ranking .value").first.inner_text())[0] == pytest.approx(
        eta * float(forces[forces.abs().argmax()]), rel=DIGITS
    )


def test_both_ends_stay_selected_and_a_link_shows_the_same(visit, run, file):
    """Clicking an update token keeps the observed one; the address brings back selection, unit, view and map."""
    page, eta = visit(file), run.about["settings"]["eta"]
    page.get_by_role("radio", name="token by token").click()
    page.locator('#observed .token[data-i="8"]').click()
    page.locator('#updated .token[data-i="20"]').click()
    between = numbers(page.locator("#inspector .facts-list dd").first.inner_text())[0]
    assert between == pytest.approx(eta * float(run.matrix[8, 20]), rel=DIGITS)
    pressed = page.locator('.token[aria-pressed="true"]')
    assert [pressed.nth(i).get_attribute("data-i") for i in range(pressed.count())] == ["8", "20"]
    page.get_by_role("radio", name="per unit lr").click()
    page.locator("#forces select").first.select_option("1")
    page.get_by_role("button", name="Zoom in").click()
    seen = [page.locator(name).inner_text() for name in ("#selection", "#observed .legend", "#forces .legend")]
    other = visit(file, hash=page.evaluate("location.hash"))
    assert [other.locator(name).inner_text() for name in ("#selection", "#observed .legend", "#forces .legend")] == seen
    assert other.locator("#forces select").first.input_value() == "1" and other.evaluate("location.hash").count("zoom=1") == 1
    page.locator('#updated .token[data-i="20"]').click()  # again: it is let go, the observed one stays
    assert pressed.count() == 1 and details(page)[0].startswith("Observed")


def test_a_finding_shows_its_two_tokens(visit, run, file):
    """The pushed token of the chosen answer and the rejected one that pushes it are selected, by the sentence's own card."""
    page = visit(file)
    item = page.locator(".findings li", has_text="The rejected token that pushes a chosen one down most")
    item.locator("a.pair").click()
    card = run.explain("chosen", "rejected", down=True)
    assert page.evaluate("location.hash") == card.address
    assert page.locator("#inspector .why .sentence").inner_text() == card.sentence


def test_walking_through_tokens_says_their_values(visit, run, file):
    page, table = visit(file), BySequence.of(run.tokens, run.matrix)
    page.locator("#observed .token").first.focus()
    for m in (1, 2):
        page.keyboard.press("ArrowRight")
        said = page.locator("#live").inner_text()
        assert table.place(table.observed[m]) in said
        assert numbers(said.rpartition(": ")[2])[0] == pytest.approx(table.observed[m]["actual"], rel=DIGITS)


def test_what_is_taken_along_is_what_the_run_holds(visit, run, file, tmp_path):
    page = visit(file)
    page.get_by_role("radio", name="token by token").click()
    page.get_by_role("radio", name="per unit lr").click()
    saved = {}
    for section, kind in (("forces", "CSV"), ("answers", "CSV"), ("verify", "SVG"), ("verify", "PNG"), ("forces", "PNG")):
        with page.expect_download() as download:
            page.locator(f"#{section} .tools").get_by_role("button", name=kind).click()
        saved[section, kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(saved[section, kind])
    rows = list(csv.reader(saved["forces", "CSV"].read_text(encoding="utf-8").splitlines()))
    assert [[float(x) for x in row[1:]] for row in rows[1:]] == pytest.approx(run.matrix.numpy(), rel=1e-6)
    with saved["answers", "CSV"].open(encoding="utf-8", newline="") as text:
        tokens = [row for row in csv.DictReader(text) if row["side"] == "observed"]
    assert [float(row["actual"]) for row in tokens] == pytest.approx(
        [row["actual"] for row in run.tokens.to_pylist() if row["side"] == "observed"], rel=1e-5
    )
    svg = ElementTree.parse(saved["verify", "SVG"]).getroot()
    assert sum("dot" in (node.get("class") or "").split() for node in svg.iter()) == len(tokens)
    assert all(saved[of, "PNG"].read_bytes().startswith(b"\x89PNG") for of in ("verify", "forces"))


@pytest.mark.parametrize("option", [{"viewport": {"width": 400, "height": 800}}, {"forced_colors": "active"}, {"print": True}])
def test_narrow_forced_colours_and_print_keep_all_of_it(visit, run, file, option):
    """Nothing sticks out of a narrow page, and the colours of tokens survive the reader's own palette and paper."""
    paper = option.pop("print", False)
    page = visit(file, **option)
    if paper:
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert not page.locator(".topbar").is_visible() and not page.locator(".tools").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    colours = page.locator("#observed .token").evaluate_all("nodes => nodes.map(n => getComputedStyle(n).backgroundColor)")
    assert len(set(colours)) > len(colours) // 4


def test_axe_finds_no_serious_violation(visit, run, file, serious):
    page = visit(file, bypass_csp=True)
    page.locator("#observed .token").nth(8).click()
    assert serious(page) == []


def test_text_of_a_model_is_never_run(visit, run, tmp_path):
    nasty = '<img src=x onerror="alert(1)"></script><script>alert(2)</script>'
    tokens = run.tokens.set_column(run.tokens.column_names.index("token"), "token", pa.array([nasty] * len(run.tokens)))
    path = tmp_path / "nasty.html"
    replace(run, tokens=tokens).to_html(path)
    page = visit(path)
    page.locator("#observed .token").first.click()
    assert details(page)[0].startswith("Observed <img src=x") and page.locator("img").count() == 0


def test_the_page_of_a_training_draws_its_curves_and_forces(visit, tmp_path):
    model, chis = tiny("llama"), random_chis([(3, 6)], seed=1)
    other = chis[0].ids.clone()
    other[5] = (other[5] + 1) % 60
    chis.append(chis[0].with_(ids=other))  # alike up to the third token scored, in which they differ
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    probe = {"chosen": random_chis([(3, 5), (2, 4)], seed=5), "rejected": random_chis([(3, 3)], seed=6)}
    with td.Monitor(model, optimizer, probe=probe, out=tmp_path / "run", on_error="raise") as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            for chi in chis:
                model(chi.ids[None], labels=torch.where(chi.scored, chi.ids, -100)[None]).loss.backward()
            optimizer.step()
            monitor.step_end()
    forces = monitor.steps[0].forces
    page = visit(td.watch(tmp_path / "run"))
    lines = page.locator("#curves .actual path.line:not(.faint)")
    assert lines.count() == 2 and page.locator("#prediction .step-dot").count() == 6
    assert page.evaluate("document.documentElement.scrollWidth") <= 1400
    texts = page.locator("#tokens .told .token")
    said = [float(texts.nth(i).get_attribute("data-force")) for i in range(texts.count())]
    net = [*(forces[:3] + forces[6:9]).tolist(), *forces[3:6].tolist(), *forces[9:].tolist()]
    assert said == pytest.approx(net, rel=1e-5, abs=1e-6 * float(forces.abs().max()))  # six digits, of the data and of its sums
    start = path_of(lines.first)[0]
    page.get_by_label("change from the start").check()
    level = page.locator("#curves .actual line.identity")
    assert path_of(lines.first)[0][1] == pytest.approx(float(level.get_attribute("y1")), abs=0.01) != pytest.approx(start[1])
    page.get_by_role("radio", name="Strips").click()
    cells = page.locator("#tokens .token-map tbody td")
    assert cells.count() == len(net) == 9
    shown = [numbers(cells.nth(i).get_attribute("aria-label"))[0] for i in range(9)]
    assert shown == pytest.approx(net, rel=DIGITS)
    assert page.locator("#tokens h3").all_inner_texts() == ["response 1, response 2", "response 1", "response 2"]
    page.get_by_role("radio", name="token by token").click()
    assert cells.count() == len(forces) == 12
    shown = [numbers(cells.nth(i).get_attribute("aria-label"))[0] for i in range(12)]
    assert shown == pytest.approx(forces.tolist(), rel=DIGITS)
    cells.nth(4).hover()
    assert numbers(page.locator("#tip dd").first.inner_text())[0] == pytest.approx(float(forces[4]), rel=DIGITS)
    assert page.locator("#tokens h3").all_inner_texts() == ["response 1", "response 2"]
    page.get_by_label("rejected", exact=True).uncheck()
    assert lines.count() == 1 and page.locator("#prediction .step-dot").count() == 3


def test_a_served_folder_lists_its_runs_and_a_click_opens_the_page(browser, run, tmp_path):
    """In the browser, over the loopback address; a page of another name for it sees nothing."""
    uvicorn = pytest.importorskip("uvicorn")
    from tokdyn.commands.serve import pages
    from tokdyn.report.server import application

    run.save(tmp_path / "one")
    server = uvicorn.Server(uvicorn.Config(application(tmp_path, pages()), host="127.0.0.1", port=0, log_level="error"))
    socket = server.config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        page = browser.new_page()
        port = socket.getsockname()[1]
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_role("link", name="one").click()
        page.locator('#observed .token[data-i="8"]').click()
        assert details(page)[0].startswith("Observed") and page.url.endswith("/run/one#m=8")
        refused = page.request.get(f"http://127.0.0.1:{port}/", headers={"Host": "evil.example"})
        assert refused.status == 421
        page.close()
    finally:
        server.should_exit = True
        thread.join()
