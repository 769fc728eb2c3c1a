"""The guard of tests/conftest.py: tests reach this machine and no other."""

import socket

import pytest
from loopback_only import NetworkAccessError


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.com", 443)])
def test_other_machines_are_refused(address):
    with socket.socket() as client, pytest.raises(NetworkAccessError, match="do not use the network"):
        client.connect(address)


def test_other_machines_are_refused_over_ipv6():
    with socket.socket(socket.AF_INET6) as client, pytest.raises(NetworkAccessError):
        client.connect_ex(("2001:db8::1", 80))


def test_this_machine_is_reached():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        connection, _ = server.accept()
        with connection:
            client.sendall(b"hello")
            assert connection.recv(5) == b"hello"
