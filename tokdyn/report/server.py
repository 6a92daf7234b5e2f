"""`tokdyn serve`: the runs of a folder in a browser of this machine, and of no other.

Pages are written when they are asked for, and again when a run's files have changed: a training that is being written is
followed. Of a run too large for one page, rows of the matrix are read in pieces. Where that is allowed, a profile is computed
on request: a run with other words or another loss, one row of a scan (recompute.py). Nothing else is written to the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from ..runs.folder import ABOUT, FORCES, kind_of
from .recompute import Jobs
from .served import POLICY, document, quoted, within
from .server_forms import form_routes

HOSTS = ("127.0.0.1", "localhost", "[::1]")  # a page elsewhere that resolves its own name to this machine is refused
KINDS = {"profile": "one update", "training": "a training", "scan": "a scan"}
PageOf = Callable[[Path], str]


def application(folder: Path, pages: dict[str, PageOf], jobs: Jobs | None = None) -> Any:
    """The Starlette application that shows the runs below a folder.

    Args:
        folder: what is shown; nothing outside it is ever read.
        pages: kind of a run -> the function that makes its page out of its folder.
        jobs: what computes profiles on request; None allows none, and nothing is written.

    Routes: / lists the runs, /run/NAME is a run's page, /rows/NAME?m=0&to=10 rows of its matrix as JSON; with `jobs`,
    /again/NAME is the form of what is computed anew, and /job what that says.

    Raises:
        ImportError: Starlette is not installed (`pip install "tokdyn[serve]"`).
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    root = folder.resolve()

    @lru_cache(maxsize=8)
    def page(path: Path, kind: str, stamp: float) -> str:
        return pages[kind](path)

    def listing(request: Any) -> Response:
        return HTMLResponse(_listing(root, runs(root), jobs is not None), headers=POLICY)

    def run(request: Any) -> Response:
        path = within(root, request.path_params["name"])
        kind = "" if path is None else kind_of(path)
        if path is None or kind not in pages:
            return Response("there is no such run", 404, headers=POLICY, media_type="text/plain")
        return HTMLResponse(page(path, kind, changed(path)), headers=POLICY)

    def rows(request: Any) -> Response:
        path = within(root, request.path_params["name"])
        if path is None or not (path / FORCES).exists():
            return Response("there is no such run", 404, headers=POLICY, media_type="text/plain")
        try:
            m, to = (int(request.query_params.get(name, "0")) for name in ("m", "to"))
            found = matrix_rows(path, m, to or m + 1)
        except ValueError as error:
            return Response(str(error), 400, headers=POLICY, media_type="text/plain")
        return JSONResponse(found, headers=POLICY)

    routes = [Route("/", listing), Route("/run/{name:path}", run), Route("/rows/{name:path}", rows)]
    if jobs is not None:
        routes += form_routes(root, jobs)
    return Starlette(routes=routes, middleware=[Middleware(LoopbackOnly, writes=jobs is not None)])


class LoopbackOnly:
    """Refuses every request whose Host is not this machine: another site cannot read the runs through a rebound name."""

    def __init__(self, app: Any, writes: bool = False) -> None:
        self.app, self.writes = app, writes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer 421 to other hosts, 405 to what is no reading request, and 403 to a form that is not of these pages."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refused = self._refused(scope)
        if not refused:
            return await self.app(scope, receive, send)
        await send({"type": "http.response.start", "status": refused, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"tokdyn serve answers this machine alone"})

    def _refused(self, scope: Any) -> int:
        """The status that refuses a request, 0 for one that is answered."""
        sent = [(name, value.decode("latin-1").lower()) for name, value in scope["headers"]]
        hosts, origins = ([value for name, value in sent if name == which] for which in (b"host", b"origin"))
        host = hosts[0].rsplit(":", 1)[0] if hosts and not hosts[0].endswith("]") else (hosts or [""])[0]
        if len(hosts) != 1 or host not in HOSTS:
            return 421
        if scope["method"] in ("GET", "HEAD"):
            return 0
        if scope["method"] != "POST" or not self.writes:
            return 405
        return 0 if origins == [f"http://{hosts[0]}"] else 403  # a browser names the page that sends a form


def runs(root: Path) -> list[Path]:
    """The runs below a folder, newest first, three levels deep."""
    found = [path.parent for depth in ("", "*/", "*/*/", "*/*/*/") for path in root.glob(f"{depth}{ABOUT}")]
    return sorted((path for path in found if kind_of(path) in KINDS), key=lambda path: -changed(path))


def changed(path: Path) -> float:
    """When a file of a run last changed, seconds since 1970."""
    return max((entry.stat().st_mtime for entry in path.iterdir() if entry.is_file()), default=0.0)


def matrix_rows(path: Path, m: int, to: int) -> dict[str, Any]:
    """Rows m to `to` of a run's matrix, read without the rest of it: nats per unit learning rate, null where not computed.

    Raises:
        ValueError: there is no matrix, or no such rows.
    """
    from safetensors import safe_open

    with safe_open(path / FORCES, "pt") as tensors:
        if "matrix" not in tensors.keys():  # noqa: SIM118 (no mapping)
            raise ValueError("this run has no matrix")
        part = tensors.get_slice("matrix")
        M, L = part.get_shape()
        if not 0 <= m < to <= M:
            raise ValueError(f"rows must lie in [0, {M}), got {m} to {to}")
        values = part[m:to]
    return {"shape": [M, L], "m": m, "rows": [[x if x == x else None for x in row] for row in values.tolist()]}


def _listing(root: Path, found: list[Path], anew: bool) -> str:
    rows = []
    for path in found:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        name = "." if path == root else path.relative_to(root).as_posix()
        model, loss = ((about.get(key) or {}).get("name", "") for key in ("model", "objective"))
        when = str(about.get("written") or about.get("created") or "").replace("T", " ")[:16]
        cells = [KINDS[about["kind"]], model, loss, about.get("status", ""), when]
        link = f'<a href="/run/{escape(quoted(name))}">{escape(name)}</a>'
        texts = [escape(str(cell)) for cell in cells]
        if anew:
            what = {"profile": "other words, another loss", "scan": "a row of it"}.get(about["kind"])
            texts.append(f'<a href="/again/{escape(quoted(name))}">{what}</a>' if what else "")
        rows.append(f"<tr><th scope=row>{link}</th>" + "".join(f"<td>{text}</td>" for text in texts) + "</tr>")
    names = ("run", "kind", "model", "loss", "status", "written", *(("profile anew",) if anew else ()))
    head = "".join(f"<th>{name}</th>" for name in names)
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>" if rows else "<p>No run yet.</p>"
    return document(f"Runs in {root}", body, '<meta http-equiv="refresh" content="30">')
