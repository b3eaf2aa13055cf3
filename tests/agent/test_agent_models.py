"""What the agent's own process meters: the models of its node, and the node."""

import asyncio
import contextlib

import pytest
from tests.agent.process import grant
from tests.waiting import until

from tokenfactory.api.actuators import Actuators, ClockRange

pytestmark = pytest.mark.cluster


class Model:
    """A model server on loopback that says what a test wants."""

    def __init__(self, page) -> None:
        self.page = page
        self.asked = 0

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_) -> None:
        self._server.close()

    async def _answer(self, reader, writer) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            self.asked += 1
            body = self.page(self.asked)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
        writer.close()


def honest(asked: int) -> bytes:
    return (
        b'vllm:generation_tokens_total{m="a"} %d\nvllm:prompt_tokens_total{m="a"} %d\n'
        b'vllm:num_requests_running{m="a"} 3\n' % (asked * 500, asked * 2000)
    )


async def test_tokens_and_joules_of_two_pods_are_metered_while_one_of_them_lies(world):
    world.node.give("inference", "chat-0", 0, 1)
    world.node.give("inference", "chat-1", 2, 3)
    for gpu in world.node.hardware.gpus[:4]:
        gpu.set_demand(400.0)
    async with (
        Model(honest) as model,
        Model(lambda asked: b"vllm:generation_tokens_total NaN\n" * asked) as liar,
    ):
        await world.begin(
            grant(gpus=2, metrics=model.url), grant("chat-1", gpus=2, metrics=f"{liar.url}/v1/metrics")
        )

        async def metered() -> bool:
            meters = {it.pod: it for it in (await world.status()).meters}
            return "inference/chat-0" in meters and meters["inference/chat-0"].generated_tokens >= 1_000

        await until(metered)
        status = await world.status()
        meter = next(it for it in status.meters if it.pod == "inference/chat-0")
        assert meter.prompt_tokens == 4 * meter.generated_tokens
        assert meter.running == 3
        seconds = meter.generated_tokens / 500  # one reading a second
        assert 2 * 250_000 * seconds < meter.millijoules < 2 * 700_000 * (seconds + 5) * 2
        assert all(it.generated_tokens == 0 for it in status.meters if it.pod == "inference/chat-1")
        conditions = {it.type: it for it in status.conditions}
        assert "chat-1" in conditions["Metered"].message
        assert liar.asked > 0


async def power_is(world, reason: str) -> bool:
    conditions = {it.type: it for it in (await world.status()).conditions}
    return "NodePower" in conditions and conditions["NodePower"].reason == reason


async def begin_metered(world, source: str, where: str) -> None:
    """Eight GPUs at full load under caps of 500 W: 4 kW, and 1 kW is charged besides them."""
    for gpu in world.node.hardware.gpus:
        gpu.set_load(1.0)
    world.node.give("inference", "chat-0", *range(8))
    path = (world.site, world.rack)
    await world.desk.grant(world.node.name, path, grant(), overhead_milliwatts=1_000_000)
    await world.sheets(500_000)
    await world.desk.renew()
    world.start(f"--node-power={source}", f"--node-power-from={where}", "--pace=node_power=0.2")
    await world.obeying()
    await world.enforced(*[500_000] * 8)


async def test_a_node_whose_meter_says_too_much_is_cut_and_says_so(world, tmp_path):
    meter = tmp_path / "hwmon" / "hwmon0"
    meter.mkdir(parents=True)
    (meter / "name").write_text("power_meter\n")

    def draw(watts: int) -> None:
        (meter / "fresh").write_text(f"{watts}000000\n")
        (meter / "fresh").replace(meter / "power1_average")

    draw(4_800)
    await begin_metered(world, "hwmon", str(meter.parent))
    await until(lambda: power_is(world, "WithinCharge"))
    draw(5_500)
    await until(lambda: power_is(world, "AboveCharge"))
    await until(lambda: sum(world.node.enforced_milliwatts()) <= 8 * 500_000 - 500_000)
    assert "tokenfactory_agent_node_power_watts 5500.0" in await world.get("/metrics")


async def test_a_bmc_is_read_and_missed_when_it_is_gone(world):
    async with Model(lambda _: b'{"PowerWatts": {"Reading": 4900}}') as bmc:
        await begin_metered(world, "redfish", f"{bmc.url}/redfish/v1/Chassis/1/EnvironmentMetrics")
        await until(lambda: power_is(world, "WithinCharge"))
        assert "tokenfactory_agent_node_power_watts 4900.0" in await world.get("/metrics")
    await until(lambda: power_is(world, "Unreadable"))
    assert world.node.enforced_milliwatts() == [500_000] * 8


async def test_clocks_that_a_grant_asks_for_are_locked_and_freed_with_its_end(world):
    clocks = Actuators(locked_clocks=ClockRange(max_mhz=1_410))
    world.node.give("inference", "chat-0", 0, 1)
    await world.begin(grant(gpus=2, actuators=clocks))

    def locked() -> list[int]:
        return [gpu.get("locked_max_mhz") for gpu in world.node.hardware.gpus]

    async def told(count: int) -> bool:
        return [gpu.actuators for gpu in (await world.status()).gpus].count(clocks) == count

    await until(lambda: locked() == [1_410] * 2 + [0] * 6)
    await until(lambda: told(2))
    assert world.node.enforced_milliwatts() == [600_000] * 2 + [250_000] * 6
    await world.node.kill()
    world.node.kubelet.end("inference", "chat-0")
    world.start()
    await until(lambda: locked() == [0] * 8)
    await until(lambda: told(0))
