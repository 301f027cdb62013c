"""Asks a server by HTTP: a process of its own, cheap enough to share two cores with the server.

    echo '{"port": 8000, "path": "/v1/completions", "bodies": [{...}], "at_once": 8}' | \
        python benchmarks/serving/asks.py

It reads a JSON line with what to ask and writes one with what came, until its input ends. While
answers arrive it only notes bytes and times, on one thread; what they say is read afterwards.
"""

from __future__ import annotations

import bisect
import json
import selectors
import socket
import sys
import time
from itertools import accumulate
from typing import Any

_READ = 1 << 16


class Exchange:
    """One request on a connection of its own.

    Parameters
    ----------
    port : int
        Of 127.0.0.1.
    path : str
        The route.
    body : dict
        Sent as JSON.
    leave_s : float or None
        Seconds after which the client leaves, whatever has come.
    """

    def __init__(self, port: int, path: str, body: dict[str, Any], leave_s: float | None = None):
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        self.leave_s = leave_s
        self.left = False
        self.parts: list[tuple[float, bytes]] = []
        self.started = time.perf_counter()
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(head.encode() + content)
        self.socket.setblocking(False)

    def read(self) -> bool:
        """Note what has come; return whether more may come."""
        try:
            data = self.socket.recv(_READ)
        except ConnectionError:
            data = b""
        if data:
            self.parts.append((time.perf_counter(), data))
        return bool(data)

    def said(self, origin: float) -> dict[str, Any]:
        """Return what the answer says; times in seconds from its start, its start from origin."""
        joined = b"".join(data for _, data in self.parts)
        ends = list(accumulate(len(data) for _, data in self.parts))
        head, _, _ = joined.partition(b"\r\n\r\n")
        found: dict[str, Any] = {
            "status": int(head.split(b" ", 2)[1]) if head else 0,
            "start": self.started - origin,
            "left": self.left,
            "arrivals": [],
            "usage": None,
            "error": None,
        }
        position = 0
        for line in joined.splitlines(keepends=True):
            position += len(line)
            if line.startswith((b"data: {", b"{")):
                try:
                    made = json.loads(line.removeprefix(b"data: "))
                except ValueError:  # a client that leaves has half a line
                    continue
                when = self.parts[bisect.bisect_left(ends, position)][0] - self.started
                self._event(made, when, found)
        last = self.parts[-1][0] if self.parts else time.perf_counter()
        return found | {"seconds": last - self.started}

    @staticmethod
    def _event(made: dict[str, Any], when: float, found: dict[str, Any]) -> None:
        found["usage"] = made.get("usage") or found["usage"]
        found["error"] = made.get("error") or found["error"]
        for choice in made.get("choices", ()):
            if choice.get("text") or choice.get("delta", {}).get("content"):
                found["arrivals"].append(when)


def ask(
    port: int,
    path: str,
    bodies: list[dict[str, Any]],
    at_once: int | None = None,
    delays: list[float] | None = None,
    leaves: list[float] | None = None,
) -> dict[str, Any]:
    """Send requests and return what came.

    Parameters
    ----------
    port, path, bodies : int, str, list of dict
        Where to, and a request each.
    at_once : int or None
        Most requests under way; None is all of them.
    delays : list of float, optional
        Seconds from the start at which each is sent, ascending.
    leaves : list of float, optional
        Seconds after which each client leaves.

    Returns
    -------
    dict
        ``answers``, a dict each as `Exchange.said` makes it; ``seconds`` from the first request to
        the last byte; ``cpu_s``, processor seconds of this process meanwhile.
    """
    made: list[Exchange] = []
    origin, used = time.perf_counter(), time.process_time()
    with selectors.DefaultSelector() as ready:
        under_way = 0
        while len(made) < len(bodies) or under_way:
            now = time.perf_counter() - origin
            while len(made) < len(bodies) and under_way < (at_once or len(bodies)):
                if delays and now < delays[len(made)]:
                    break
                index = len(made)
                one = Exchange(port, path, bodies[index], leaves[index] if leaves else None)
                made.append(one)
                ready.register(one.socket, selectors.EVENT_READ, one)
                under_way += 1
            gone = [key.data for key, _ in ready.select(_patience(made, delays, leaves, origin))]
            gone = [one for one in gone if not one.read()]
            if leaves:
                for key in list(ready.get_map().values()):
                    one = key.data
                    if one not in gone and time.perf_counter() - one.started > one.leave_s:
                        one.left = True
                        gone.append(one)
            for one in gone:
                ready.unregister(one.socket)
                one.socket.close()
                under_way -= 1
    seconds, cpu = time.perf_counter() - origin, time.process_time() - used
    return {"answers": [one.said(origin) for one in made], "seconds": seconds, "cpu_s": cpu}


def _patience(
    made: list[Exchange], delays: list[float] | None, leaves: list[float] | None, origin: float
) -> float | None:
    """Return how long to wait for bytes before there is something else to do."""
    if leaves:
        return 0.001
    if delays and len(made) < len(delays):
        return max(delays[len(made)] - (time.perf_counter() - origin), 0.0)
    return None


if __name__ == "__main__":
    for request in sys.stdin:
        print(json.dumps(ask(**json.loads(request))), flush=True)
