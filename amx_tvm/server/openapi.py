"""The description of the interface, /openapi.json: bodies from the types of protocol.py."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from amx_tvm.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from amx_tvm.server.response_request import ResponseRequest
from amx_tvm.version import __version__

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_POSTS: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/completions": (CompletionRequest, "Continue a text"),
    "/v1/chat/completions": (ChatRequest, "Answer a conversation"),
    "/v1/responses": (ResponseRequest, "Answer a conversation, as items"),
    "/v1/embeddings": (EmbeddingRequest, "Vectors of texts, by a model that makes them"),
    "/tokenize": (TokenizeRequest, "Token ids of a text or of a conversation"),
    "/detokenize": (DetokenizeRequest, "The text of token ids"),
}
_GETS = {
    "/v1/models": "The model that is served, and its other names",
    "/health": "Whether requests are taken",
    "/metrics": "Counters for Prometheus",
}


@cache
def document() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document."""
    kinds = [(kind, "validation") for kind, _ in _POSTS.values()]
    _, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    components = {**schemas["$defs"], "Error": _ERROR}
    paths: dict[str, Any] = {
        path: {"get": {"summary": summary, "responses": _responses()}}
        for path, summary in _GETS.items()
    }
    for path, (kind, summary) in _POSTS.items():
        body = {"$ref": f"#/components/schemas/{kind.__name__}"}
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": body}},
                },
                "responses": _responses(),
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "amx_tvm", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _responses() -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "200": {"description": "The answer"},
        "4XX": {"description": "The request is wrong; the error says how", "content": error},
        "5XX": {"description": "The server can't answer", "content": error},
    }
