"""`tokdyn serve`: its pages are those of the runs, it answers this machine alone, and nothing outside its folder is read."""

import asyncio
import json
import os
import time
from html.parser import HTMLParser
from urllib.parse import urlencode

import pytest

import tokdyn as td
from tokdyn.testing import random_chis, tiny

pytest.importorskip("starlette")
from tokdyn.commands.serve import pages  # noqa: E402
from tokdyn.report import recompute  # noqa: E402
from tokdyn.report.server import application  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("served") / "runs"
    run = td.profile(tiny("llama"), random_chis([(3, 4)], seed=1), random_chis([(2, 5)], seed=2), td.objectives.SFT())
    run.save(root / "deep/a & b")
    run.save(root.parent / "outside")
    os.symlink(root.parent / "outside", root / "link")
    return root, run


def ask(app, path, host="127.0.0.1:8471", method="GET", headers=(), body=b""):
    """Status, headers and body of one request, through the application itself."""
    path, _, query = path.partition("?")
    sent = []
    scope = {"type": "http", "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode(), "root_path": "",
             "query_string": query.encode(), "scheme": "http", "server": ("127.0.0.1", 8471), "client": ("127.0.0.1", 1),
             "headers": [(b"host", host.encode())] * (host != "") + list(headers)}  # fmt: skip

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}, body.decode()


def test_runs_are_listed_and_shown_as_their_pages_are(folder):
    root, run = folder
    app = application(root, pages())
    status, headers, listing = ask(app, "/")
    assert status == 200 and "/run/deep/a%20%26%20b" in listing and headers["x-frame-options"] == "DENY"
    status, _, page = ask(app, "/run/deep/a & b")
    assert status == 200 and page == td.load(root / "deep/a & b").to_html()
    status, _, rows = ask(app, "/rows/deep/a & b?m=1&to=3")
    assert json.loads(rows)["rows"] == pytest.approx(run.matrix[1:3].numpy()) and json.loads(rows)["shape"] == [5, 4]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8471", "127.0.0.1.evil.example", "", "localhost.", "0.0.0.0:8471"]
)
def test_other_hosts_are_refused(folder, host):
    assert ask(application(folder[0], pages()), "/", host=host)[0] == 421


def test_reading_requests_of_this_machine_alone(folder):
    app = application(folder[0], pages())
    assert [ask(app, "/", host=host)[0] for host in ("localhost:1", "127.0.0.1", "[::1]:8471", "[::1]")] == [200] * 4
    assert ask(app, "/", method="POST")[0] == 405
    assert ask(app, "/", headers=[(b"host", b"evil.example")])[0] == 421  # two hosts


@pytest.mark.parametrize("name", ["../outside", "link", "deep/../../outside", "/etc", "deep", "no\x00name", "..%2foutside"])
def test_nothing_outside_the_folder_is_read(folder, name):
    """Neither by dots nor by a link that leads out; a folder that is no run is none."""
    app = application(folder[0], pages())
    assert ask(app, f"/run/{name}")[0] == 404 and ask(app, f"/rows/{name}?m=0")[0] == 404


@pytest.mark.parametrize("query", ["m=5", "m=-1&to=2", "m=2&to=1", "m=x", "m=0&to=99"])
def test_rows_that_there_are_not_are_refused(folder, query):
    assert ask(application(folder[0], pages()), f"/rows/deep/a & b?{query}")[0] == 400


# ---------------------------------------------------------------- computed on request

ROWS = [
    {"prompt": "\n\nHuman: Where is the cat?", "chosen": "On the <b>mat</b>.\nYes.", "rejected": "In the sea & so on.", "n": 3},
    {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "\tHello"}], "rejected": ["x"]},
]


class Form(HTMLParser):
    """The fields of a form as a browser sends them: one newline behind <textarea> is none, lines end with both characters."""

    def __init__(self, html):
        super().__init__()
        self.fields, self.name, self.text = {}, None, ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "textarea":
            self.name, self.text = dict(attrs)["name"], ""

    def handle_data(self, data):
        self.text += data

    def handle_endtag(self, tag):
        if tag == "textarea":
            self.fields[self.name] = self.text.removeprefix("\n").replace("\n", "\r\n")


@pytest.fixture
def made(tmp_path):
    """A folder as `tokdyn profile` leaves it, and its data."""
    run = tmp_path / "runs/first"
    run.mkdir(parents=True)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [ROWS[0]] * 3))
    options = dict(model="demo", data=str(tmp_path / "data.jsonl"), objective="dpo", set=["beta=0.3"], rows=1, skip=1,
                   held_out=1, method="none", allow_pickle=True)  # fmt: skip
    (run / "run.yaml").write_text(json.dumps(options))
    (run / "run.json").write_text(json.dumps({"kind": "profile", "format": 1}))
    return run


