"""The node's own meter: read whatever it does, learned from without trust, and obeyed when it says too much."""

import asyncio
import json
import os
import shutil
import ssl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.agent.test_scraping import HOSTILE, PATIENCE, endless, http, serving

from tokenfactory.agent.nodepower import ACPI_METER, LARGEST_ANSWER, Hwmon, MeterError, Redfish, meter_of
from tokenfactory.agent.overhead import SAMPLES, SEASONED, Learned, Sample, learn, resume, with_margin
from tokenfactory.twin.pki import Authority

# --- the kernel's meter


def hwmon(root: Path, number: int, name: str, **files: str) -> Path:
    device = root / f"hwmon{number}"
    device.mkdir(parents=True)
    (device / "name").write_text(f"{name}\n")
    for file, text in files.items():
        (device / file).write_text(text)
    return device


async def test_the_acpi_meter_is_found_among_other_sensors(tmp_path):
    hwmon(tmp_path, 0, "coretemp", temp1_input="41000\n")
    hwmon(tmp_path, 1, "psu", power1_input="99000000\n")
    hwmon(tmp_path, 2, ACPI_METER, power1_average="4321000000\n")
    meter = Hwmon(tmp_path)
    assert await meter.read() == 4_321_000
    await meter.close()


async def test_a_meter_may_be_named_and_may_come_back_under_another_number(tmp_path):
    device = hwmon(tmp_path, 2, ACPI_METER, power1_average="1000000000\n")
    named, found = Hwmon(device / "power1_average"), Hwmon(tmp_path)
    assert await named.read() == await found.read() == 1_000_000
    device.rename(tmp_path / "hwmon7")
    assert await found.read() == 1_000_000
    with pytest.raises(MeterError, match="no ACPI power meter"):
        await named.read()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no number"),
        ("lots\n", "no number"),
        ("0\n", "no node's draw"),
        ("-5000000\n", "no node's draw"),
        ("9" * 60, "no node's draw"),
        ("9" * 10_000, "no node's draw"),
    ],
)
async def test_a_meter_that_speaks_nonsense_is_an_error_in_words(tmp_path, text, says):
    hwmon(tmp_path, 0, ACPI_METER, power1_average=text)
    with pytest.raises(MeterError, match=says):
        await Hwmon(tmp_path).read()


async def test_two_meters_are_a_question_for_a_person(tmp_path):
    hwmon(tmp_path, 0, ACPI_METER, power1_average="1\n")
    hwmon(tmp_path, 1, ACPI_METER, power1_average="2\n")
    with pytest.raises(MeterError, match="2 power meters: name the one"):
        await Hwmon(tmp_path).read()


async def test_a_meter_that_hangs_costs_one_deadline_and_then_nothing(tmp_path):
    device = hwmon(tmp_path, 0, ACPI_METER)
    fifo = device / "power1_average"
    os.mkfifo(fifo)
    meter = Hwmon(tmp_path, answer_seconds=0.05)
    with pytest.raises(MeterError, match="no answer within"):
        await meter.read()
    with pytest.raises(MeterError, match="has not come back"):
        await meter.read()
    writer = await asyncio.to_thread(fifo.open, "w")
    writer.close()  # the hung reading ends
    fifo.unlink()
    fifo.write_text("2000000000\n")
    meter._answer_seconds = 5.0

    async def again() -> int:
        while True:
            try:
                return await meter.read()
            except MeterError:
                await asyncio.sleep(0.005)

    assert await asyncio.wait_for(again(), 10) == 2_000_000


# --- the BMC


ENVIRONMENT = {"@odata.type": "#EnvironmentMetrics.v1_3_0", "PowerWatts": {"Reading": 5123.4}}
POWER = {"PowerControl": [{"Name": "System", "PowerConsumedWatts": 4000}, {"PowerConsumedWatts": 700}]}
SENSOR = {"Reading": 3000.5, "ReadingUnits": "W"}


@pytest.mark.parametrize(
    ("document", "draw"), [(ENVIRONMENT, 5_123_400), (POWER, 4_000_000), (SENSOR, 3_000_500)]
)
async def test_each_of_redfishs_power_resources_is_understood(document, draw):
    async with serving(http(json.dumps(document).encode())) as url:
        assert await Redfish(f"{url}/redfish/v1/Chassis/1/X").read() == draw


