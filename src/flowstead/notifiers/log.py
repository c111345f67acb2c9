"""Updates as lines of the host's log."""

from __future__ import annotations

from flowstead.log import get_logger
from flowstead.model.update import Update

log = get_logger(__name__)


class LogNotifier:
    """Logs that there is something to tell, as `update.announced` at level INFO.

    A line says which flow, how it stands, and the update's key. It never says the text or the data: logs are read
    by others than the flow's owner. A host that does not listen to `flowstead.notifiers` sees nothing.
    """

    async def send(self, update: Update) -> None:
        """Log it. What the host's handlers make of it does not count, so this never fails.

        Cancelling cannot come in between: nothing is waited for.
        """
        log.info(
            "update.announced",
            kind=str(update.kind),
            flow_id=update.flow_id,
            flow_status=update.flow_status,
            idempotency_key=update.idempotency_key,
        )
