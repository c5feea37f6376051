"""Apache Kafka's jars: pinned by a lock of ours, fetched once, checked before every use.

A lock, `kafka-<version>.lock`, has a line per jar: its SHA-256 and its Maven coordinate. With it nothing is resolved,
only fetched, from where jgo gets things by default.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from innerloop.errors import ServiceError, SettingsError

DEFAULT_VERSION = "4.3.0"
FETCH_THREADS = 8
FETCH_TIMEOUT = 30
"""Seconds without an answer from the repository."""
LOCK_FOLDER = Path(__file__).parent
INSTALL = 'run `pip install "innerloop[embedded]"`, or set INNERLOOP_KAFKA__BOOTSTRAP_SERVERS'


@dataclass(frozen=True)
class Jar:
    """One line of a lock."""

    sha256: str
    coordinate: str
    """group:artifact:version"""

    @property
    def filename(self) -> str:
        _, artifact, version = self.coordinate.split(":")
        return f"{artifact}-{version}.jar"

    def matches(self, path: Path) -> bool:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256


def chosen_version() -> str:
    """Kafka's version: INNERLOOP_KAFKA_VERSION, of which 3.9 is enough, or the one this release was tested with."""
    asked = os.environ.get("INNERLOOP_KAFKA_VERSION", DEFAULT_VERSION)
    return next((version for version in locked_versions() if f"{version}.".startswith(f"{asked}.")), asked)


def locked_versions() -> list[str]:
    """The versions that there is a lock for."""
    return sorted(path.name.removeprefix("kafka-").removesuffix(".lock") for path in LOCK_FOLDER.glob("kafka-*.lock"))


def read_lock(version: str) -> list[Jar]:
    """The jars of a Kafka version; raises SettingsError when there is no lock for it."""
    if version not in locked_versions():
        raise SettingsError(
            f"INNERLOOP_KAFKA_VERSION is {version!r}, but there are locks for {', '.join(locked_versions())} only: "
            "choose one of these, or make a lock with `python -m innerloop.worker.servers.kafka lock <version>`."
        )
    lock = (LOCK_FOLDER / f"kafka-{version}.lock").read_text()
    lines = [line.split() for line in lock.splitlines() if line and not line.startswith("#")]
    return [Jar(sha256, coordinate) for sha256, coordinate in lines]


def cache_folder(version: str) -> Path:
    """Where this user's jars of a Kafka version are kept; raises SettingsError when platformdirs is missing."""
    try:
        from platformdirs import user_cache_path  # noqa: PLC0415 - an optional part
    except ImportError:
        raise SettingsError(f"Apache Kafka is not installed: {INSTALL}.") from None
    return user_cache_path("innerloop", appauthor=False) / f"kafka-{version}"


def provide_jars(version: str, announce: Callable[[str], None]) -> list[Path]:
    """The checked jars of a Kafka version in the lock's order, fetched first where they are missing.

    Raises SettingsError when one is not what the lock says, ServiceError when it cannot be fetched.
    """
    jars = read_lock(version)
    folder = cache_folder(version) / "jars"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [jar for jar in jars if not (folder / jar.filename).exists()]
    if missing:
        _fetch(missing, folder, version, announce)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda jar: _require_match(jar, folder / jar.filename), jars))
    return [folder / jar.filename for jar in jars]


def _require_match(jar: Jar, path: Path) -> None:
    if not jar.matches(path):
        raise SettingsError(
            f"{path} is not the {jar.coordinate} that Innerloop's lock names (its SHA-256 differs) and is not used: "
            "delete it and start again to fetch it anew."
        )


def _fetch(jars: list[Jar], folder: Path, version: str, announce: Callable[[str], None]) -> None:
    """Fetch into a folder beside, check, and only then move: a fetch that is cut off leaves nothing behind."""
    with (
        tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetch-") as staging,
        _progress(f"Fetching Apache Kafka {version}", len(jars), announce) as step,
        ThreadPoolExecutor(FETCH_THREADS) as pool,
    ):
        context = maven(Path(staging))
        futures = {pool.submit(fetch_jar, context, jar.coordinate): jar for jar in jars}
        try:
            for future in as_completed(futures):
                jar, path = futures[future], future.result()
                _require_match(jar, path)
                path.replace(folder / jar.filename)
                step()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def maven(cache: Path) -> Any:
    """A jgo context that keeps what it fetches in `cache`; raises SettingsError when jgo is not installed."""
    try:
        from jgo.maven import MavenContext  # noqa: PLC0415 - an optional part
    except ImportError:
        raise SettingsError(f"Apache Kafka is not here yet and jgo, which fetches it, is missing: {INSTALL}.") from None
    return MavenContext(repo_cache=cache, timeout=FETCH_TIMEOUT)


def fetch_jar(context: Any, coordinate: str) -> Path:
    """Fetch one jar, its dependencies not; raises ServiceError."""
    group, artifact, version = coordinate.split(":")
    try:
        return Path(context.project(group, artifact).at_version(version).artifact().resolve())
    except (RuntimeError, OSError) as error:  # requests' errors are OSErrors
        raise ServiceError(
            f"{coordinate} could not be fetched ({type(error).__name__}): check the network and start again, "
            "or set INNERLOOP_KAFKA__BOOTSTRAP_SERVERS to a broker you have."
        ) from error


@contextmanager
def _progress(title: str, total: int, announce: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, two lines elsewhere; yields what to call after each jar."""
    if not sys.stderr.isatty():
        announce(f"{title}: {total} jars, once.")
        yield lambda: None
        announce(f"{title}: done.")
        return
    from rich.console import Console  # noqa: PLC0415 - only a terminal needs it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def resolve(version: str) -> Iterable[Jar]:
    """The jars that Kafka's own description asks for now, plus the backend that its logging needs."""
    with tempfile.TemporaryDirectory() as cache:
        context = maven(Path(cache))
        root = context.create_dependency(f"org.apache.kafka:kafka_2.13:{version}")
        inputs, transitive = context.resolver.resolve([root])
        coordinates = [f"{d.groupId}:{d.artifactId}:{d.version}" for d in (*inputs, *transitive)]
        # By hand: resolved together with Kafka, the backend's own constraints would take kafka-clients back to 3.9.
        coordinates.append(_logging_backend(coordinates))
        with ThreadPoolExecutor(FETCH_THREADS) as pool:
            paths = list(pool.map(lambda coordinate: fetch_jar(context, coordinate), coordinates))
        for coordinate, path in zip(coordinates, paths, strict=True):
            yield Jar(hashlib.sha256(path.read_bytes()).hexdigest(), coordinate)


def _logging_backend(coordinates: list[str]) -> str:
    versions = {c.rsplit(":", 1)[0]: c.rsplit(":", 1)[1] for c in coordinates}
    core = versions.get("org.apache.logging.log4j:log4j-core")
    if core:
        return f"org.apache.logging.log4j:log4j-slf4j-impl:{core}"
    return f"org.slf4j:slf4j-simple:{versions['org.slf4j:slf4j-api']}"  # before Kafka 4


def write_lock(version: str) -> Path:
    """Make `kafka-<version>.lock` from a fresh resolution; a person looks at the change before it is kept."""
    path = LOCK_FOLDER / f"kafka-{version}.lock"
    jars = sorted(resolve(version), key=lambda jar: jar.coordinate)
    lines = [f"# Apache Kafka {version}; made by `python -m innerloop.worker.servers.kafka lock {version}`"]
    path.write_text("\n".join([*lines, *(f"{jar.sha256}  {jar.coordinate}" for jar in jars)]) + "\n")
    return path
