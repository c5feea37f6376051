"""Why a server's certificate is not accepted: libpq and librdkafka say only that it is not."""

import socket
import ssl
from pathlib import Path

POSTGRES_GREETING = (8).to_bytes(4, "big") + (80_877_103).to_bytes(4, "big")
"""Asks for TLS; see "SSLRequest" in https://www.postgresql.org/docs/current/protocol-message-formats.html."""

UNKNOWN = "it could not be verified"
_SECONDS = 2.0
_EXPIRED, _NOT_YET = 10, 9
_OTHER_NAME = frozenset({62, 64})
_UNKNOWN_AUTHORITY = frozenset({2, 18, 19, 20, 21})
"""X509_V_ERR_ numbers of OpenSSL: https://docs.openssl.org/master/man3/X509_STORE_CTX_get_error/."""


def why_refused(host: str, port: int, authorities: Path | None = None, greeting: bytes = b"") -> str:
    """What is wrong with the certificate that this server shows, as the end of a sentence.

    `authorities` is a file or directory of trusted certificates (PEM), None for the machine's own; `greeting` is sent
    before TLS begins. Takes a few seconds at most.
    """
    try:
        context = _trusting(authorities)
        with socket.create_connection((host, port), _SECONDS) as connection:
            if greeting:
                connection.sendall(greeting)
                connection.recv(1)
            context.wrap_socket(connection, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        return _said(error, host)
    except (OSError, ValueError):
        pass
    return UNKNOWN


def _trusting(authorities: Path | None) -> ssl.SSLContext:
    if authorities is None:
        return ssl.create_default_context()
    if authorities.is_dir():
        return ssl.create_default_context(capath=authorities)
    return ssl.create_default_context(cafile=authorities)


def _said(error: ssl.SSLCertVerificationError, host: str) -> str:
    if error.verify_code == _EXPIRED:
        return "it has expired"
    if error.verify_code == _NOT_YET:
        return "it is not valid yet, or this machine's clock is wrong"
    if error.verify_code in _OTHER_NAME:
        return f"it is not for {host}"
    if error.verify_code in _UNKNOWN_AUTHORITY:
        return "it is not signed by an authority that is trusted here"
    return error.verify_message
