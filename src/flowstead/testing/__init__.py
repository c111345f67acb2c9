"""For tests of code that uses flowstead: a clock you move by hand. Stores: use `:memory:` or a file."""

from flowstead.testing.clock import ManualClock

__all__ = ["ManualClock"]
