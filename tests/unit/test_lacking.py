"""A test that lacks a package is skipped for a person, and fails where everything must be there."""

import pytest
from tests.lacking import VARIABLES, lacking


@pytest.mark.parametrize("value", ["", "false", "0"])
def test_a_person_has_it_skipped_with_the_reason(monkeypatch, value):
    for name in VARIABLES:
        monkeypatch.setenv(name, value)
    with pytest.raises(pytest.skip.Exception, match="no containerd"):
        lacking("no containerd")


@pytest.mark.parametrize("name", VARIABLES)
def test_ci_has_it_fail_with_the_reason(monkeypatch, name):
    for each in VARIABLES:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "true")
    with pytest.raises(pytest.fail.Exception, match=f"no containerd\n{name} is set"):
        lacking("no containerd")