def test_a_form_that_nothing_was_changed_in_gives_the_rows_back(made):
    fields = Form(recompute.form_of(made, "/again/first")).fields
    assert set(fields) == {f"{n}.{name}" for n in (0, 1) for name in ("prompt", "chosen", "rejected")}  # the two rows it used
    assert recompute.edited(ROWS[:1] * 2, fields) == ROWS[:1] * 2
    assert recompute.editable(ROWS[1]) == {"prompt.0.content": "Hi", "chosen.0.content": "\tHello"}
    new = recompute.edited(ROWS, {"1.chosen.0.content": "Hey", "0.chosen": "On\r\nthe mat."})
    assert new[1]["chosen"] == [{"role": "assistant", "content": "Hey"}] and new[0] == ROWS[0] | {"chosen": "On\nthe mat."}


def test_what_is_edited_lies_beside_the_run_and_pickles_stay_forbidden(made):
    words, place = recompute.prepare(made, {"0.chosen": "On the hat.", "objective": "DPO"})
    assert place == made.parent / "first-edit-1" and words[:2] == ["profile", "--config"] and words[3:] == ["--out", str(place)]
    options = json.loads(open(words[2]).read())
    assert options["set"] == ["beta=0.3"] and options["skip"] == 0 and options["allow_pickle"] is False
    rows = [json.loads(line) for line in open(options["data"])]
    assert rows == [ROWS[0] | {"chosen": "On the hat."}, ROWS[0]]
    words, _ = recompute.prepare(made, {"objective": "SFT"})
    assert "set" not in json.loads(open(words[2]).read())  # beta is no constant of SFT
    with pytest.raises(ValueError, match="unknown objective"):
        recompute.prepare(made, {"objective": "dpx; rm"})


def test_a_form_computes_a_run_and_leads_to_it(made):
    """Through the process: the new run is the profile of the edited row by the other loss."""
    jobs = recompute.Jobs()
    app = application(made.parent, pages(), jobs)
    own = [(b"origin", b"http://127.0.0.1:8471"), (b"content-type", b"application/x-www-form-urlencoded")]
    body = urlencode({"objective": "SFT", "0.chosen": "On the hat."}).encode()
    try:
        assert "/again/first" in ask(app, "/")[2] and "<textarea" in ask(app, "/again/first")[2]
        status, headers, _ = ask(app, "/again/first", method="POST", headers=own, body=body)
        assert status == 303 and headers["location"] == "/job"
        assert ask(app, "/again/first", method="POST", headers=own, body=body)[0] == 400  # one at a time
        while jobs.running:
            time.sleep(0.1)
        status, headers, page = ask(app, "/job")
        assert status == 303 and headers["location"] == "/run/first-edit-1", page
        run = td.load(made.parent / "first-edit-1")
        assert run.about["objective"]["name"] == "SFT"
        assert "hat" in "".join(run.tokens["token"].to_pylist()) and ask(app, headers["location"])[0] == 200
    finally:
        jobs.close()


@pytest.mark.parametrize(
    "headers, status",
    [
        ([], 403),
        ([(b"origin", b"http://evil.example")], 403),
        ([(b"origin", b"null")], 403),
        ([(b"origin", b"http://localhost:8471")], 403),  # another name of this machine is another site
        ([(b"origin", b"http://127.0.0.1:8471"), (b"content-type", b"text/plain")], 400),
    ],
)
def test_forms_of_other_sites_are_refused(made, headers, status):
    jobs = recompute.Jobs()
    app = application(made.parent, pages(), jobs)
    assert ask(app, "/again/first", method="POST", headers=headers, body=b"objective=SFT")[0] == status
    assert jobs.process is None and [path.name for path in made.parent.iterdir()] == ["first"]


def test_rows_of_a_scan_are_numbers(tmp_path):
    assert recompute.prepare_row(tmp_path, {"row": "7"}) == (
        ["profile", "--scan", str(tmp_path), "--row", "7"], tmp_path / "profiles/row-0000007"
    )  # fmt: skip
    for wrong in ("", "0", "-1", "7 --out x", "٧", "1" * 12):
        with pytest.raises(ValueError, match="row must be a number from 1"):
            recompute.prepare_row(tmp_path, {"row": wrong})
