"""`python -m tests.crash.worker`: the parent that is asked to fork processes, each running one scene."""

from __future__ import annotations

import logging

# Imported by anyio on first use, which would be in each process anew.
import anyio._backends._asyncio  # noqa: F401

from tests.crash import hosts, ladder, scenes, stands
from tests.crash.harness import serve
from tests.crash.load import load

SCENES = {"load": load, **scenes.SCENES, **hosts.SCENES, **ladder.SCENES, **stands.SCENES}

if __name__ == "__main__":
    logging.getLogger("flowstead").addHandler(logging.NullHandler())
    serve(SCENES)
