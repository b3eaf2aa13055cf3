"""What the whole node draws, as its own meter says: the kernel's (ACPI) or the BMC's (Redfish).

NVML sees the boards of GPUs only. Fans, CPUs, NICs and NVSwitches are in the node's power supplies, which one of these
meters measures. Neither is trusted with anything but a number: a meter that is slow, gone, huge or speaks nonsense is a
`MeterError` in bounded time and memory, and the agent goes on without it.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol
from urllib.parse import urlsplit

import msgspec

from tokenfactory.agent.lanes import Lane, OverdueError, StuckError

if TYPE_CHECKING:
    import aiohttp

ANSWER_SECONDS: Final = 5.0
HWMON: Final = Path("/sys/class/hwmon")
ACPI_METER: Final = "power_meter"
"""The name that Linux' acpi_power_meter gives its device."""
LONGEST_NUMBER: Final = 64
LARGEST_ANSWER: Final = 512 * 1024
MOST_MILLIWATTS: Final = 100_000_000
"""No node draws 100 kW: whoever says so is wrong."""
_STATUS_OK: Final = 200

Source = Literal["", "hwmon", "redfish"]


class MeterError(Exception):
    """The meter gave no number; the message says why, in words for an SRE."""


class PowerMeter(Protocol):
    """One node's meter."""

    async def read(self) -> int:
        """What the node draws now, in milliwatts; raises MeterError within seconds if that cannot be said."""

    async def close(self) -> None: ...


def meter_of(
    source: str, where: str = "", *, credentials: str = "", verify: bool = True, node: str = ""
) -> PowerMeter | None:
    """The meter that was asked for; None where none was. `{node}` in a URL stands for the node's name."""
    if not source:
        return None
    if source not in ("hwmon", "redfish"):
        raise ValueError(f"{source!r} measures no node's power: write hwmon or redfish, or leave it out")
    if source == "hwmon":
        return Hwmon(Path(where) if where else HWMON)
    folder = Path(credentials) if credentials else None
    return Redfish(where.replace("{node}", node), credentials=folder, verify=verify)


def milliwatts(watts: float) -> int:
    """A meter's number, if it can be one."""
    if not math.isfinite(watts) or watts <= 0 or watts * 1000 > MOST_MILLIWATTS:
        raise MeterError(f"{watts:g} W is no node's draw")
    return round(watts * 1000)


class Hwmon:
    """The kernel's power meter: a file in sysfs, whose reading may take its time, because a BMC answers it."""

    def __init__(self, where: Path = HWMON, answer_seconds: float = ANSWER_SECONDS) -> None:
        self._where = where
        self._answer_seconds = answer_seconds
        self._lane = Lane("node power")

    async def read(self) -> int:
        try:
            return await self._lane.run(self._look, self._answer_seconds)
        except OverdueError:
            raise MeterError(f"{self._where}: no answer within {self._answer_seconds:g} s") from None
        except StuckError:
            raise MeterError(f"{self._where}: an earlier reading has not come back") from None

    def _look(self) -> int:
        file = self._file()
        try:
            with file.open("rb") as opened:
                text = opened.read(LONGEST_NUMBER)
        except OSError as error:
            raise MeterError(f"{file}: {error.strerror or error}") from None
        try:
            microwatts = int(text)
        except ValueError:
            raise MeterError(f"{file} holds {text!r}, which is no number") from None
        return milliwatts(microwatts / 1e6)

    def _file(self) -> Path:
        """Looked up each time: a module that is loaded anew makes another device."""
        if self._where.is_file():
            return self._where
        found = [
            file
            for device in sorted(self._where.glob("hwmon*"))
            if _first_line(device / "name") == ACPI_METER
            for file in (device / "power1_average", device / "power1_input")
            if file.exists()
        ]
        devices = {file.parent for file in found}
        if len(devices) == 1:
            return found[0]
        if devices:
            names = ", ".join(str(file) for file in found)
            raise MeterError(f"{len(devices)} power meters: name the one of the whole node, of {names}")
        raise MeterError(
            f"{self._where} has no ACPI power meter: load the module acpi_power_meter, or read the BMC instead"
        )

    async def close(self) -> None:
        self._lane.stop()


