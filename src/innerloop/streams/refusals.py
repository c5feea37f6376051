"""What is said when a broker shuts a client out, or is not the one it should be."""

import logging
import re
import time
from pathlib import Path

from confluent_kafka import KafkaError

from innerloop import certificates
from innerloop.config import KafkaSettings

REFUSALS = frozenset({KafkaError._AUTHENTICATION, KafkaError._SSL})  # noqa: SLF001 - librdkafka's own names
"""Codes that say that trying again helps nobody before somebody has changed a setting."""

_LOG = logging.getLogger(__name__)
_TELL_SECONDS = 30.0
_ADDRESS = re.compile(r"://\[?([^/\s]+?)\]?:(\d+)/")


class Refusals:
    """Hears from librdkafka that brokers shut a client out, and logs why, at most twice a minute.

    librdkafka itself only tries again, which is right while somebody changes a password, and wrong in silence.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._told_at = float("-inf")

    def __call__(self, error: KafkaError) -> None:
        if error.code() not in REFUSALS or time.monotonic() - self._told_at < _TELL_SECONDS:
            return
        self._told_at = time.monotonic()
        _LOG.error(sentence(self._settings, error))


def sentence(settings: KafkaSettings, error: KafkaError) -> str:
    """One sentence: who shuts us out, why, and which setting is about it."""
    where, known = settings.bootstrap_servers, settings.properties
    if error.code() == KafkaError._AUTHENTICATION:  # noqa: SLF001
        user = known["sasl.username"].get_secret_value() if "sasl.username" in known else "this client"
        why = error.str().partition("SASL authentication error: ")[2].partition(" (after ")[0] or error.str()
        return (
            f"Kafka at {where} does not let {user} in ({why}): "
            "correct sasl.username, sasl.password and sasl.mechanism in kafka.properties."
        )
    if "certificate verify failed" not in error.str():
        why = error.str().partition("SSL handshake failed: ")[2].partition(" (after ")[0] or error.str()
        return f"Kafka at {where} and this client do not agree on TLS ({why}): correct ssl.* in kafka.properties."
    at = _ADDRESS.search(error.str())
    authorities = Path(known["ssl.ca.location"].get_secret_value()) if "ssl.ca.location" in known else None
    why = certificates.why_refused(at[1], int(at[2]), authorities) if at else certificates.UNKNOWN
    return (
        f"The certificate of Kafka at {where} is not accepted, {why}: "
        "renew it, or correct ssl.ca.location in kafka.properties."
    )
