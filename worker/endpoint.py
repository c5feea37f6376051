"""/metrics, /livez and /readyz of one process. Read-only: nothing here changes anything."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

import structlog
from prometheus_client import make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from innerloop.config import HttpSettings
from innerloop.errors import SettingsError

from .health import Health, Verdict

_LOG = structlog.get_logger(__name__)


class _Quiet(WSGIRequestHandler):
    """Probes come every few seconds: they are not worth a line each."""

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def listening(settings: HttpSettings, health: Health) -> Iterator[int]:
    """Watch the loop while the context lasts, answer on the port set, and give that port; 0 is no listener at all.

    Raises SettingsError when the port is taken or the host is not ours.
    """
    health.watch()  # with or without a listener: the stacks of a loop that is stuck are for the log
    try:
        with _answering(settings, health) if settings.port else nullcontext():
            yield settings.port
    finally:
        health.stop()


@contextmanager
def _answering(settings: HttpSettings, health: Health) -> Iterator[None]:
    try:
        server = make_server(settings.host, settings.port, _application(health), ThreadingWSGIServer, _Quiet)
    except OSError as error:
        raise SettingsError(
            f"{settings.host}:{settings.port} cannot be listened on ({error.strerror or error}): set http.port to a"
            " free port (several processes take it and those after it), or to 0 for none."
        ) from None
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    _LOG.info("listens", metrics=f"http://{settings.host}:{settings.port}/metrics")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def _application(health: Health) -> Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]:
    metrics = make_wsgi_app()

    def answer(environment: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        if environment["REQUEST_METHOD"] not in {"GET", "HEAD"}:
            start("405 Method Not Allowed", [_TEXT, ("Allow", "GET, HEAD")])
            return [b"Read only.\n"]
        path = environment.get("PATH_INFO", "")
        if path == "/metrics":
            found: Iterable[bytes] = metrics(environment, start)
            return found
        if path == "/livez":
            return _verdict(health.live, start)
        if path == "/readyz":
            return _verdict(health.ready, start)
        start("404 Not Found", [_TEXT])
        return [b"Here are /metrics, /livez and /readyz.\n"]

    return answer


_TEXT = ("Content-Type", "text/plain; charset=utf-8")


def _verdict(verdict: Verdict, start: StartResponse) -> list[bytes]:
    start("200 OK" if verdict.good else "503 Service Unavailable", [_TEXT])
    return [verdict.why.encode() + b"\n"]
