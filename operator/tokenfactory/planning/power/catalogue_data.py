"""The catalogue's figures, each with its public source. Data only; `catalogue` reads it.

What NVML and the BMC of a real machine say always goes before these figures. Where no public figure was found the row
says which of its figures are estimates. They are taken to the side that costs watts and never breaks a budget: nameplates,
minimum caps and idle draws high.
"""

from typing import Final, NamedTuple

SOURCES: Final = {
    "a100": "NVIDIA A100 datasheet: 400 W (SXM), 300 W (PCIe); nvidia-smi reports 100 W / 150 W as the minimum",
    "l40s": "NVIDIA L40S datasheet: 350 W; nvidia-smi reports 100 W as the minimum",
    "h100": "NVIDIA H100 datasheet: up to 700 W (SXM), 350 W (PCIe); NVIDIA DGX B200 user guide, chapter Managing "
    "Power Capping: allowable minimum 200 W (its example shows a GPU of 700 W)",
    "h200": "NVIDIA H200 datasheet: up to 700 W (SXM), 600 W (NVL); minimum as for H100",
    "blackwell": "NVIDIA Blackwell datasheet: B100 700 W, B200 up to 1,000 W, GB200 up to 1,200 W per GPU",
    "blackwell-ultra": "NVIDIA Blackwell Ultra datasheet: GB300 up to 1,400 W per GPU",
    "rubin": "NVIDIA GTC 2026 and CES 2026: 1,800 W (Max-Q) to 2,300 W (Max-P) per Vera Rubin package; preliminary",
    "idle": "nvidia-smi on idle machines as published by operators: A100 50-60 W, L40S 35 W, H100 65-75 W, H200 "
    "80 W, B200 140-190 W; later products by the share of their limit",
    "dgx-a100": "NVIDIA DGX A100 user guide: 6.5 kW maximum",
    "dgx-h100": "NVIDIA DGX H100/H200 user guide: 10.2 kW maximum",
    "dgx-b200": "NVIDIA DGX B200 user guide: 14.3 kW maximum; HGX B100: less 300 W for each of 8 GPUs",
    "ovx-l40s": "NVIDIA OVX L40S reference: 8 x 350 W and up to 2.2 kW for the host",
    "gb200-nvl72": "Vendors' GB200 NVL72 guides: 132 kW rack, of which 9 switch trays draw about 3.6 kW, over 18 compute "
    "trays; for a tray alone 5.4 kW for two superchips (2,700 W each) is published, NICs and fans on top",
    "gb300-nvl72": "Vendors' GB300 NVL72 guides: 142 kW rack at most, over 18 compute trays as for GB200; for a tray alone "
    "6.5 to 6.6 kW is published (Supermicro 2025; Morgan Stanley 2025)",
    "vr-nvl72": "NVIDIA GTC 2026: 190 kW (Max-Q) to 230 kW (Max-P) per Vera Rubin NVL72 rack, over 18 compute trays as for "
    "GB200; preliminary",
    "ml-energy": "The ML.ENERGY benchmark and leaderboard (Apache-2.0): steady-state serving on H100 and B200",
    "cap-shape": "Published cap sweeps: B200 decode keeps its tokens down to 62 % of the natural draw and loses 36 % "
    "at 51 %; POLCA (ASPLOS 2024): 20 % less power costs at most 7 %",
    "bandwidth": "Decode is bound by memory bandwidth: datasheets' TB/s against the measured product's",
}


class ProductRow(NamedTuple):
    name: str
    matches: tuple[str, ...]
    """All of these words occur in NVML's name, in any order."""
    minimum_watts: int
    default_watts: int
    maximum_watts: int
    idle_watts: int
    terabytes_per_second: float
    source: str
    estimates: tuple[str, ...] = ()
    """Which of its figures no public source was found for."""


_MINIMUM_AND_IDLE: Final = ("minimum", "idle")

