"""Ports for Ray, which binds them long after they were found free."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """One that no outgoing connection is given meanwhile, nor any of Ray's workers by itself."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) != 0:
                return port