NONSENSE = {
    "another resource": (b'{"@odata.type": "#Chassis.v1_25_0.Chassis"}', "tells no power"),
    "no reading": (b'{"PowerWatts": {"Reading": null}}', "tells no power"),
    "a temperature": (b'{"Reading": 41.5, "ReadingUnits": "Cel"}', "tells no power"),
    "a text": (b'{"PowerWatts": {"Reading": "5123"}}', "no power resource"),
    "infinite": (b'{"PowerWatts": {"Reading": 1e999}}', "no (power resource|node's draw)"),
    "negative": (b'{"PowerWatts": {"Reading": -3}}', "no node's draw"),
    "a gigawatt": (b'{"PowerWatts": {"Reading": 1e9}}', "no node's draw"),
    "nested without end": (b"[" * 200_000, "no power resource"),
    "nested in an unknown field": (b'{"A": ' + b"[" * 200_000, "no power resource"),
    "html": (b"<html>", "no power resource"),
    "nothing": (b"", "no power resource"),
}


@pytest.mark.parametrize("name", NONSENSE)
async def test_a_bmc_that_speaks_nonsense_is_an_error_in_words(name):
    body, says = NONSENSE[name]
    async with serving(http(body)) as url:
        with pytest.raises(MeterError, match=says):
            await Redfish(url).read()


@pytest.mark.parametrize(
    "name", [it for it in HOSTILE if it not in ("html", "json", "huge", "one endless line")]
)
async def test_a_hostile_bmc_is_an_error_in_bounded_time(name):
    answer, _ = HOSTILE[name]
    async with serving(answer) as url:
        with pytest.raises(MeterError):
            await Redfish(url, answer_seconds=PATIENCE.get(name, 30)).read()


async def test_nobody_is_followed_elsewhere():
    """A password would go along."""
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode().split()[1])
        body = json.dumps(ENVIRONMENT).encode()
        head = "302 Found\r\nLocation: /elsewhere" if asked[-1] == "/here" else "200 OK"
        writer.write(f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()

    async with serving(answer) as url:
        with pytest.raises(MeterError, match="HTTP 302"):
            await Redfish(f"{url}/here").read()
    assert asked == ["/here"]


async def test_a_huge_answer_is_not_read_to_its_end():
    ok = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with serving(endless(b"10000\r\n" + b" " * 65536 + b"\r\n", ok)) as url:
        with pytest.raises(MeterError, match=f"more than {LARGEST_ANSWER} bytes"):
            await Redfish(url, answer_seconds=30).read()


async def test_nobody_there_is_an_error_and_the_next_reading_finds_it_back():
    async with serving(http(json.dumps(ENVIRONMENT).encode())) as url:
        meter = Redfish(url)
    with pytest.raises(MeterError, match="Connect"):
        await meter.read()
    port = int(url.rpartition(":")[2])
    server = await asyncio.start_server(_asked, "127.0.0.1", port)
    try:
        assert await meter.read() == 5_123_400
    finally:
        server.close()


async def _asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await http(json.dumps(ENVIRONMENT).encode())(reader, writer)
    writer.close()


@pytest.fixture
def secret(tmp_path) -> Path:
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "username").write_text("reader\n")
    (folder / "password").write_text("s3cret\n")
    return folder


async def test_over_tls_it_trusts_its_authority_only_and_says_who_it_is(tmp_path, secret):
    authority = Authority(tmp_path / "pki")
    pair = authority.server("bmc", ("localhost",), ("127.0.0.1",))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair.certificate, pair.key)
    heard: list[str] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        heard.extend(line for line in head.splitlines() if line.startswith("authorization:"))
        body = json.dumps(ENVIRONMENT).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/redfish/v1/Chassis/1/EnvironmentMetrics"
    try:
        with pytest.raises(MeterError, match=r"(?i)certificate"):
            await Redfish(url, credentials=secret).read()
        assert heard == [], "no password goes to whoever is not known"
        assert await Redfish(url, credentials=secret, verify=False).read() == 5_123_400
        shutil.copy(tmp_path / "pki" / "ca.crt", secret / "ca.crt")
        assert await Redfish(url, credentials=secret).read() == 5_123_400
    finally:
        server.close()
    assert len(heard) == 2
    (secret / "password").unlink()
    with pytest.raises(MeterError, match="password"):
        await Redfish(url, credentials=secret).read()


