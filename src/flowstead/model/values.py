"""The two plain types that every record is made of."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import msgspec

Json: TypeAlias = Any
"""Any value JSON can hold: str, int, finite float, bool, None, and lists and string-keyed dicts of these."""

Whole: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""A count or an instant in epoch milliseconds: what a database column can hold."""
