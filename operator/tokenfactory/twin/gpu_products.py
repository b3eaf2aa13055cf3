"""The kinds of GPU that can be simulated, as NVML shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Product:
    """A GPU product as NVML shows it; watts are the board's, draws and clocks are typical."""

    name: str
    architecture: int
    compute: tuple[int, int]
    pci_device_id: int
    memory_mib: int
    min_watts: int
    default_watts: int
    max_watts: int
    idle_watts: int
    max_sm_mhz: int
    max_memory_mhz: int
    links: int = 0
    link_version: int = 0
    mig: bool = True
    fabric: bool = False
    gpus_per_module: int = 0
    module_watts: tuple[int, int, int] = (0, 0, 0)
    """Least, default and most for a Grace module."""
    module_other_watts: int = 0
    """What the module's CPU and memory draw."""
    profiles: tuple[int, ...] = ()


BLACKWELL_PROFILES = (0, 1, 2, 3, 4, 5, 6, 7)
H100 = Product(
    "NVIDIA H100 80GB HBM3", 9, (9, 0), 0x233010DE, 81559, 200, 700, 700, 70, 1980, 2619, 18, 4, fabric=True
)
H200 = replace(
    H100, name="NVIDIA H200", pci_device_id=0x233510DE, memory_mib=143771, idle_watts=76, max_memory_mhz=3201
)
B200 = Product(
    "NVIDIA B200", 10, (10, 0), 0x290110DE, 183359, 200, 1000, 1000, 140, 1965, 3996, 18, 5,
    fabric=True, profiles=BLACKWELL_PROFILES,
)  # fmt: skip
GB200 = replace(
    B200, name="NVIDIA GB200", pci_device_id=0x294110DE, memory_mib=189471, default_watts=1200, max_watts=1200,
    gpus_per_module=2, module_watts=(600, 2700, 2700), module_other_watts=150,
)  # fmt: skip
GH200 = replace(
    H100, name="NVIDIA GH200 480GB", pci_device_id=0x234210DE, memory_mib=97871, min_watts=100, default_watts=900,
    max_watts=900, fabric=False, gpus_per_module=1, module_watts=(300, 1000, 1000), module_other_watts=120,
)  # fmt: skip
A100 = Product("NVIDIA A100-SXM4-80GB", 8, (8, 0), 0x20B210DE, 81920, 100, 400, 400, 55, 1410, 1593, 12, 3)
L40S = Product("NVIDIA L40S", 8, (8, 9), 0x26B910DE, 46068, 100, 350, 350, 35, 2520, 9001, mig=False)
PRODUCTS: Mapping[str, Product] = {
    product.name: product for product in (H100, H200, B200, GB200, GH200, A100, L40S)
}


def product_named(name: str) -> Product:
    """By its NVML name, by the node label's form of it, or by its short name: H100, GB200."""
    for product in PRODUCTS.values():
        if name in (product.name, product.name.replace(" ", "-"), product.name.split()[1].split("-")[0]):
            return product
    raise ValueError(f"no simulated GPU product {name!r}; there are: {', '.join(PRODUCTS)}")
