"""What `kafka.properties`, which are librdkafka's, mean to aiokafka, which Faust speaks Kafka with."""

import ssl
from collections.abc import Mapping

import faust
from faust.types.auth import CredentialsT

from innerloop.config import KafkaSettings
from innerloop.errors import SettingsError

_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_KNOWN = {
    "security.protocol",
    "sasl.mechanism",
    "sasl.mechanisms",
    "sasl.username",
    "sasl.password",
    "ssl.ca.location",
    "ssl.certificate.location",
    "ssl.key.location",
    "ssl.key.password",
    "ssl.endpoint.identification.algorithm",
    "enable.ssl.certificate.verification",
}


def credentials(settings: KafkaSettings) -> CredentialsT | None:
    """Of the properties those that concern security, for Faust; None for a broker that asks for nothing.

    Raises SettingsError for one that has no equal there: to leave it out would be less secure than what was asked for.
    """
    given = {name: value.get_secret_value() for name, value in settings.properties.items()}
    strange = sorted(name for name in given if name.startswith(("ssl.", "sasl.", "security.", "enable.s")))
    if strange := [name for name in strange if name not in _KNOWN]:
        raise SettingsError(
            f"innerloop quality cannot use kafka.properties {', '.join(strange)}: give its process an innerloop.toml of"
            f" its own with no others than {', '.join(sorted(_KNOWN))}."
        )
    protocol = given.get("security.protocol", "PLAINTEXT").upper()
    mechanism = given.get("sasl.mechanism", given.get("sasl.mechanisms", "GSSAPI")).upper()
    if protocol not in _PROTOCOLS or (protocol.startswith("SASL") and mechanism not in _MECHANISMS):
        raise SettingsError(
            f"innerloop quality cannot log in with security.protocol={protocol} and sasl.mechanism={mechanism}: it"
            f" knows {', '.join(_PROTOCOLS)} with {', '.join(_MECHANISMS)}."
        )
    context = _context(given) if protocol.endswith("SSL") else None
    if protocol.startswith("SASL"):
        found: CredentialsT = faust.SASLCredentials(
            username=given.get("sasl.username"),
            password=given.get("sasl.password"),
            mechanism=mechanism,
            ssl_context=context,
        )
        return found
    return None if context is None else faust.SSLCredentials(context)


def _context(given: Mapping[str, str]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=given.get("ssl.ca.location"))
        if certificate := given.get("ssl.certificate.location"):
            context.load_cert_chain(certificate, given.get("ssl.key.location"), given.get("ssl.key.password"))
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(
            f"The certificates in kafka.properties ssl.* cannot be read ({error}): correct them."
        ) from None
    if given.get("ssl.endpoint.identification.algorithm", "https").lower() == "none":
        context.check_hostname = False
    if given.get("enable.ssl.certificate.verification", "true").lower() == "false":
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
