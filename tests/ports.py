"""Ports for process groups of tests, which are listened on only when their processes have started."""

import random
import socket


def free_port() -> int:
    """One that nothing listens on, and that no system hands out meanwhile to those that ask for any (below 32768)."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
