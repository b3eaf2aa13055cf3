"""Containers that restart pass the gate: asked of a real API server, and of ones that do not know how."""

import asyncio
import json

import msgspec
import pytest
from tests.unit.controller.test_workloads import OPTIONS, factory

from tokenfactory.controller.main import restarts_through_gate
from tokenfactory.controller.objects import Deployment
from tokenfactory.controller.workloads import RESTART_PROBE, deployment, is_as
from tokenfactory.kube.client import Client
from tokenfactory.kube.errors import ApiError, Status

pytestmark = pytest.mark.cluster


async def test_this_api_server_knows_and_says_back_all_that_we_want(cluster, namespace):
    made = factory()
    able = msgspec.structs.replace(OPTIONS, restart_through_gate=True)
    wanted = deployment(made, made.spec.models[0], 1, able)
    wanted["metadata"]["namespace"] = namespace
    async with await Client.connect(cluster.kubeconfig) as client:
        assert await restarts_through_gate(client, namespace)
        answer = await client.request(
            "POST",
            f"/apis/apps/v1/namespaces/{namespace}/deployments",
            query={"dryRun": "All"},
            body=wanted,
        )
    assert is_as(msgspec.json.decode(answer, type=Deployment), wanted), "else it would be applied for ever"
    told = await asyncio.to_thread(cluster.kubectl, "get", "deployments", "-n", namespace, "-o", "name")
    assert told.stdout == "", "asking leaves nothing behind"


class Older:
    """An API server that drops what it does not know, or refuses it."""

    def __init__(self, error: ApiError | None = None) -> None:
        self.error = error

    async def request(self, *_: object, **__: object) -> bytes:
        if self.error is not None:
            raise self.error
        answer = json.loads(json.dumps(RESTART_PROBE))
        del answer["spec"]["template"]["spec"]["containers"][0]["restartPolicyRules"]
        return json.dumps(answer).encode()


async def test_of_an_older_one_nothing_is_wanted_that_it_cannot_do():
    assert not await restarts_through_gate(Older(), "default")
    refused = ApiError("POST", Status(code=422, reason="Invalid", message="may not be set"))
    assert not await restarts_through_gate(Older(refused), "default")
