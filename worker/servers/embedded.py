"""What the embedded servers have in common: a folder, a process, and how it is killed and started again."""

import signal
from abc import ABC, abstractmethod
from pathlib import Path

from .watched_process import WatchedProcess


class EmbeddedServer(ABC):
    """One server with one data folder, and the same ports at every start; a temporary folder ends with its process."""

    def __init__(self, folder: Path, *, temporary: bool) -> None:
        self.folder = folder.absolute()
        self._temporary = temporary
        self._process: WatchedProcess | None = None

    @property
    def pid(self) -> int:
        """Of the server's first process; 0 when it is not running."""
        return self._process.pid if self.running and self._process else 0

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    @abstractmethod
    def start(self) -> None:
        """Start and wait until it answers; raises ServiceError or SettingsError. Returns at once when it runs."""

    @abstractmethod
    def stop(self) -> None:
        """Stop cleanly."""

    def kill(self) -> None:
        """SIGKILL, as a crash would; what it has started notices and leaves."""
        if self._process:
            self._process.end(signal.SIGKILL)
            self._process = None

    def restart(self) -> None:
        """Stop and start: same ports, same data."""
        self.stop()
        self.start()

    @property
    def _data(self) -> Path:
        return self.folder / "data"