def _first_line(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(LONGEST_NUMBER).split(b"\n", 1)[0].decode(errors="replace")
    except OSError:
        return ""


class _Sensor(msgspec.Struct, rename="pascal"):
    reading: float | None = None


class _Control(msgspec.Struct, rename="pascal"):
    power_consumed_watts: float | None = None


class _Document(msgspec.Struct, rename="pascal"):
    """The three resources that tell a chassis' power: EnvironmentMetrics, Power (the older one), a Sensor."""

    power_watts: _Sensor | None = None
    power_control: list[_Control] = []
    reading: float | None = None
    reading_units: str = ""


class Redfish:
    """The BMC, over the host's own interface to it or over the network."""

    def __init__(
        self,
        url: str,
        *,
        credentials: Path | None = None,
        verify: bool = True,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        parsed = urlsplit(url)
        if parsed.scheme not in ("http", "https") or not parsed.hostname or parsed.username:
            raise ValueError(
                f"{url!r} is no address of a power resource: write for example "
                "https://169.254.3.254/redfish/v1/Chassis/1/EnvironmentMetrics, and the user in the credentials"
            )
        if credentials is not None and parsed.scheme != "https":
            raise ValueError(f"{url!r} would send a password in the clear: write https://")
        self._url = url
        self._credentials = credentials
        self._verify = verify
        self._answer_seconds = answer_seconds
        self._tls: ssl.SSLContext | None = None

    async def read(self) -> int:
        try:
            async with asyncio.timeout(self._answer_seconds):
                body = await self._fetch()
        except TimeoutError:
            raise MeterError(f"{self._url}: no answer within {self._answer_seconds:g} s") from None
        try:
            document = msgspec.json.decode(body, type=_Document)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise MeterError(f"{self._url} answers no power resource: {error}") from None
        watts = _watts(document)
        if watts is None:
            raise MeterError(f"{self._url} tells no power: is it EnvironmentMetrics, Power or a Sensor in W?")
        return milliwatts(watts)

    async def _fetch(self) -> bytes:
        import aiohttp

        body = bytearray()
        try:
            async with (
                self._session() as session,
                session.get(self._url, allow_redirects=False) as response,
            ):
                if response.status != _STATUS_OK:
                    raise MeterError(f"{self._url}: HTTP {response.status}")
                async for chunk in response.content.iter_chunked(65536):
                    body += chunk
                    if len(body) > LARGEST_ANSWER:
                        raise MeterError(f"{self._url}: more than {LARGEST_ANSWER} bytes")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise MeterError(f"{self._url}: {type(error).__name__}: {error}"[:400]) from None
        return bytes(body)

    def _session(self) -> aiohttp.ClientSession:
        """One for each reading: a BMC has few connections to give, and its password may be changed meanwhile."""
        import aiohttp

        self._tls = self._tls or self._trust()
        connector = aiohttp.TCPConnector(limit=1, ssl=self._tls, force_close=True)
        return aiohttp.ClientSession(
            connector=connector,
            auth=self._auth(),
            auto_decompress=False,
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept": "application/json", "Accept-Encoding": "identity", "OData-Version": "4.0"},
        )

    def _trust(self) -> ssl.SSLContext:
        authority = self._credentials / "ca.crt" if self._credentials else None
        context = ssl.create_default_context(
            cafile=str(authority) if authority is not None and authority.exists() else None
        )
        if not self._verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def _auth(self) -> Any:
        import aiohttp

        if self._credentials is None:
            return None
        user, password = (self._credentials / name for name in ("username", "password"))
        return aiohttp.BasicAuth(user.read_text().strip(), password.read_text().strip())

    async def close(self) -> None:
        """Nothing is held between readings."""


def _watts(document: _Document) -> float | None:
    if document.power_watts is not None and document.power_watts.reading is not None:
        return document.power_watts.reading
    controls = [it.power_consumed_watts for it in document.power_control]
    told = next((watts for watts in controls if watts is not None), None)
    if told is not None:
        return told
    return document.reading if document.reading_units in ("", "W") else None
