"""For tests of code that uses flowstead.

- `explore` plays a flow with a crash at every step and under hundreds of seeds; `Simulation` plays one run in
  virtual time, also as the pytest fixture `flow_simulation`; `offline` puts stand-ins in the place of tasks;
  `Listener` hears what an owner would be told.
- `RecordingNotifier` is a channel that keeps what arrives, and fails, drops or doubles on request.
- `ManualClock` is a clock moved by hand, `FaultyStore` a store that fails on request, for a real event loop.
- The suite that a store of your own has to pass is in `flowstead.testing.conformance`; it is imported by that
  name only, because it needs pytest.
"""

from flowstead.testing.clock import ManualClock
from flowstead.testing.disk import CALM, STORMY, Disk, Faults, SimulatedStore
from flowstead.testing.explore import Exploration, ExplorationFailed, explore, replay
from flowstead.testing.faulty_store import FaultyStore
from flowstead.testing.listener import Listener
from flowstead.testing.loop import Deadlock, Livelock, SimulatedLoop
from flowstead.testing.notifier import RecordingNotifier
from flowstead.testing.process import SimulatedClock, SimulatedIds, SimulatedWorker
from flowstead.testing.schedule import Schedule
from flowstead.testing.simulation import Crashed, Simulation
from flowstead.testing.sqlite_files import SqliteFiles
from flowstead.testing.stand_ins import offline

__all__ = [
    "CALM",
    "STORMY",
    "Crashed",
    "Deadlock",
    "Disk",
    "Exploration",
    "ExplorationFailed",
    "Faults",
    "FaultyStore",
    "Listener",
    "Livelock",
    "ManualClock",
    "RecordingNotifier",
    "Schedule",
    "SimulatedClock",
    "SimulatedIds",
    "SimulatedLoop",
    "SimulatedStore",
    "SimulatedWorker",
    "Simulation",
    "SqliteFiles",
    "explore",
    "offline",
    "replay",
]
