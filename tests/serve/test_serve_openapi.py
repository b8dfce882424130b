"""The description of the API against the application that it describes."""

from __future__ import annotations

import pytest
from serving import language_model, served
from starlette.routing import Route

from pellucid.serve import ServedModel, build_app
from pellucid.serve.openapi import description
from pellucid.serve.schemas import CHAT, COMPLETION


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return ServedModel(language_model(tmp_path_factory.mktemp("bpe")), "tiny", fast=False)


def test_every_endpoint_is_described_with_its_method(engine):
    served_here = {
        (route.path, method.lower())
        for route in build_app([engine])._app.routes
        if isinstance(route, Route) and not route.path.startswith(("/api/", "/page/"))
        for method in (route.methods or set()) - {"HEAD"}
    }
    described = {
        (path, method)
        for path, methods in description(key=False)["paths"].items()
        for method in methods
    }
    assert served_here - described == {("/", "get"), ("/openapi.json", "get")}
    assert described <= served_here


def test_a_request_is_described_by_the_table_that_reads_it(engine):
    with served(engine) as client:
        found = client.get("/openapi.json").json()
    for path, fields in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        body = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert list(body["properties"]) == list(fields)
        assert body["additionalProperties"] is False
        assert body["required"] == [name for name, field in fields.items() if field.needed]
    assert found["components"]["schemas"]["Error"]
    assert "security" not in found
    assert description(key=True)["security"] == [{"key": []}]
