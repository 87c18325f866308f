"""The page on a port: in a thread of its own, until it is closed."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from urllib.parse import quote

from stableedit_cpp.studio.addresses import is_loopback
from stableedit_cpp.studio.desk import Desk

__all__ = ["check_packages", "serving"]


def check_packages() -> None:
    """
    Raises:
        ValueError: if a package that makes the page is not installed.
    """
    missing = [name for name in ("gradio", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the studio needs {' and '.join(missing)}: pip install 'stableedit-cpp[studio]'")


@contextmanager
def serving(desk: Desk, at: socket.socket, token: str | None) -> Iterator[str]:
    """Serve the page of a desk within this context; yields its address, with the token. What was uploaded is gone
    afterwards.

    Args:
        token: that visitors need; None only on loopback.

    Raises:
        ValueError: where a network has no token.
    """
    host, port = at.getsockname()[:2]
    if token is None and not is_loopback(host):
        raise ValueError(f"{host} can be reached from elsewhere; that needs a token")
    with TemporaryDirectory(prefix="stableedit-studio-") as scratch:
        # Read by gradio: where uploads lie; and it asks nobody whether it is the newest, and tells nobody of its use.
        os.environ |= {"GRADIO_TEMP_DIR": scratch, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        server = _server(desk, host, port, token)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]}, name="stableedit-page", daemon=True)
        thread.start()
        try:
            yield _address(host, port, token)
        finally:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # tabs that are still open are no error
            server.should_exit = True
            thread.join(5)


def _server(desk: Desk, host: str, port: int, token: str | None):
    """The page behind its gate, as a server that was not started yet."""
    import gradio
    import uvicorn
    from fastapi import FastAPI

    from stableedit_cpp.studio.gate import Gate
    from stableedit_cpp.studio.page import CSS, make_page, make_theme

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    how = {"footer_links": [], "run_history": False, "ssr_mode": False, "mcp_server": False, "pwa": False}
    how |= {"theme": make_theme(), "css": CSS, "server_name": host, "server_port": port}
    app = gradio.mount_gradio_app(app, make_page(desk), path="/", **how)
    # Tabs keep connections open for as long as they like.
    how = {"log_level": "warning", "timeout_graceful_shutdown": 1, "ws": "none"}
    return uvicorn.Server(uvicorn.Config(Gate(app, token=token, port=port), **how))


def _address(host: str, port: int, token: str | None) -> str:
    """What to open, on this machine or where its name is known."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"?token={quote(token)}" if token else "")
