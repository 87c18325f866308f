"""``--push-to-hub`` of what exports: what can be known beforehand, and the upload."""

from __future__ import annotations

import argparse

__all__ = ["check_hub_options", "push"]

_OTHERS = ("private", "token", "revision", "create_pr", "commit_message")


def check_hub_options(options: argparse.Namespace) -> None:
    """Find out before anything is loaded whether an upload can succeed.

    Raises:
        ValueError: for options without --push-to-hub, or if the hub cannot be reached or does not know the user.
    """
    if options.push_to_hub is None:
        given = [name for name in _OTHERS if getattr(options, name) is not None]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} is for an upload; add --push-to-hub REPO")
        return
    from stableedit_cpp.export.hub import check_hub

    check_hub(options.token)


def push(options: argparse.Namespace) -> str | None:
    """Upload the output directory where that was asked for; the address of what came of it."""
    if options.push_to_hub is None:
        return None
    from stableedit_cpp.export.hub import push_to_hub

    return push_to_hub(
        options.output,
        options.push_to_hub,
        private=options.private,
        token=options.token,
        revision=options.revision,
        create_pr=bool(options.create_pr),
        commit_message=options.commit_message,
    )
