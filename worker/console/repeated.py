"""Looking again and again, in a thread of its own that nothing ends, and saying what could not be read."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from innerloop.errors import InnerloopError

_LOG = structlog.get_logger(__name__)
_Found = TypeVar("_Found")


class Tries:
    """Reads that may fail one by one: what cannot be read stays as it was, and leaves a sentence in `troubles`."""

    def __init__(self) -> None:
        self.troubles: list[str] = []
        self._logged: dict[str, str] = {}

    def begin(self) -> None:
        """Forget the troubles of the last look."""
        self.troubles = []

    def __call__(self, what: str, read: Callable[[], _Found], otherwise: _Found) -> _Found:
        try:
            return read()
        except InnerloopError as error:
            self._add(str(error))
        except Exception as error:  # noqa: BLE001 - one part must not take the others along
            if self._logged.get(what) != repr(error):  # once, not every second
                self._logged[what] = repr(error)
                _LOG.exception("not read", what=what)
            self._add(f"{what} cannot be read ({type(error).__name__}): the console's log says more.")
        return otherwise

    def _add(self, sentence: str) -> None:
        if sentence not in self.troubles:
            self.troubles.append(sentence)


class Repeated:
    """Calls `look` every `every_seconds` until `stop`; what it raises is logged, told by `trouble`, survived."""

    def __init__(self, name: str, look: Callable[[], object], every_seconds: float) -> None:
        self._name, self._look, self._every = name, look, every_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.turned_at = time.monotonic()
        """When `look` last came back, by the monotonic clock."""
        self.trouble = ""

    def start(self) -> None:
        self.turned_at = time.monotonic()
        self._thread.start()

    def stop(self) -> bool:
        """Whether it has ended: it may be waiting for an answer."""
        self._stopped.set()
        self._thread.join(10.0)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopped.is_set():
            began = time.monotonic()
            try:
                self._look()
                self.trouble = ""
            except Exception as error:  # noqa: BLE001 - a page that stands still while all seems well is worst
                _LOG.exception("a look failed", of=self._name)
                self.trouble = f"The console cannot look ({error!r}): its log says more."
            self.turned_at = time.monotonic()
            self._stopped.wait(max(0.0, self._every - (self.turned_at - began)))
