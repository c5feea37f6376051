"""`innerloop console`: one live page over the whole loop, and the lag of both groups for Prometheus."""

import socket

import structlog
from fastapi.responses import PlainTextResponse
from nicegui import app, ui
from prometheus_client import make_asgi_app

from innerloop.config import Settings
from innerloop.errors import SettingsError
from innerloop.store.database import connect, require_tables
from innerloop.streams.clients import require_broker
from innerloop.worker.health import Verdict
from innerloop.worker.processes import stop_on_signals

from .lookup import Person, look_up
from .names import Names
from .observer import Observer
from .page import Page
from .stored import STATEMENT_SECONDS

_LOG = structlog.get_logger(__name__)


def run_console(settings: Settings) -> None:
    """Serve the page until SIGTERM or Ctrl-C. Raises ServiceError and SettingsError."""
    engine = connect(settings.database, statement_seconds=STATEMENT_SECONDS)
    require_tables(engine)
    require_broker(settings.kafka)
    where = settings.console
    _require_free(where.host, where.port)
    observer, names = Observer(settings), Names(settings)

    def find(user_id: str) -> Person:
        return look_up(settings, engine, names, user_id)

    @ui.page("/")
    def page() -> None:
        Page(settings, observer, find).show()

    # Not in a thread of the pool, which may be busy with viewers.
    async def live() -> PlainTextResponse:
        return _answer(observer.alive)

    async def ready() -> PlainTextResponse:
        return _answer(observer.ready)

    app.mount("/metrics", make_asgi_app(disable_compression=True))
    app.add_api_route("/livez", live)
    app.add_api_route("/readyz", ready)
    for part in (observer, names):
        app.on_startup(part.start)
        app.on_shutdown(part.stop)
    stop_on_signals()  # the server stops by itself on both, and raises them again for whoever was there before
    _LOG.info("console", page=f"http://{where.host}:{where.port}/")
    ui.run(
        host=where.host,
        port=where.port,
        title="Innerloop",
        dark=None,
        reload=False,
        show=False,
        show_welcome_message=False,
        endpoint_documentation="none",
    )


def _require_free(host: str, port: int) -> None:
    """Raise SettingsError when nobody could listen there: the server would say so in words of its own, too late."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise SettingsError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}): stop what does, or give another --port."
        ) from None


def _answer(verdict: Verdict) -> PlainTextResponse:
    return PlainTextResponse(verdict.why + "\n", 200 if verdict.good else 503)
