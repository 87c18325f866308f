"""Who is let in to the page, asked of the middleware itself."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("starlette", reason="the studio needs the extra 'studio'")

from stableedit_cpp.studio.gate import Gate

TOKEN = "a-long-secret"


def answer(token: str | None, *, path: str = "/", query: str = "", **headers: str) -> tuple[int, dict[str, str]]:
    """Status and headers."""
    sent = []

    async def page(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"the page"})

    async def send(message) -> None:
        sent.append(message)

    named = {"host": "127.0.0.1:7860"} | headers
    scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode(), "scheme": "http"}
    scope |= {"headers": [(name.encode(), value.encode()) for name, value in named.items()], "root_path": ""}
    scope |= {"server": ("127.0.0.1", 7860)}
    asyncio.run(Gate(page, token=token, port=7860)(scope, None, send))
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860"])
def test_this_machine_is_let_in_and_loads_nothing_from_elsewhere(host):
    status, headers = answer(None, host=host)
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert "http" not in headers["content-security-policy"]


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:8000"},
        {"origin": "null"},
    ],
)
def test_other_sites_are_refused(headers):
    assert answer(None, **headers)[0] == 403


def test_its_own_page_is_let_in():
    assert answer(None, origin="http://127.0.0.1:7860")[0] == 200


def test_a_network_needs_the_token():
    asked = {"host": "studio.example:7860"}
    assert answer(TOKEN, **asked)[0] == 401
    for wrong in ("", "a-long-secre", "a-long-secret-", "ä"):
        assert answer(TOKEN, query=f"token={wrong}", **asked)[0] == 401
        assert answer(TOKEN, authorization="Bearer " + wrong.replace("ä", "x"), **asked)[0] == 401
    assert answer(TOKEN, authorization=f"Bearer {TOKEN}", **asked)[0] == 200
    assert answer(TOKEN, authorization=f"Bearer {TOKEN}", origin="http://evil.example", **asked)[0] == 403
    status, headers = answer(TOKEN, path="/x", query=f"a=1&token={TOKEN}", **asked)
    assert (status, headers["location"]) == (303, "/x?a=1")
    cookie = headers["set-cookie"]
    assert "httponly" in cookie.lower()
    assert "samesite=strict" in cookie.lower()
    assert answer(TOKEN, cookie=cookie.split(";")[0], **asked)[0] == 200
    assert answer(TOKEN, cookie="stableedit-studio-7860=other", **asked)[0] == 401
