"""The viewer's calls: one table from which routes, checks of what is asked, and the OpenAPI description are made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pfungst.errors import DataError, PfungstError, RunError
from pfungst.judgements import ANSWERS, WITHDRAWN

WORDS: dict[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array"}


class Refused(Exception):
    """What is asked is not as the call wants it: a status of HTTP and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Field:
    """One thing that a call takes, in its path, its query or its body.

    default  where it may be left out; None: it must be there
    choices  the values that it may have
    low, high  of numbers; of texts and lists, how long they may be
    items    of a list, what it is of
    """

    kind: type
    default: Any = None
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    items: type = float

    def read(self, name: str, value: Any) -> Any:
        """The value, checked.  Raises Refused."""
        if value is None:
            if self.default is None:
                raise Refused(422, f"{name} is missing")
            return self.default
        if self.kind in (int, float) and isinstance(value, str):
            try:
                value = self.kind(value)
            except ValueError:
                raise Refused(422, f"{name}: {value!r} is no {WORDS[self.kind]}") from None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and value == value if self.kind is float else type(value) is self.kind):  # not a nan
            raise Refused(422, f"{name} is to be a {WORDS[self.kind]}")
        if self.choices and value not in self.choices:
            raise Refused(422, f"{name} is to be one of {', '.join(map(str, self.choices))}")
        size = len(value) if isinstance(value, str | list) else value
        if (self.low is not None and size < self.low) or (self.high is not None and size > self.high):
            raise Refused(422, f"{name} is out of range: {self.low} to {self.high}")
        if self.kind is list:
            kinds = (int, float) if self.items is float else (self.items,)
            if not all(type(one) in kinds and one == one for one in value):
                raise Refused(422, f"{name} is to be a list of {WORDS[self.items]}s")
        return value

    def describe(self) -> dict[str, Any]:
        """Its JSON schema."""
        schema: dict[str, Any] = {"type": WORDS[self.kind]}
        ends = {int: ("minimum", "maximum"), float: ("minimum", "maximum"), str: ("minLength", "maxLength"),
                list: ("minItems", "maxItems")}.get(self.kind, ("", ""))  # fmt: skip
        for end, value in zip(ends, (self.low, self.high), strict=True):
            if end and value is not None:
                schema[end] = value
        if self.choices:
            schema["enum"] = list(self.choices)
        if self.default is not None:
            schema["default"] = self.default
        if self.kind is list:
            schema["items"] = {"type": WORDS[self.items]}
        return schema


# What somebody says of a finding.
SAID = {"answer": Field(str, choices=(*ANSWERS, WITHDRAWN)), "note": Field(str, "", high=10_000)}


@dataclass(frozen=True)
class Call:
    """One call.

    answer   takes what was asked, by name, and returns a Response, or what is sent as JSON; runs in a thread
    returns  media type of the answer
    """

    method: str
    path: str
    summary: str
    answer: Callable[..., Any]
    inside: Mapping[str, Field] = field(default_factory=dict)
    query: Mapping[str, Field] = field(default_factory=dict)
    body: Mapping[str, Field] = field(default_factory=dict)
    returns: str = "application/json"

    def route(self) -> Route:
        """Its route."""

        async def endpoint(request: Request) -> Response:
            try:
                asked = await self._read(request)
                found = await run_in_threadpool(self.answer, **asked)
            except Refused as refusal:
                return JSONResponse({"error": str(refusal)}, refusal.status)
            except (RunError, DataError) as error:
                return JSONResponse({"error": str(error)}, 404)
            except PfungstError as error:
                return JSONResponse({"error": str(error)}, 422)
            return found if isinstance(found, Response) else JSONResponse(found)

        return Route(self.path, endpoint, methods=[self.method])

    async def _read(self, request: Request) -> dict[str, Any]:
        asked = {name: one.read(name, request.path_params.get(name)) for name, one in self.inside.items()}
        asked |= {name: one.read(name, request.query_params.get(name)) for name, one in self.query.items()}
        if unknown := set(request.query_params) - set(self.query):
            raise Refused(422, f"unknown: {', '.join(sorted(unknown))}")
        if not self.body:
            return asked
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the body is to be JSON")
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError):
            raise Refused(400, "the body is no JSON") from None
        if not isinstance(body, dict):
            raise Refused(422, "the body is to be an object")
        if unknown := set(body) - set(self.body):
            raise Refused(422, f"unknown: {', '.join(sorted(unknown))}")
        return asked | {name: one.read(name, body.get(name)) for name, one in self.body.items()}

    def describe(self) -> dict[str, Any]:
        """Its operation in an OpenAPI description."""
        parameters = [
            {"name": name, "in": place, "required": place == "path" or one.default is None, "schema": one.describe()}
            for place, fields in (("path", self.inside), ("query", self.query))
            for name, one in fields.items()
        ]
        wrong = {"description": "why not", "content": {"application/json": {"schema": {"type": "object"}}}}
        operation: dict[str, Any] = {
            "summary": self.summary,
            "parameters": parameters,
            "responses": {
                "200": {"description": "the answer", "content": {self.returns: {}}},
                **dict.fromkeys(("400", "403", "404", "409", "413", "415", "422"), wrong),
            },
        }
        if self.body:
            schema = {
                "type": "object",
                "properties": {name: one.describe() for name, one in self.body.items()},
                "required": [name for name, one in self.body.items() if one.default is None],
                "additionalProperties": False,
            }
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        return operation


def describe_calls(calls: list[Call], version: str) -> dict[str, Any]:
    """The OpenAPI description of these calls."""
    paths: dict[str, Any] = {}
    for call in calls:
        path = call.path
        for kind in (":int", ":path"):
            path = path.replace(kind, "")
        paths.setdefault(path, {})[call.method.lower()] = call.describe()
    return {"openapi": "3.1.0", "info": {"title": "pfungst view", "version": version}, "paths": paths}
