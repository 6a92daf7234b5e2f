"""The forms of `tokdyn serve`: what is computed anew, and how far it is."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from ..runs.folder import kind_of
from . import recompute
from .served import POLICY, document, quoted, within

BACK = '<p><a href="/">all runs</a></p>'
FORMS = POLICY | {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'"}
LARGEST = 4_000_000  # bytes of a form


def form_routes(root: Path, jobs: recompute.Jobs) -> list[Any]:
    """Routes: /again/NAME shows the form of a run or a scan and takes it, /job says how far the process is."""
    from starlette.responses import HTMLResponse, RedirectResponse, Response
    from starlette.routing import Route

    def plain(text: str, status: int) -> Response:
        return HTMLResponse(document("That cannot be computed", f"<p>{escape(text)}</p>{BACK}"), status, headers=FORMS)

    def asked(request: Any) -> tuple[Path | None, str]:
        path = within(root, request.path_params["name"])
        kind = "" if path is None else kind_of(path)
        return (path, kind) if kind in ("profile", "scan") else (None, kind)

    def again(request: Any) -> Response:
        path, kind = asked(request)
        if path is None:
            return plain("there is no such run", 404)
        action = f"/again/{quoted(request.path_params['name'])}"
        try:
            form = recompute.form_of(path, action) if kind == "profile" else recompute.row_form(action)
        except ValueError as error:
            return plain(str(error), 400)
        return HTMLResponse(document(f"{path.name}, again", form + BACK), headers=FORMS)

    async def compute(request: Any) -> Response:
        path, kind = asked(request)
        if path is None:
            return plain("there is no such run", 404)
        try:
            form = _form(await _body(request))
            jobs.require_free()  # before anything is written
            jobs.start(*(recompute.prepare(path, form) if kind == "profile" else recompute.prepare_row(path, form)))
        except ValueError as error:
            return plain(str(error), 400)
        return RedirectResponse("/job", 303, headers=POLICY)

    def job(request: Any) -> Response:
        if jobs.process is None:
            return RedirectResponse("/", 303, headers=POLICY)
        if not jobs.running and jobs.process.returncode == 0:
            return RedirectResponse(f"/run/{quoted(jobs.place.relative_to(root).as_posix())}", 303, headers=POLICY)
        refresh = '<meta http-equiv="refresh" content="1">' if jobs.running else ""
        what = "is being computed" if jobs.running else "could not be computed"
        text = f"<p>{escape(jobs.place.name)} {what}.</p><pre>{escape(jobs.said())}</pre>{BACK}"
        return HTMLResponse(document("A profile", text, refresh), headers=FORMS)

    name = "/again/{name:path}"
    return [Route(name, again, methods=["GET"]), Route(name, compute, methods=["POST"]), Route("/job", job)]


async def _body(request: Any) -> bytes:
    """What a form sends.

    Raises:
        ValueError: it is no form, or too long.
    """
    if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        raise ValueError("this is not the form of this page")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST:
            raise ValueError(f"more than {LARGEST:,} bytes")
        parts.append(part)
    return b"".join(parts)


def _form(body: bytes) -> dict[str, str]:
    """The fields of a form by name.

    Raises:
        ValueError: they are not text.
    """
    from urllib.parse import parse_qsl

    pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, encoding="utf-8", errors="strict", max_num_fields=10_000)
    return dict(pairs)
