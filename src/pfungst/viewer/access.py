"""Who may ask the viewer: the page itself, in a browser on this machine that was given the address's token.

Any web page can send requests to 127.0.0.1, and any name can be made to point there.  So every request needs the token,
a Host that is this machine, and, where something is written, an Origin that is the page's own.  What is answered may
load nothing from elsewhere (content security policy), and no request may be larger than it has to be.
"""

from __future__ import annotations

import hashlib
import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 8 << 20  # of a request; the rows of a selection of a million samples fit
_LOCAL = ("127.0.0.1", "localhost", "::1")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def cookie_name(token: str) -> str:
    """Cookies of one machine are shared by all ports; two viewers must not share one."""
    return f"pfungst-{hashlib.sha256(token.encode()).hexdigest()[:8]}"


class TooLarge(Exception):
    """A request's body is longer than ``MOST_BYTES``."""


class Guarded:
    """The application, behind these checks."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or say why not."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self.refuse(scope)
        if refusal is not None:
            await refusal(scope, receive, answer)
            return
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MOST_BYTES:
                raise TooLarge
            return message

        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await answer(message)

        try:
            await self.app(scope, bounded, watch)
        except TooLarge:
            if not started:
                await _refusal(413, "the request is too large")(scope, receive, answer)

    def refuse(self, scope: Scope) -> Response | None:
        """Why this request is not answered; None if it is."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name not in _LOCAL:
            return _refusal(400, f"{host!r} is not this machine")
        if not self._knows_token(scope, headers):
            return _refusal(403, "the token is missing or wrong: open the address that `pfungst view` printed")
        origin = headers.get("origin")
        site = headers.get("sec-fetch-site", "same-origin")
        page = scope["method"] == "GET" and scope["path"] == "/"  # may be followed from anywhere, with the token
        foreign = (origin is not None and urlsplit(origin).netloc != host) or site not in ("same-origin", "none")
        if foreign and not page:
            return _refusal(403, "another site's page asks")
        if scope["method"] not in ("GET", "HEAD") and origin is None and "authorization" not in headers:
            return _refusal(403, "a request that writes has to say where it comes from (Origin)")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return _refusal(413, "the request is too large")
        return None

    def _knows_token(self, scope: Scope, headers: Headers) -> bool:
        given = []
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given.append(bearer)
        if scope["path"] == "/":
            given += parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(cookie_name(self.token))
        except CookieError:
            cookie = None
        if cookie is not None:
            given.append(cookie.value)
        return any(hmac.compare_digest(one.encode(), self.token.encode()) for one in given)


def _refusal(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status)
