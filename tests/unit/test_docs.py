"""What the pages name is there: folders, modules, files behind links, make targets and alerts."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "operator" / "tokenfactory"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_finds_it(page: Path):
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_make_target_that_a_page_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target
        for page in PAGES
        for target in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE)
    }
    assert {"demo", "test"} <= named
    assert named <= targets


def test_the_architecture_names_every_room_and_no_other():
    table = (ROOT / "docs" / "architecture.md").read_text().partition("| folder |")[2].partition("\n\n")[0]
    named = {
        name
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(.+?)`", row)
    }
    rooms = {path.parent for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE}
    inside = {path for path in rooms if path.parent != PACKAGE and path.parent.name != "planning"}
    expected = {str(path.relative_to(PACKAGE)) for path in rooms - inside} - {"planning"}
    assert named == expected


def test_the_plan_names_no_part_that_is_not_there():
    plan = PACKAGE / "controller" / "plan"
    text = (plan / "__init__.py").read_text()
    parts = {path.stem for path in plan.glob("*.py")} - {"__init__"}
    assert set(re.findall(r"`(\w+)`", text)) - {"compose"} <= parts


def test_alerts_and_runbooks_are_one_to_one():
    rules = [yaml.safe_load(file.read_text()) for file in ROOT.glob("charts/tokenfactory/files/rules/*.yaml")]
    alerts = {
        rule["alert"]
        for file in rules
        for group in file["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }
    assert alerts == {page.stem for page in (ROOT / "docs" / "runbooks").glob("*.md")}
