"""No test may depend on the network: sockets of the test process reach this machine only."""

import contextlib
import ipaddress
import socket
from collections.abc import Iterator


class NetworkAccessError(RuntimeError):
    """A test tried to reach another machine."""


def _is_local(family: int, address: object) -> bool:
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True  # Unix sockets and the like
    host = address[0]
    if host in ("", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback or host == socket.gethostbyname(socket.gethostname())
    except (ValueError, OSError):
        return False


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """Refuse connections to other machines while the block runs."""
    originals = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex")}

    def guarded(original):
        def connect(self: socket.socket, address: object) -> object:
            if not _is_local(self.family, address):
                raise NetworkAccessError(f"tests do not use the network, but something connects to {address}")
            return original(self, address)

        return connect

    for name, original in originals.items():
        setattr(socket.socket, name, guarded(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(socket.socket, name, original)
