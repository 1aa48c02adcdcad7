"""A Gapless client in one file, for Python 3.9 or later, without dependencies.

    producer = Producer(["http://127.0.0.1:8080"], "demo", "my-program")
    producer.append({"content": "Hello", "message_id": "m1"}, {"type": "done", "message_id": "m1"})

    for event in follow(["http://127.0.0.1:8080"], "demo"):
        if event.reset:
            ...  # clear what you show: what follows replaces it
        else:
            print(event.seq, event.chunk)
"""
import http.client
import itertools
import json
import random
import sys
import time
import urllib.parse
from typing import Iterator, NamedTuple, Optional


class Refused(Exception):
    """The server refused a call. status is the HTTP status, problem the problem document."""

    def __init__(self, status: int, problem: dict):
        super().__init__(f"{status} {problem.get('code')}: {problem.get('detail')}")
        self.status, self.problem = status, problem


def _connect(node: str, timeout: float) -> http.client.HTTPConnection:
    url = urllib.parse.urlsplit(node)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    return kind(url.hostname, url.port, timeout=timeout)


class Producer:
    """Appends chunks to a session, each exactly once.

    name identifies this producer within the session. A program that starts again takes a higher epoch, and so excludes its former self.
    """

    def __init__(self, nodes, session: str, name: str, epoch: int = 0, token: Optional[str] = None):
        self._nodes = itertools.cycle(nodes)
        self._node = next(self._nodes)
        self._path = "/v1/sessions/" + urllib.parse.quote(session, safe="") + "/chunks"
        self._headers = {"Content-Type": "application/json", "Producer-Id": name, "Producer-Epoch": str(epoch)}
        if token:
            self._headers["Authorization"] = "Bearer " + token
        self._number = 0

    def append(self, *chunks: dict, patience: float = 60.0) -> dict:
        """Appends chunks, all or none, and returns the server's answer. Retries until patience (in seconds) is over."""
        body, until, wait = json.dumps(chunks), time.monotonic() + patience, 0.1
        while True:
            status, answer = self._post(body)
            if status in (200, 201):
                self._number += len(chunks)
                return answer
            if status and status < 500 and status != 429:
                raise Refused(status, answer)
            if time.monotonic() > until:
                raise Refused(status or 0, answer)
            self._node = next(self._nodes)  # no answer, or none that is final: it is safe to say the same again
            time.sleep(wait * random.uniform(0.5, 1))
            wait = min(2 * wait, 5)

    def _post(self, body: str):
        connection = _connect(self._node, 15)
        try:
            connection.request("POST", self._path, body, {**self._headers, "Producer-Chunk": str(self._number)})
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"{}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            return None, {"code": "no_answer", "detail": str(error)}
        finally:
            connection.close()


class Event(NamedTuple):
    seq: int
    chunk: Optional[dict]  # None with a reset
    reset: Optional[str]  # why the chunks so far are void; None with a chunk


def follow(nodes, session: str, cursor: Optional[int] = None, token: Optional[str] = None) -> Iterator[Event]:
    """Yields every chunk after cursor, in order and once, until the log has ended. Reconnects by itself."""
    path = "/v1/sessions/" + urllib.parse.quote(session, safe="") + "/stream"
    wait = 0.1
    for node in itertools.cycle(nodes):
        headers = {"Accept": "text/event-stream"}
        if token:
            headers["Authorization"] = "Bearer " + token
        if cursor is not None:
            headers["Last-Event-ID"] = str(cursor)
        connection = _connect(node, 45)  # three heartbeats
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            if response.status == 204:
                return
            if 400 <= response.status < 500 and response.status != 429:
                raise Refused(response.status, json.loads(response.read() or b"{}"))
            if response.status == 200:
                for name, data, identity in _events(response):
                    wait = 0.1
                    if name == "reset":
                        cursor = identity
                        yield Event(identity, None, data["reason"])
                    elif name == "message":
                        cursor = identity
                        yield Event(identity, data, None)
        except (OSError, http.client.HTTPException, ValueError):
            pass  # a connection that broke: the next one goes on after cursor
        finally:
            connection.close()
        time.sleep(wait * random.uniform(0.5, 1))
        wait = min(2 * wait, 5)


def _events(response):
    """Yields (name, data, id) of each complete event."""
    name, data, identity = "message", [], None
    while True:
        line = response.readline()
        if not line.endswith(b"\n"):
            return  # the rest of an event that was cut
        field, _, value = line.decode().rstrip("\r\n").partition(":")
        value = value[1:] if value.startswith(" ") else value
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif field == "id":
            identity = int(value)
        elif field == "" and not value:
            if data and identity is not None:
                yield name, json.loads("\n".join(data)), identity
            name, data = "message", []


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("follow", "append"):
        sys.exit("usage: gapless.py follow|append URL[,URL…] SESSION (append reads lines of text)")
    servers = sys.argv[2].split(",")
    if sys.argv[1] == "append":
        to = Producer(servers, sys.argv[3], "gapless.py")
        for text in sys.stdin:
            to.append({"content": text, "message_id": "m1"})
        to.append({"type": "done", "message_id": "m1"}, {"type": "end"})
    else:
        for event in follow(servers, sys.argv[3]):
            print(json.dumps({"reset": event.reset} if event.reset else event.chunk, ensure_ascii=False), flush=True)
