"""`tokdyn serve`: its pages are those of the runs, it answers this machine alone, and nothing outside its folder is read."""

import asyncio
import json
import os

import pytest

import tokdyn as td
from tokdyn.testing import random_chis, tiny

pytest.importorskip("starlette")
from tokdyn.commands.serve import pages  # noqa: E402
from tokdyn.report.server import application  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("served") / "runs"
    run = td.profile(tiny("llama"), random_chis([(3, 4)], seed=1), random_chis([(2, 5)], seed=2), td.objectives.SFT())
    run.save(root / "deep/a & b")
    run.save(root.parent / "outside")
    os.symlink(root.parent / "outside", root / "link")
    return root, run


def ask(app, path, host="127.0.0.1:8471", method="GET", headers=()):
    """Status, headers and body of one request, through the application itself."""
    path, _, query = path.partition("?")
    sent = []
    scope = {"type": "http", "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode(), "root_path": "",
             "query_string": query.encode(), "scheme": "http", "server": ("127.0.0.1", 8471), "client": ("127.0.0.1", 1),
             "headers": [(b"host", host.encode())] * (host != "") + list(headers)}  # fmt: skip

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

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