@pytest.mark.parametrize(
    ("source", "where", "credentials", "says"),
    [
        ("ipmi", "", "", "write hwmon or redfish"),
        ("redfish", "", "", "write for example https://169.254.3.254/redfish"),
        ("redfish", "ftp://bmc/x", "", "write for example"),
        ("redfish", "https://root:x@bmc/x", "", "the user in the credentials"),
        ("redfish", "http://bmc/x", "/secret", "would send a password in the clear"),
    ],
)
def test_a_meter_that_cannot_be_is_refused_with_what_to_write(source, where, credentials, says):
    with pytest.raises(ValueError, match=says):
        meter_of(source, where, credentials=credentials)


def test_a_url_may_name_the_node():
    meter = meter_of("redfish", "https://{node}-bmc.example/redfish/v1/Chassis/1/Power", node="gpu-7")
    assert isinstance(meter, Redfish)
    assert meter._url == "https://gpu-7-bmc.example/redfish/v1/Chassis/1/Power"
    assert meter_of("") is None


# --- what is learned

BUSY, QUIET = 4_000_000, 500_000


def sample(rest: int, gpus: int = BUSY) -> Sample:
    return Sample(gpus + rest, gpus, 5_600_000)


def taught(before: Learned, samples: list[Sample], charged: int = 4_600_000) -> Learned:
    for it in samples:
        before = learn(before, it, charged)
    return before


def test_a_quiet_node_saves_nothing_however_long_it_is_watched():
    learned = taught(Learned(), [sample(900_000, QUIET)] * SAMPLES * SEASONED * 3)
    assert learned.reported_milliwatts == 0
    assert learned.highest_milliwatts == with_margin(900_000)


def test_after_an_hour_under_load_it_is_told_with_a_margin():
    almost = taught(Learned(), [sample(2_000_000)] * (SAMPLES * SEASONED - 1))
    assert almost.reported_milliwatts == 0
    assert not almost.proven
    learned = taught(almost, [sample(2_000_000)])
    assert learned.proven
    assert learned.reported_milliwatts == 2_250_000
    assert taught(learned, [sample(1_000_000)] * SAMPLES * 5).reported_milliwatts == 2_250_000


def test_more_than_is_charged_is_told_after_five_minutes():
    learned = taught(Learned(), [sample(1_000_000, QUIET)] * SAMPLES, charged=800_000)
    assert learned.reported_milliwatts == with_margin(1_000_000)
    assert not taught(learned, [sample(1_000_000, QUIET)] * SAMPLES * SEASONED).proven, "not under load"


@pytest.mark.parametrize("proven", [True, False])
def test_a_restart_forgets_nothing(proven):
    learned = taught(resume(2_250_000, proven=proven), [sample(500_000)] * SAMPLES * 3)
    assert (learned.reported_milliwatts, learned.proven) == (2_250_000, proven)


@given(
    truth=st.integers(500_000, 3_000_000),
    spikes=st.lists(
        st.tuples(st.integers(0, SAMPLES - 1), st.integers(-4_000_000, 4_000_000)), max_size=SAMPLES // 2 - 1
    ),
)
def test_wild_readings_in_less_than_half_of_a_window_move_nothing_beyond_the_others(truth, spikes):
    window = [sample(truth)] * SAMPLES
    for place, off in spikes:
        window[place] = Sample(max(1, BUSY + truth + off), BUSY, 5_600_000)
    assert taught(Learned(), window, charged=0).highest_milliwatts == with_margin(truth)


@given(st.lists(st.integers(0, 3_000_000), min_size=SAMPLES, max_size=SAMPLES * 6))
def test_what_is_told_never_falls_and_covers_every_median(rests):
    learned, told = Learned(), 0
    for rest in rests:
        learned = learn(learned, sample(rest), 0)
        assert learned.reported_milliwatts >= told
        told = learned.reported_milliwatts
    whole = [sorted(rests[at : at + SAMPLES]) for at in range(0, len(rests) - SAMPLES + 1, SAMPLES)]
    assert all(told > it[SAMPLES // 2 - 1] for it in whole)


def test_a_node_that_draws_less_than_its_gpus_is_not_believed():
    assert not Sample(3_500_000, BUSY, 5_600_000).plausible
    assert Sample(3_700_000, BUSY, 5_600_000).plausible
