"""Certificates say who one is, literally."""

import subprocess
from pathlib import Path

import pytest

from tokenfactory.twin.pki import Authority, PkiError


def subject(certificate: Path) -> str:
    shown = subprocess.run(
        [
            "openssl",
            "x509",
            "-in",
            str(certificate),
            "-noout",
            "-subject",
            "-nameopt",
            "multiline,utf8,-esc_msb",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return shown.stdout


@pytest.mark.parametrize(
    "name",
    [
        "alice",
        "system:node:n1",
        "a b",
        "a,O=system:masters",
        "a/O=system:masters",
        "$ENV::HOME",
        'q"uote',
        "ünï",
        "#x",
    ],
)
def test_names_are_taken_literally(name: str, tmp_path: Path):
    pair = Authority(tmp_path).client("it", name, ("ops",))
    lines = [line.strip() for line in subject(pair.certificate).splitlines()[1:]]
    assert lines == ["organizationName          = ops", f"commonName                = {name}"]


@pytest.mark.parametrize("name", ["", "two\nlines"])
def test_what_is_not_a_name_is_refused(name: str, tmp_path: Path):
    with pytest.raises(PkiError, match="cannot be a user or a group"):
        Authority(tmp_path).client("it", name)


def test_certificates_are_made_once_and_keys_are_private(tmp_path: Path):
    first = Authority(tmp_path).client("it", "alice")
    made = first.certificate.read_bytes()
    assert Authority(tmp_path).client("it", "alice").certificate.read_bytes() == made
    assert first.key.stat().st_mode & 0o077 == 0


def test_a_server_that_must_be_good_for_more_names_gets_another_certificate(tmp_path: Path):
    authority = Authority(tmp_path)
    one = authority.server("api", ("localhost",), ("127.0.0.1",))
    more = authority.server("api", ("localhost",), ("127.0.0.1", "10.0.0.1"))
    assert one.certificate != more.certificate


def test_without_openssl_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PkiError, match="openssl is not on PATH: install it"):
        Authority(tmp_path / "pki")
