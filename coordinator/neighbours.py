"""Who is at the other end of a loopback connection: the user whose process opened it, as the kernel knows it.

A port on loopback is open to every user of a machine. Where a service has no users of its own, as the SuperLink's
Control and Runtime APIs have none, this tells its neighbours apart.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

Endpoint: TypeAlias = tuple[str, int]

_TABLES: Final = {4: Path("/proc/net/tcp"), 6: Path("/proc/net/tcp6")}
_ESTABLISHED: Final = "01"


def owner(peer: Endpoint, own: Endpoint) -> int | None:
    """The user id of the process on this machine whose socket is `peer`, connected to `own`; None if there is none.

    A socket that was closed has none any more: the kernel then gives it to user 0, who is root.
    """
    wanted = f" {_hexadecimal(peer)} {_hexadecimal(own)} {_ESTABLISHED} "
    table = _TABLES[ipaddress.ip_address(peer[0]).version]
    try:
        with table.open(encoding="ascii") as lines:
            for line in lines:  # "sl: LOCAL REMOTE state tx:rx timer:when retransmits uid …"
                if wanted in line:
                    return int(line.split()[7])
    except OSError:
        pass
    return None


class SameUser:
    """ASGI middleware that answers 403 to every caller but processes of this user, and of root."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or owner(tuple(scope["client"]), tuple(scope["server"])) in (0, os.getuid()):
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 403, "headers": []})
        await send({"type": "http.response.body", "body": b"for the coordinator's own user only"})


def _hexadecimal(endpoint: Endpoint) -> str:
    """`endpoint` as /proc/net/tcp writes it: 32-bit words of the address in the machine's byte order."""
    raw = ipaddress.ip_address(endpoint[0]).packed
    words = (int.from_bytes(raw[at : at + 4], sys.byteorder) for at in range(0, len(raw), 4))
    return "".join(f"{word:08X}" for word in words) + f":{endpoint[1]:04X}"
