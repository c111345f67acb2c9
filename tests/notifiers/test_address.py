"""Where webhooks may go: the world, not our own network, unless that was said."""

from __future__ import annotations

import pytest

from flowstead.notifiers.address import Reach, may_reach, reach_of

WORLD = [
    "93.184.216.34",
    "8.8.8.8",
    "2606:2800:220:1:248:1893:25c8:1946",
    "64:ff9b::808:808",  # 8.8.8.8 as seen from a network without IPv4
    "::ffff:8.8.8.8",
    "2002:808:808::1",
]
LOOPBACK = ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"]
PRIVATE = [
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "100.64.0.1",
    "fc00::1",
    "fd12:3456::1",
    "::ffff:10.0.0.1",
    "64:ff9b::a00:1",
    "2002:a00:1::1",
]
NOWHERE = [
    "169.254.169.254",
    "fe80::1",
    "fe80::1%eth0",
    "::1%lo",
    "2606:2800:220:1:248:1893:25c8:1946%eth0",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
    "0.0.0.0",
    "0.1.2.3",
    "::",
    "224.0.0.1",
    "ff02::1",
    "ff0e::1",
    "240.0.0.1",
    "255.255.255.255",
    "192.0.2.1",
    "198.18.0.1",
    "2001:db8::1",
    "2001:0:7f00:1::1",
    "fec0::1",
    "::7f00:1",
    "example.com",
    "127.1",
    "2130706433",
    "127.0.0.1\0",
    "",
]


@pytest.mark.parametrize("address", WORLD)
def test_the_world_is_reached_without_more_ado(address: str) -> None:
    assert may_reach(address, Reach.PUBLIC)
    assert may_reach(address, Reach.PRIVATE_TOO)
    assert not may_reach(address, Reach.LOOPBACK)


@pytest.mark.parametrize("address", PRIVATE)
def test_a_private_address_is_reached_only_if_that_was_said(address: str) -> None:
    assert not may_reach(address, Reach.PUBLIC)
    assert not may_reach(address, Reach.LOOPBACK)
    assert may_reach(address, Reach.PRIVATE_TOO)


@pytest.mark.parametrize("address", LOOPBACK)
def test_the_loopback_is_reached_only_if_that_was_said(address: str) -> None:
    assert not may_reach(address, Reach.PUBLIC)
    assert may_reach(address, Reach.LOOPBACK)
    assert may_reach(address, Reach.PRIVATE_TOO)


@pytest.mark.parametrize("address", NOWHERE)
@pytest.mark.parametrize("reach", Reach)
def test_what_is_no_host_of_anybody_is_never_reached(address: str, reach: Reach) -> None:
    assert not may_reach(address, reach)


@pytest.mark.parametrize("host", ["localhost", "localhost.", "hooks.localhost", *LOOPBACK])
@pytest.mark.parametrize("allow_private", [False, True])
def test_who_names_the_loopback_stays_on_it(host: str, allow_private: bool) -> None:
    assert reach_of(host, allow_private=allow_private) is Reach.LOOPBACK


@pytest.mark.parametrize("host", ["example.com", "notlocalhost", "localhost.example", "10.0.0.1"])
def test_any_other_name_reaches_as_far_as_it_was_allowed_to(host: str) -> None:
    assert reach_of(host, allow_private=False) is Reach.PUBLIC
    assert reach_of(host, allow_private=True) is Reach.PRIVATE_TOO
