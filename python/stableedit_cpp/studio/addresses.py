"""Where the page is: on this machine alone, or on a network, and on which port."""

from __future__ import annotations

import socket

__all__ = ["is_loopback", "listening"]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PORTS = range(7860, 7880)  # that are tried where none is asked for


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host."""
    return host in _LOOPBACK


def listening(host: str, port: int | None) -> socket.socket:
    """A socket for the server; the first free port from 7860 on, if none is asked for.

    Raises:
        OSError: if there is none, saying where.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in _PORTS if port is None else [port]:
        try:
            return socket.create_server((host, number), family=family)
        except OSError as error:
            reason = error.strerror
    where = f"{host}, port {port}" if port is not None else f"{host}, ports {_PORTS[0]} to {_PORTS[-1]}"
    raise OSError(f"cannot listen on {where} ({reason}); choose another with --port")
