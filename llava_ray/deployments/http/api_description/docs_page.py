"""The routes of the description, and its page: HTML without scripts, fonts or other hosts."""

import html
import json
import re
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response

from llava_ray.deployments.http.api_description.document import describe_api

if TYPE_CHECKING:
    from llava_ray.deployments.http.routes import Front

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h2{margin-top:2.5rem;border-top:1px solid #ccc;padding-top:1rem}code,pre{font:13px/1.45 ui-monospace,monospace}
pre{background:#f4f4f4;padding:.7rem;overflow:auto;white-space:pre-wrap;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.25rem .6rem .25rem 0;
border-bottom:1px solid #eee}summary{cursor:pointer}.method{color:#666;text-transform:uppercase}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#161616}pre{background:#232323}td,th{border-color:#333}}
"""
_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def add_docs(app: FastAPI, front: "Front") -> None:
    """Add the routes; the document does not change while the service runs."""
    document = describe_api(front.settings, with_keys=bool(front.keys))
    page = render_docs(document)

    async def describe() -> Response:
        return JSONResponse(document)

    async def show() -> Response:
        return HTMLResponse(page, headers=_HEADERS)

    app.add_api_route("/openapi.json", describe, methods=["GET"], response_model=None)
    app.add_api_route("/docs", show, methods=["GET"], response_model=None)
    app.add_api_route("/redoc", show, methods=["GET"], response_model=None)


def render_docs(document: Mapping[str, Any]) -> str:
    """Render an OpenAPI document as a page."""
    schemas = document["components"]["schemas"]
    operations = [(path, method, one) for path, methods in document["paths"].items() for method, one in methods.items()]
    links = "".join(
        f'<li><a href="#{_escape(one["operationId"])}"><code>{_escape(path)}</code></a> {_escape(one["summary"])}</li>'
        for path, _, one in operations
    )
    parts = "".join(_render_operation(path, method, one, schemas) for path, method, one in operations)
    named = "".join(
        f'<h3 id="{_escape(name)}">{_escape(name)}</h3>{_render_schema(schema)}' for name, schema in schemas.items()
    )
    info = document["info"]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_escape(info["title"])}: API</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>{_escape(info['title'])}</h1><p>{_escape(info['description'])} "
        f"{_escape(info['version'])}; as <code>/openapi.json</code> for programs.</p><ul>{links}</ul>{parts}"
        f"<h2>Schemas</h2>{named}</body></html>"
    )


def _render_operation(path: str, method: str, one: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    """Render one route: its fields, examples and responses."""
    head = f'<h2 id="{_escape(one["operationId"])}"><span class="method">{method}</span> <code>{_escape(path)}</code>'
    text = f"{head}</h2><p>{_escape(one['summary'])}.{' Needs an API key.' if one.get('security') else ''}</p>"
    if "requestBody" in one:
        body = one["requestBody"]["content"]["application/json"]
        text += _render_schema(schemas[body["schema"]["$ref"].rpartition("/")[2]])
        for name, example in body.get("examples", {}).items():
            text += f"<p>Example: {_escape(name)}</p>{_code(_curl(path, example['value'], bool(one.get('security'))))}"
    for status, response in one["responses"].items():
        for kind, content in response["content"].items():
            text += f"<p>{_escape(status)}: <code>{_escape(kind)}</code> {_type_of(content['schema'])}</p>"
    return text


def _curl(path: str, body: Any, with_key: bool) -> str:
    key = ' -H "Authorization: Bearer $KEY"' if with_key else ""
    data = shlex.quote(json.dumps(body, indent=2, ensure_ascii=False))
    return f"curl http://127.0.0.1:8000{path}{key} -H 'Content-Type: application/json' -d {data}"


def _render_schema(schema: Mapping[str, Any]) -> str:
    """Render an object's fields as a table, any other schema by its type."""
    text = f"<p>{_prose(schema['description'])}</p>" if schema.get("description") else ""
    if not schema.get("properties"):
        return f"{text}<p>{_type_of(schema)}</p>"
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{_escape(name)}</code>{' (required)' if name in required else ''}</td>"
        f"<td>{_type_of(field)}</td><td>{_prose(field.get('description', ''))}</td></tr>"
        for name, field in schema["properties"].items()
    )
    return f"{text}<table><tr><th>Field</th><th>Type</th><th></th></tr>{rows}</table>"


def _type_of(schema: Mapping[str, Any]) -> str:
    """Return a schema's type as a few words of HTML."""
    if "$ref" in schema:
        name = _escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(map(_type_of, schema[several]))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"<code>{_escape(json.dumps(value))}</code>" for value in values)
    if schema.get("type") == "array":
        return f"list of {_type_of(schema.get('items', {}))}"
    kind = _escape(schema.get("type", "any"))
    return f"{kind}, default <code>{_escape(json.dumps(schema['default']))}</code>" if "default" in schema else kind


def _code(text: str) -> str:
    return f"<pre>{_escape(text)}</pre>"


def _prose(text: str) -> str:
    """Escape a text with words of code between two backticks each."""
    return re.sub(r"``(.+?)``", r"<code>\1</code>", _escape(text))


def _escape(text: object) -> str:
    return html.escape(str(text))
