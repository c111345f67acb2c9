"""Logging as a library should: through stdlib loggers, silent until the host listens, never configured here.

Event names are facts in the past tense; what they are about goes into keywords. State, waits, inputs and
results never do.
"""

from __future__ import annotations

import logging
from typing import Any

import structlog

# Without this, warnings of a library whose host configures nothing would end up on stderr.
logging.getLogger("flowstead").addHandler(logging.NullHandler())


class _Logger(structlog.stdlib.BoundLogger):
    """Tells the host. What the host's handlers make of it, raising included, must not stop whoever tells."""

    def _proxy_to_logger(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._proxy_to_logger(*args, **kwargs)
        except Exception:
            return None


def get_logger(name: str) -> Any:
    """A structlog logger over the stdlib logger of that name."""
    return structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.render_to_log_kwargs,
        ],
        wrapper_class=_Logger,
    )
