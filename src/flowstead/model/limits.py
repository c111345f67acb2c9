"""The bounds of a runtime. Over a bound the caller is refused at once; nothing is lost in silence."""

from __future__ import annotations

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds and grace periods of one runtime; sizes in bytes of encoded JSON, durations in seconds.

    Attributes:
        state_bytes: Largest `state_json`, task input or task result.
        state_warn_bytes: Above this a committed state is logged as large (its size, never its content).
        wait_bytes: Largest `wait_json`, key or schema of a wait, and `requester_origin`.
        json_depth: Deepest nesting of lists and objects in user JSON.
        mailbox: Most mutations waiting for one flow; one more is refused as `overloaded`.
        running_children: Most launched children of one flow running at once, where no limit is given.
        running_in_all: Most launched children of the runtime running at once; those that only wait for a
            nested flow do not count.
        active_children: Most children of one flow without an outcome.
        nested_depth: Most flows above a nested one.
        nested_flows: Most live flows under one outermost flow.
        threads: Most threads for children that are plain functions.
        processes: Most worker processes for children that run in one.
        interruptions: Most crashes a launched child is started again after; then it is `lost`.
        batch: Most flows written in one transaction.
        cancel_grace: How long a requested cancel may stay without an end before the runtime ends the flow.
        kill_after: How long a child that is stopped may take to end by itself; then its processes are killed.
        abandon_after: How long after that a child is given up: it ends as cancelled, whatever its code still does.
        park_seconds: How long a controller that waits stays in memory; then it leaves, and is entered again when
            it is woken.
        signal_lifetime: How long a signal that nobody waits for yet is kept.
        kept_signals: Most signals by key of one owner that are kept; those that have expired do not count.
        messages: Most messages of one flow that nobody has taken yet.
        deliveries: Most updates being sent at once.
        delivery_seconds: How long a notifier may take over one update.
        digest_items: Most items of one digest; more go out as several.
        digest_bytes: Most bytes of the items of one digest; more go out as several, a larger item by itself.
        stall_seconds: How long the event loop may be held up before it counts as a stall.
        shutdown_grace: How long closing waits for children to stop.
        idle_seconds: How long an idle flow stays in memory.
        idle_flows: Most flows that stay in memory; beyond it those idle longest go at once.
        watcher_events: Most undelivered events kept for one watcher; beyond it the watcher reads the history.
    """

    state_bytes: int = 1024 * 1024
    state_warn_bytes: int = 256 * 1024
    wait_bytes: int = 64 * 1024
    json_depth: int = 100
    mailbox: int = 1024
    running_children: int = 8
    running_in_all: int = 10_000
    active_children: int = 100_000
    nested_depth: int = 16
    nested_flows: int = 1_000
    threads: int = 40
    processes: int = 4
    interruptions: int = 16
    batch: int = 512
    cancel_grace: float = 60.0
    kill_after: float = 5.0
    abandon_after: float = 25.0
    park_seconds: float = 5.0
    signal_lifetime: float = 7 * 24 * 3600.0
    kept_signals: int = 10_000
    messages: int = 10_000
    deliveries: int = 16
    delivery_seconds: float = 30.0
    digest_items: int = 256
    digest_bytes: int = 1024 * 1024
    stall_seconds: float = 0.5
    shutdown_grace: float = 5.0
    idle_seconds: float = 5.0
    idle_flows: int = 12_288
    watcher_events: int = 1024

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise ValueError(f"Limits.{name} must be a positive number, not {value!r}.")
