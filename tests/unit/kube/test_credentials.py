"""Tokens and certificates are renewed in their files while we run."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec
import pytest
from kubernetes.aio.config import ConfigException, incluster_config

from tokenfactory.kube.credentials import (
    REREAD_SECONDS,
    Credentials,
    default_loader,
    from_kubeconfig,
    in_cluster,
)


@pytest.fixture
def token(tmp_path) -> Path:
    file = tmp_path / "token"
    file.write_text("one\n")
    return file


@pytest.fixture
def kubeconfig(tmp_path, token) -> Path:
    path = tmp_path / "kubeconfig"
    named = {
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": {"tokenFile": str(token)}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_bytes(msgspec.json.encode(named))
    return path


@pytest.fixture
def pod(tmp_path, token, monkeypatch) -> Path:
    """As Kubernetes mounts a service account."""
    authority = tmp_path / "ca.crt"
    authority.write_text("an authority")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(authority))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    return authority


async def test_a_pods_token_comes_without_its_newline(pod):
    credentials = await Credentials.read(default_loader())
    assert await credentials.current() == "bearer one"
    assert credentials.configuration.host == "https://10.0.0.1:443"


async def test_a_named_kubeconfig_counts_more_than_the_pod(pod, kubeconfig):
    credentials = await Credentials.read(default_loader(kubeconfig))
    assert credentials.configuration.host == "http://127.0.0.1:1"


@pytest.mark.parametrize("where", ["pod", "kubeconfig"])
async def test_a_new_token_is_read_every_minute_and_when_refused(where, pod, kubeconfig, token):
    load = in_cluster() if where == "pod" else from_kubeconfig(kubeconfig)
    now = 0.0
    credentials = Credentials(load, await load(), clock=lambda: now)
    token.write_text("two")
    assert (await credentials.current()).split()[1] == "one"
    now = REREAD_SECONDS
    assert (await credentials.current()).split()[1] == "two"
    token.write_text("three")
    await credentials.refresh(credentials.authorization)
    assert (await credentials.current()).split()[1] == "three"


async def test_many_refusals_read_the_source_once(kubeconfig, token):
    reads = 0
    load = from_kubeconfig(kubeconfig)

    async def counted():
        nonlocal reads
        reads += 1
        return await load()

    credentials = await Credentials.read(counted)
    token.write_text("two")
    refused = credentials.authorization
    await asyncio.gather(*(credentials.refresh(refused) for _ in range(20)))
    assert reads == 2
    assert credentials.authorization == "Bearer two"


async def test_while_the_source_is_being_replaced_the_old_one_serves(pod, token):
    credentials = await Credentials.read(in_cluster())
    token.write_text("")
    await credentials.refresh(credentials.authorization)
    assert credentials.authorization == "bearer one"
    token.unlink()
    await credentials.refresh(credentials.authorization)
    assert credentials.authorization == "bearer one"


async def test_a_renewed_authority_makes_a_new_session(pod):
    credentials = await Credentials.read(in_cluster())
    before = credentials.identity
    await credentials.refresh(credentials.authorization)
    assert credentials.identity == before
    os.utime(pod, (1, 1))
    await credentials.refresh(credentials.authorization)
    assert credentials.identity != before


async def test_nothing_to_read_at_the_start_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigException):
        await Credentials.read(default_loader(tmp_path / "missing"))
