"""The pytest plugin: loaded wherever flowstead is installed, and doing nothing until its fixture is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from flowstead.testing.simulation import Simulation


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("flowstead").addoption(
        "--flow-schedule",
        default="seed=0",
        help='the schedule of the flow_simulation fixture, as a failed exploration shows it: "seed=3 crashes=57"',
    )


@pytest.fixture
def flow_simulation(request: pytest.FixtureRequest) -> Iterator[Simulation]:
    """A world of its own for one test: virtual time, a seeded order of steps, a store in memory."""
    from flowstead.testing.schedule import Schedule
    from flowstead.testing.simulation import Simulation

    try:
        schedule = Schedule.parse(request.config.getoption("--flow-schedule"))
    except ValueError as error:
        raise pytest.UsageError(f"--flow-schedule: {error}") from None
    with Simulation(schedule) as simulation:
        yield simulation
