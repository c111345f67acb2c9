"""Which addresses a webhook may connect to.

A name is no address: what it stands for may be the sender's own network, and may change between two looks. So
the name is looked up once, every address it stands for is judged here, and only a judged one is connected to.
"""

from __future__ import annotations

from enum import Enum, auto
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address

_PRIVATE: Final = [
    ip_network(block)
    for block in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
]
_TRANSLATED: Final = IPv6Network("64:ff9b::/96")


class Reach(Enum):
    """How far a webhook may go.

    Link-local addresses are in none of them: the keys of a cloud machine are kept at one, and no receiver is.
    """

    LOOPBACK = auto()
    PUBLIC = auto()
    PRIVATE_TOO = auto()


def reach_of(host: str, *, allow_private: bool) -> Reach:
    """How far a webhook to this host may go. Who names the loopback in so many words means it."""
    name = host.rstrip(".")
    address = address_of(name)
    if name == "localhost" or name.endswith(".localhost"):
        return Reach.LOOPBACK
    if address is not None and _real(address).is_loopback:
        return Reach.LOOPBACK
    return Reach.PRIVATE_TOO if allow_private else Reach.PUBLIC


def may_reach(address: str, reach: Reach) -> bool:
    """Whether a webhook of that reach may connect to the address. What is not an address is refused."""
    parsed = address_of(address)
    if parsed is None:
        return False
    real = _real(parsed)
    if reach is Reach.LOOPBACK:
        return real.is_loopback
    target = _carried(real)
    if reach is Reach.PRIVATE_TOO and (target.is_loopback or _is_private(target)):
        return True
    return _is_public(target)


def address_of(text: str) -> Address | None:
    """The address a text spells; None if it is a name, or an address of one network card only."""
    try:
        return ip_address(text) if "%" not in text else None
    except ValueError:
        return None


def _real(address: Address) -> Address:
    """An IPv4 address that is dressed as an IPv6 one, undressed."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _carried(address: Address) -> Address:
    """Where packets end up that go to an address which stands for an IPv4 one behind a gateway."""
    if not isinstance(address, IPv6Address):
        return address
    if address in _TRANSLATED:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.sixtofour or address


def _is_private(address: Address) -> bool:
    return any(address in block for block in _PRIVATE)


def _is_public(address: Address) -> bool:
    return address.is_global and not (
        address.is_multicast or address.is_reserved or getattr(address, "is_site_local", False)
    )
