#!/usr/bin/env python3
"""Ask the vlmchat server of this container how it is: exit 0 where it answers 200.

    vlmchat-probe                  whichever of the three runs here is alive
    vlmchat-probe worker /ready    this one, at this path

Called by health checks. `/ready` wants a key where the server has some: VLMCHAT_API_KEY's first.
Standard library only, and short: it is a process of its own every few seconds.
"""

import http.client
import os
import sys

ALIVE = {"worker": (21002, "/health"), "controller": (21001, "/health"), "web": (7860, "/")}
TIMEOUT_S = 4.0


def status(port: int, path: str) -> int:
    """The answer's status; 0 where nobody answers."""
    keys = os.environ.get("VLMCHAT_API_KEY", "").split("\n")
    headers = {"authorization": f"Bearer {keys[0]}"} if keys[0] else {}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def main(role: str = "", path: str = "") -> int:
    """0 where one of the roles asked for answers 200, else 1."""
    asked = [ALIVE[role]] if role else list(ALIVE.values())
    return 0 if any(status(port, path or usual) == 200 for port, usual in asked) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
