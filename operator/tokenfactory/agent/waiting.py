"""The init container's side of the start gate: one question, and every way it can go wrong as an answer."""

from __future__ import annotations

import http.client

import msgspec

START_PATH = "/v1/start/"
ANSWER_SECONDS = 15.0
LONGEST_ANSWER = 65536


class GateAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the agent says about one pod."""

    may_start: bool
    reason: str
    message: str
    gpus: tuple[str, ...] = ()
    final: bool = False
    """Asking again cannot help."""


def ask(host: str, port: int, pod_uid: str) -> GateAnswer:
    """Ask once. Whatever is no clear yes is a no."""
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", f"{START_PATH}{pod_uid}")
        response = connection.getresponse()
        answer = msgspec.json.decode(response.read(LONGEST_ANSWER), type=GateAnswer)
    except (OSError, http.client.HTTPException) as error:
        return GateAnswer(False, "NoAgent", f"no answer from the node's agent at {host}:{port}: {error}")
    except (msgspec.DecodeError, ValueError) as error:
        return GateAnswer(False, "NotTheAgent", f"{host}:{port} answers, but not as an agent does: {error}")
    finally:
        connection.close()
    if answer.may_start and response.status != http.client.OK:
        return GateAnswer(False, "NotTheAgent", f"{host}:{port} contradicts itself (HTTP {response.status})")
    return answer
