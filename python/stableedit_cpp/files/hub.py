"""Whether the Hugging Face hub answers: found out once, in seconds, before libraries try it again and again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

__all__ = ["HUB_TIMEOUT", "offline_where_silent", "why_hub_is_silent"]

HUB_TIMEOUT = 4.0  # seconds, for the hub to answer


def why_hub_is_silent() -> str | None:
    """The reason why the hub cannot be reached; None where it answers."""
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception as error:  # of the HTTP library, which is one or another
        return f"the hub cannot be reached ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


@contextmanager
def offline_where_silent() -> Iterator[str | None]:
    """Where the hub is silent let its libraries look into their caches only, instead of trying it for most of a minute
    for each file; yields the reason, None where it answers."""
    reason = why_hub_is_silent()
    switches = []
    if reason is not None:
        import huggingface_hub

        switches.append(huggingface_hub.constants)
        if find_spec("datasets") is not None:
            import datasets

            switches.append(datasets.config)
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    try:
        for switch in switches:
            switch.HF_HUB_OFFLINE = True
        yield reason
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value
