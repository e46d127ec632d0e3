"""Refuse every connection that leaves this machine.

tests/conftest.py calls `refuse_network` in the test process and puts this folder on PYTHONPATH, so that
Python imports the file at the start of every subprocess as well. Loopback and local sockets stay open:
torch.distributed needs them. Code that opens sockets without Python's socket module is not reached; the
offline switches in conftest.py cover that.
"""

import ipaddress
import socket


class NetworkRefused(RuntimeError):
    """Not an OSError, so that no library takes it for a bad connection and tries again."""


def is_local(host: object) -> bool:
    """Whether a host, as given to connect or getaddrinfo, is this machine."""
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def refuse(host: object) -> None:
    if not is_local(host):
        raise NetworkRefused(f"tests must not use the network, and this one tried to reach {host!r}")


class OfflineSocket(socket.socket):
    """socket.socket that checks where a connection or datagram goes."""

    def _check(self, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            refuse(address[0])

    def connect(self, address):
        self._check(address)
        return super().connect(address)

    def connect_ex(self, address):
        self._check(address)
        return super().connect_ex(address)

    def sendto(self, data, *flags_and_address):
        self._check(flags_and_address[-1])
        return super().sendto(data, *flags_and_address)


def refuse_network() -> None:
    """Replace socket.socket and socket.getaddrinfo in this process; a second call changes nothing."""
    if socket.socket.__name__ == OfflineSocket.__name__:
        return
    look_up = socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        refuse(host)
        return look_up(host, *args, **kwargs)

    socket.socket = OfflineSocket
    socket.getaddrinfo = getaddrinfo


if __name__ == "sitecustomize":
    refuse_network()
