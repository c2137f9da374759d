"""The description of the API: each route, examples that are answered, and the page made of it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from serving import EchoEngine, served
from test_api import KEY
from test_structured_output import Service, service

from llava_ray.deployments.front import build_front
from llava_ray.deployments.gateway import LocalGateway
from llava_ray.deployments.http.api_description.docs_page import render_docs
from llava_ray.deployments.http.api_description.document import OPERATIONS, describe_api
from llava_ray.deployments.http.auth import ApiKey, digest
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.settings import ServeSettings

SETTINGS = ServeSettings.parsed({"model": "tiny@somewhere", "api_docs": True})
DOCUMENT = describe_api(SETTINGS, with_keys=False)


def front(*keys: ApiKey, **settings: object) -> Any:
    made = ServeSettings.parsed({"model": "tiny@somewhere", **settings})
    [source] = made.sources
    return build_front(Front(LocalGateway({source: Replica(EchoEngine("tiny"), source, made)}), made, keys))


def validate(value: Any, schema: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator({**schema, "components": DOCUMENT["components"]})
    validator.check_schema(schema)
    validator.validate(value)


def examples() -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Each path, the name of an example, the example, and the schema of the body."""
    for path, methods in DOCUMENT["paths"].items():
        body = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        for name, example in body.get("examples", {}).items():
            yield path, name, example["value"], body["schema"]


EXAMPLES = list(examples())


def test_every_route_is_described() -> None:
    app = front(api_docs=True)
    routes = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in app.routes
        for method in route.methods
        if route.path != "/v1/{path:path}"
    }
    assert routes == {(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert len(routes) == len(OPERATIONS)


def test_every_request_has_fields_and_an_example() -> None:
    bodies = {one.path for one in OPERATIONS if one.request is not None}
    assert {path for path, *_ in EXAMPLES} == bodies
    for operation in OPERATIONS:
        described = DOCUMENT["paths"][operation.path][operation.method]
        assert described["responses"]["200"]["content"]
        if operation.request is not None:
            name = described["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            assert DOCUMENT["components"]["schemas"][name]["properties"].keys() >= operation.request.model_fields.keys()


def test_all_references_lead_somewhere() -> None:
    def references(value: Any) -> Iterator[str]:
        for key, inner in (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        ):
            if key == "$ref":
                yield inner
            else:
                yield from references(inner)

    found = {name.removeprefix("#/components/schemas/") for name in references(DOCUMENT)}
    assert found <= DOCUMENT["components"]["schemas"].keys()
    identifiers = [one["operationId"] for methods in DOCUMENT["paths"].values() for one in methods.values()]
    assert len(set(identifiers)) == len(identifiers)
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(("path", "name", "value", "schema"), EXAMPLES, ids=[f"{one[0]} {one[1]}" for one in EXAMPLES])
def test_examples_are_valid_by_the_schema(path: str, name: str, value: Any, schema: dict[str, Any]) -> None:
    validate(value, schema)
    with pytest.raises(jsonschema.ValidationError):
        validate({**value, "frob": 1}, schema)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ("ChatRequest", {"model": "a", "messages": [{"role": "user", "content": "x"}], "user": "u", "stop": "a"}),
        ("ChatRequest", {"model": "a", "messages": [{"role": "user", "content": "x"}], "functions": [], "store": True}),
        ("ResponsesRequest", {"model": "a", "input": [{"role": "user", "content": "x"}], "store": False}),
        ("EmbeddingsRequest", {"model": "a", "input": [1, 2]}),
        ("EmbeddingsRequest", {"model": "a", "input": [[1], [2]]}),
    ],
)
def test_other_forms_are_valid_by_the_schema(schema: str, value: Any) -> None:
    validate(value, {"$ref": f"#/components/schemas/{schema}"})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("hermes"), "hermes") as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "name", "value"),
    [one[:3] for one in EXAMPLES if "lora" not in one[0]],
    ids=[f"{one[0]} {one[1]}" for one in EXAMPLES if "lora" not in one[0]],
)
def test_examples_are_answered(tiny: Service, path: str, name: str, value: Any) -> None:
    response = tiny.http.post(path, json=value)
    assert response.status_code == 200, response.text
    kind = response.headers["content-type"].partition(";")[0]
    schema = DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"][kind]["schema"]
    if kind == "application/json":
        validate(response.json(), schema)
    else:
        assert value["stream"]


@pytest.mark.slow
def test_adapters_are_loaded_by_the_examples(tmp_path: Path) -> None:
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "adapter_config.json").write_text("{}")
    (tmp_path / "birds" / "adapter_model.safetensors").write_bytes(b"")
    keys = (ApiKey("ops", digest(KEY)),)
    settings = {"admin_keys": "ops", "allowed_adapter_paths": str(tmp_path), "api_docs": True}
    with served(front(*keys, **settings)) as address:
        http = httpx.Client(base_url=address, headers={"authorization": f"Bearer {KEY}"})
        document = http.get("/openapi.json").json()
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            response = http.post(path, json=body["examples"]["adapter"]["value"])
            assert response.status_code == 200, response.text


@pytest.mark.slow
def test_the_other_routes_answer_by_their_schemas_and_keys_are_needed() -> None:
    with served(front(ApiKey("a", digest(KEY)), api_docs=True)) as address:
        document = httpx.get(f"{address}/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()
        for path, methods in document["paths"].items():
            [(method, described)] = methods.items()
            address_of = f"{address}{path.replace('{name}', 'tiny')}"
            refused = httpx.request(method.upper(), address_of)
            assert (refused.status_code == 401) == ("security" in described), path
            assert ("security" in described) == (path not in ("/health", "/ready"))
            if method == "get":
                response = httpx.get(address_of, headers={"authorization": f"Bearer {KEY}"})
                assert response.status_code == 200
                kind = response.headers["content-type"].partition(";")[0]
                schema = described["responses"]["200"]["content"][kind]["schema"]
                validate(response.json() if kind == "application/json" else response.text, schema)
            else:
                validate(refused.json(), {"$ref": "#/components/schemas/Error"})


@pytest.mark.slow
def test_there_is_no_description_unless_it_is_set() -> None:
    with served(front()) as address:
        for path in ("/docs", "/redoc", "/openapi.json"):
            response = httpx.get(f"{address}{path}")
            assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_path")
        assert httpx.get(f"{address}/v1/responses").status_code in (404, 405)


def test_the_page_needs_no_other_host_and_runs_nothing() -> None:
    page = render_docs(DOCUMENT)
    assert "<script" not in page
    assert not re.findall(r"(?:src|href)=\"(?!#)", page)
    for path, name, *_ in EXAMPLES:
        assert path in page
        assert f"Example: {name}" in page
    for anchor in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{anchor}"' in page
    hostile = ServeSettings.parsed({"model": "<script>alert(1)</script>@somewhere"})
    assert "<script" not in render_docs(describe_api(hostile, with_keys=True))
