"""Structured logs to standard error: for people on a terminal, JSON lines otherwise.

Tracebacks come without the values of local variables: passwords are among them, and users' data.
"""

import logging
import sys

import structlog

from innerloop.config import Settings


def configure_logs(settings: Settings, **bound: object) -> None:
    """Set up logging of this process; `bound` goes with every line."""
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    )
    final: list[structlog.typing.Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if as_json:
        without_locals = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        final.append(structlog.processors.ExceptionRenderer(without_locals))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[*final, renderer]))
    logging.basicConfig(handlers=[handler], level=settings.log_level.upper(), force=True)
    for chatty in ("alembic", "sqlalchemy", "jgo", "faiss"):  # faiss tells of every build of it that isn't there
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Its warnings are of retries that it makes by itself, one at every start.
    logging.getLogger("librdkafka").setLevel(logging.ERROR)
    logging.getLogger("librdkafka").addFilter(_is_no_refusal)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(**bound)


def _is_no_refusal(record: logging.LogRecord) -> bool:
    """A refused login is tried again many times a second; streams/clients.py tells of it in a sentence."""
    text = record.getMessage()
    return not (text.startswith("FAIL ") and ("SASL authentication error" in text or "SSL handshake failed" in text))
