"""Disk: the port every store answers to, and the stores shipped with flowstead."""
