"""Who may talk to the page: requests that come from it, and on a network only with the token."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hmac import compare_digest
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from stableedit_cpp.studio.addresses import is_loopback

__all__ = ["Gate"]

_POLICY = (  # nothing is loaded from elsewhere, whatever a component would like
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
)


class Gate:
    """ASGI middleware in front of the page.

    Without a token only names of this machine are answered, so that no site of the internet can pass itself off as one
    (DNS rebinding). With one, it has to come as ``?token=`` once, which a cookie then stands for, or in a header
    ``Authorization: Bearer``. What a page of another origin sends is refused in both cases.

    Args:
        token: None on loopback. port: of the server; cookies of several on one machine are told apart by it.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], *, token: str | None, port: int) -> None:
        self.app, self.token, self.cookie = app, token, f"stableedit-studio-{port}"

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        answer = self._answer(HTTPConnection(scope))
        if answer is not None:
            await answer(scope, receive, send)
            return

        async def send_with_policy(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)

    def _answer(self, asked: HTTPConnection) -> Response | None:
        """What to say instead of the page; None lets the request in."""
        host, origin = asked.headers.get("host", ""), asked.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return PlainTextResponse("this studio answers its own page only\n", 403)
        if self.token is None:
            if is_loopback(urlsplit(f"//{host}").hostname or ""):
                return None
            return PlainTextResponse("this studio is for its own machine; start it with --host to share it\n", 403)
        given = asked.query_params.get("token")
        if given is not None and self._fits(given):
            rest = urlencode([pair for pair in parse_qsl(asked.url.query) if pair[0] != "token"])
            found = RedirectResponse(asked.url.path + (f"?{rest}" if rest else ""), 303)
            found.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
            return found
        kind, _, sent = asked.headers.get("authorization", "").partition(" ")
        if self._fits(asked.cookies.get(self.cookie, "")) or (kind.lower() == "bearer" and self._fits(sent)):
            return None
        return PlainTextResponse("open the address that `stableedit studio` printed, with its ?token=\n", 401)

    def _fits(self, token: str) -> bool:
        return compare_digest(token.encode(), (self.token or "").encode())
