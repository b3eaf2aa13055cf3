"""The catalogue names products as NVML does, has a source for each figure and claims nothing it does not know."""

import csv
from pathlib import Path

import pytest

from tokenfactory.planning.power import catalogue, catalogue_data
from tokenfactory.planning.power.profile import Requirement, hull_of

MEASURED = Path(__file__).parents[5] / "shared" / "data" / "llm_serving_power_h100_b200.csv"


@pytest.mark.parametrize(
    ("nvml", "name", "limits_watts"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100", (100, 400)),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe", (150, 300)),
        ("NVIDIA L40S", "L40S", (100, 350)),
        ("NVIDIA H100 80GB HBM3", "H100", (200, 700)),
        ("NVIDIA-H100-80GB-HBM3", "H100", (200, 700)),
        ("NVIDIA H100 PCIe", "H100 PCIe", (200, 350)),
        ("NVIDIA H100 NVL", "H100 NVL", (200, 400)),
        ("NVIDIA H200", "H200", (200, 700)),
        ("NVIDIA B100", "B100", (200, 700)),
        ("NVIDIA B200", "B200", (200, 1000)),
        ("NVIDIA GB200", "GB200", (200, 1200)),
        ("NVIDIA GB300", "GB300", (200, 1400)),
        ("NVIDIA VR200", "Rubin", (400, 2300)),
    ],
)
def test_products_by_the_names_that_nvml_and_node_labels_use(nvml, name, limits_watts):
    product = catalogue.product_of(nvml)
    assert (product.name, product.known) == (name, True)
    assert (product.minimum_milliwatts // 1000, product.maximum_milliwatts // 1000) == limits_watts
    assert product.idle_milliwatts <= product.minimum_milliwatts
    assert product.source


def test_what_nvml_says_goes_before_the_catalogue():
    product = catalogue.product_of(
        "NVIDIA H100 80GB HBM3", minimum_milliwatts=250_000, maximum_milliwatts=650_000
    )
    assert (product.minimum_milliwatts, product.maximum_milliwatts) == (250_000, 650_000)


def test_an_unknown_product_is_what_nvml_says_and_draws_its_minimum_when_idle():
    product = catalogue.product_of(
        "NVIDIA X900", minimum_milliwatts=300_000, default_milliwatts=800_000, maximum_milliwatts=900_000
    )
    assert not product.known
    assert (product.maximum_milliwatts, product.idle_milliwatts) == (900_000, 300_000)
    assert catalogue.curve_of("NVIDIA X900", 70) == ()


def test_an_unknown_product_without_limits_claims_nothing():
    assert catalogue.product_of("NVIDIA X900").maximum_milliwatts == 0


@pytest.mark.parametrize(
    ("product", "gpus", "nameplate_watts"),
    [("NVIDIA H100 80GB HBM3", 8, 10_200), ("NVIDIA B200", 8, 14_300), ("NVIDIA A100-SXM4-80GB", 8, 6_500)],
)
def test_nameplates_of_known_systems(product, gpus, nameplate_watts):
    assert catalogue.nameplate(product, gpus).milliwatts == nameplate_watts * 1000


@pytest.mark.parametrize("row", catalogue_data.SYSTEMS, ids=lambda r: r.name)
def test_a_nameplate_covers_all_gpus_at_their_maximum_and_the_overhead(row):
    gpus = row.gpus * catalogue.product_of(row.product).maximum_milliwatts
    assert gpus < row.nameplate_watts * 1000
    over = catalogue.overhead(row.product, row.gpus)
    assert gpus + over.milliwatts == row.nameplate_watts * 1000
    assert over.source


def test_a_part_of_a_system_has_the_whole_systems_overhead():
    whole = catalogue.overhead("NVIDIA H100 80GB HBM3", 8)
    assert catalogue.overhead("NVIDIA H100 80GB HBM3", 3) == whole


def test_an_unknown_system_is_charged_at_twice_its_gpus():
    assert catalogue.nameplate("NVIDIA X900", 8, maximum_milliwatts=900_000).milliwatts == 14_400_000
    assert catalogue.nameplate("NVIDIA H100 80GB HBM3", 16).milliwatts == 22_400_000


@pytest.mark.parametrize("row", catalogue_data.PRODUCTS, ids=lambda r: r.name)
@pytest.mark.parametrize("billions", [1, 8, 70, 405, 2000])
def test_every_known_product_has_a_curve_for_every_size(row, billions):
    product = catalogue.product_of(" ".join(row.matches))
    hull = hull_of(
        catalogue.curve_of(" ".join(row.matches), billions),
        Requirement(),
        minimum_milliwatts=product.minimum_milliwatts,
        maximum_milliwatts=product.maximum_milliwatts,
    )
    assert hull.milliwatts[-1] <= product.maximum_milliwatts
    assert hull.tokens[-1] > 0


def test_every_figure_has_a_source():
    keys = {r.source for r in catalogue_data.PRODUCTS} | {r.source for r in catalogue_data.SYSTEMS}
    keys |= {catalogue_data.SERVING_SOURCE, catalogue_data.CAP_SHAPE_SOURCE, "idle", "bandwidth"}
    assert keys == set(catalogue_data.SOURCES)


def test_a_figure_without_a_public_source_says_so():
    assert "estimated" in catalogue.product_of("NVIDIA GB300").source
    assert "estimated" not in catalogue.product_of("NVIDIA H100 80GB HBM3").source
    assert catalogue.nameplate("NVIDIA GB200", 4).source.startswith("estimated")
    assert not catalogue.nameplate("NVIDIA B200", 8).source.startswith("estimated")
    known = {"minimum", "default", "maximum", "idle"}
    assert all(set(row.estimates) <= known for row in catalogue_data.PRODUCTS)


@pytest.mark.parametrize(("tray", "rack_watts"), [("GB200", 132_000), ("GB300", 142_000), ("Rubin", 230_000)])
def test_a_trays_nameplate_covers_its_part_of_the_rack(tray, rack_watts):
    row = next(row for row in catalogue_data.SYSTEMS if row.product == tray)
    assert 18 * row.nameplate_watts >= rack_watts - 3_600


def test_a_larger_model_stands_in_for_one_of_unknown_size_class():
    assert catalogue.curve_of("NVIDIA B200", 50) == catalogue.curve_of("NVIDIA B200", 70)


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("nvcr.io/nim/meta/llama-3.3-70b-instruct:1.8.0", 70),
        ("qwen3-235b-a22b", 235),
        ("llama-3.1-8b", 8),
        ("deepseek-r1", 0),
        ("gpt-oss-120b", 120),
    ],
)
def test_a_models_name_tells_its_size(model, billions):
    assert catalogue.billions_in(model) == billions


@pytest.mark.skipif(not MEASURED.exists(), reason="measured runs are not part of the product")
def test_the_catalogues_serving_figures_agree_with_the_measured_runs():
    with MEASURED.open() as file:
        rows = list(csv.DictReader(file))
    for serving in catalogue_data.SERVING:
        near = [
            float(r["output_throughput_tokens_per_sec"]) / int(r["num_gpus"])
            for r in rows
            if r["gpu_model"] == serving.product
            and int(r["num_gpus"]) == serving.gpus_per_replica
            and int(float(r["max_num_seqs"])) == serving.concurrency
        ]
        assert any(abs(n / serving.tokens_per_second - 1) < 0.01 for n in near), serving