# The first match wins: the more particular names come first.
PRODUCTS: Final = (
    ProductRow("Rubin", ("RUBIN",), 400, 1800, 2300, 260, 22.0, "rubin", _MINIMUM_AND_IDLE),
    ProductRow("Rubin", ("VR200",), 400, 1800, 2300, 260, 22.0, "rubin", _MINIMUM_AND_IDLE),
    ProductRow("GB300", ("GB300",), 200, 1400, 1400, 200, 8.0, "blackwell-ultra", _MINIMUM_AND_IDLE),
    ProductRow("GB200", ("GB200",), 200, 1200, 1200, 180, 8.0, "blackwell", _MINIMUM_AND_IDLE),
    ProductRow("B200", ("B200",), 200, 1000, 1000, 150, 8.0, "blackwell", ("minimum",)),
    ProductRow("B100", ("B100",), 200, 700, 700, 120, 8.0, "blackwell", _MINIMUM_AND_IDLE),
    ProductRow("H200 NVL", ("H200", "NVL"), 200, 600, 600, 80, 4.8, "h200", _MINIMUM_AND_IDLE),
    ProductRow("H200", ("H200",), 200, 700, 700, 80, 4.8, "h200"),
    ProductRow("H100 PCIe", ("H100", "PCIE"), 200, 350, 350, 50, 2.0, "h100", ("idle",)),
    ProductRow("H100 NVL", ("H100", "NVL"), 200, 400, 400, 60, 3.9, "h100", ("idle",)),
    ProductRow("H100", ("H100",), 200, 700, 700, 70, 3.35, "h100"),
    ProductRow("L40S", ("L40S",), 100, 350, 350, 35, 0.864, "l40s"),
    ProductRow("A100 PCIe", ("A100", "PCIE"), 150, 300, 300, 50, 1.9, "a100", ("idle",)),
    ProductRow("A100", ("A100",), 100, 400, 400, 55, 2.0, "a100"),
)


class SystemRow(NamedTuple):
    name: str
    product: str
    gpus: int
    nameplate_watts: int
    """The whole node at most, as its PSUs or its vendor state."""
    source: str
    estimated: bool = False
    """Worked out from the source, which states it for another or a larger system."""


SYSTEMS: Final = (
    SystemRow("DGX A100", "A100", 8, 6_500, "dgx-a100"),
    SystemRow("HGX A100 4-GPU", "A100", 4, 3_300, "dgx-a100", estimated=True),
    SystemRow("OVX L40S", "L40S", 8, 5_000, "ovx-l40s", estimated=True),
    SystemRow("DGX H100, HGX H100", "H100", 8, 10_200, "dgx-h100"),
    SystemRow("DGX H200, HGX H200", "H200", 8, 10_200, "dgx-h100"),
    SystemRow("HGX B100", "B100", 8, 11_900, "dgx-b200", estimated=True),
    SystemRow("DGX B200, HGX B200", "B200", 8, 14_300, "dgx-b200"),
    SystemRow("GB200 NVL72 compute tray", "GB200", 4, 7_150, "gb200-nvl72", estimated=True),
    SystemRow("GB300 NVL72 compute tray", "GB300", 4, 7_700, "gb300-nvl72", estimated=True),
    SystemRow("Vera Rubin NVL72 compute tray", "Rubin", 4, 12_600, "vr-nvl72", estimated=True),
)


class ServingRow(NamedTuple):
    billions: float
    """Parameters of the model: the catalogue knows sizes, not names."""
    product: str
    gpus_per_replica: int
    concurrency: int
    tokens_per_second: float
    """Per GPU."""
    watts: float
    """Natural draw per GPU."""
    inter_token_milliseconds: float


SERVING_SOURCE: Final = "ml-energy"
SERVING: Final = (
    ServingRow(8, "H100", 1, 256, 9010, 691, 26),
    ServingRow(8, "H100", 1, 512, 9806, 688, 47),
    ServingRow(8, "B200", 1, 256, 7664, 540, 32),
    ServingRow(8, "B200", 1, 1024, 10922, 600, 87),
    ServingRow(30, "H100", 1, 96, 2659, 494, 32),
    ServingRow(30, "H100", 2, 512, 4825, 477, 47),
    ServingRow(30, "B200", 1, 512, 8840, 703, 38),
    ServingRow(30, "B200", 1, 1024, 10648, 601, 89),
    ServingRow(70, "H100", 4, 256, 1283, 630, 39),
    ServingRow(70, "H100", 4, 512, 1465, 623, 74),
    ServingRow(70, "B200", 2, 256, 2758, 971, 37),
    ServingRow(70, "B200", 2, 512, 3539, 965, 64),
    ServingRow(235, "H100", 8, 192, 451, 498, 50),
    ServingRow(235, "H100", 8, 512, 668, 495, 76),
    ServingRow(235, "B200", 2, 128, 1128, 927, 54),
    ServingRow(235, "B200", 2, 256, 1888, 945, 64),
    ServingRow(405, "H100", 8, 128, 237, 576, 48),
    ServingRow(405, "H100", 8, 256, 295, 609, 67),
    ServingRow(405, "B200", 4, 128, 543, 962, 46),
    ServingRow(405, "B200", 4, 512, 847, 971, 98),
    ServingRow(671, "B200", 8, 256, 642, 857, 55),
    ServingRow(671, "B200", 8, 1024, 912, 704, 128),
)

# Share of the natural draw at which a GPU is capped → share of its tokens. Flat, then a cliff.
CAP_SHAPE_SOURCE: Final = "cap-shape"
CAP_SHAPE: Final = ((0.35, 0.25), (0.51, 0.62), (0.625, 0.94), (0.8, 0.98), (1.0, 1.0))
