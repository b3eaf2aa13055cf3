"""Certificates for a cluster on loopback, made with the openssl program.

Python's standard library cannot make a certificate, and a dependency for a dozen of them is not worth
it: openssl is wherever certificates are. Keys are P-256: making one takes a millisecond.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_DAYS = "825"


class PkiError(RuntimeError):
    """No certificate could be made. The text says why."""


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """One certificate authority in a folder, and what it has signed. Made once, then reused."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        self.ca = Pair(folder / "ca.crt", folder / "ca.key")
        if not self.ca.certificate.exists():
            self._make_ca()

    def client(self, name: str, user: str, groups: tuple[str, ...] = ()) -> Pair:
        """A client certificate: the API server reads the user from CN and the groups from O."""
        subject = [f"{index}.O = {_value(group)}" for index, group in enumerate(groups)]
        subject.append(f"CN = {_value(user)}")
        return self._sign(name, subject, "extendedKeyUsage = clientAuth")

    def server(self, name: str, hosts: tuple[str, ...], addresses: tuple[str, ...]) -> Pair:
        """A certificate for both ends of a connection: etcd's own client uses its server's.

        Good for other names than the last time, it is another certificate.
        """
        names = [f"DNS:{host}" for host in hosts] + [f"IP:{address}" for address in addresses]
        extensions = f"subjectAltName = {','.join(names)}\nextendedKeyUsage = serverAuth, clientAuth"
        file = f"{name}-{hashlib.sha256(extensions.encode()).hexdigest()[:8]}"
        return self._sign(file, [f"CN = {_value(name)}"], extensions)

    def signing_key(self, name: str) -> Pair:
        """A key pair for service account tokens; `certificate` is the bare public key."""
        pair = Pair(self.folder / f"{name}.pub", self.folder / f"{name}.key")
        if not pair.certificate.exists():
            _make_key(pair.key)
            public = _openssl("ec", "-in", str(pair.key), "-pubout")
            _write(pair.certificate, public)
        return pair

    def _make_ca(self) -> None:
        _make_key(self.ca.key)
        config = self.folder / "ca.cnf"
        config.write_text(
            "[req]\nprompt = no\ndistinguished_name = dn\nx509_extensions = ext\n"
            "[dn]\nCN = tokenfactory-twin\n"
            "[ext]\nbasicConstraints = critical, CA:true\nkeyUsage = critical, keyCertSign, cRLSign\n"
            "subjectKeyIdentifier = hash\n"
        )
        made = _openssl(
            *("req", "-x509", "-new", "-config", str(config), "-key", str(self.ca.key)),
            *("-sha256", "-days", _DAYS),
        )
        _write(self.ca.certificate, made)

    def _sign(self, name: str, subject: list[str], extensions: str) -> Pair:
        pair = Pair(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        if pair.certificate.exists():
            return pair
        _make_key(pair.key)
        config = self.folder / f"{name}.cnf"
        config.write_text(
            "utf8 = yes\n[req]\nprompt = no\nutf8 = yes\nstring_mask = utf8only\ndistinguished_name = dn\n[dn]\n"
            + "\n".join(subject)
            + f"\n[ext]\nkeyUsage = critical, digitalSignature\n{extensions}\n"
        )
        request = _openssl("req", "-new", "-config", str(config), "-key", str(pair.key))
        signed = _openssl(
            *("x509", "-req", "-CA", str(self.ca.certificate), "-CAkey", str(self.ca.key)),
            *(
                "-set_serial",
                f"0x{secrets.token_hex(15)}",
                "-sha256",
                "-days",
                _DAYS,
                "-extfile",
                str(config),
                "-extensions",
                "ext",
            ),
            given=request,
        )
        _write(pair.certificate, signed)
        return pair


def _value(text: str) -> str:
    """A value as openssl's configuration takes it: nothing in it is syntax."""
    if "\n" in text or not text:
        raise PkiError(f"{text!r} cannot be a user or a group: give a non-empty name of one line")
    return "".join(f"\\{char}" if char in "\\#$\"'`;" else char for char in text)


def _make_key(path: Path) -> None:
    _write(path, _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout"))


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a certificate that exists is taken to be good."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.touch(mode=0o600)
    partial.write_text(text)
    partial.rename(path)


def _openssl(*arguments: str, given: str | None = None) -> str:
    program = shutil.which("openssl")
    if program is None:
        raise PkiError("openssl is not on PATH: install it (Debian: apt-get install openssl) and try again")
    done = subprocess.run([program, *arguments], input=given, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PkiError(f"`openssl {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout
