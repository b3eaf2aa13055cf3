"""One node, told as a story in virtual time."""

from collections.abc import Awaitable, Callable

from tests.unit.agent.hollow import Node
from tests.unit.agent.virtual import run


def story(tell: Callable[[Node], Awaitable[None]], gpus: int = 8) -> None:
    async def whole() -> None:
        node = Node(gpus)
        try:
            await tell(node)
        finally:
            await node.stop()

    run(whole())


def applied(node: Node) -> dict[str, int]:
    return {it.domain: it.epoch for it in node.api.status.applied}
