"""Type-checked, never run: what the checker must accept."""
