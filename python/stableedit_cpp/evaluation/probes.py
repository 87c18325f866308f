"""What is asked of a model about an edit request."""

from __future__ import annotations

from stableedit_cpp.data.request import EditRequest

__all__ = ["PROBES", "probes_of"]

# Name of the score -> prompt and answer, as fields of EditRequest.
PROBES = {
    "efficacy": ("prompt", "target"),
    "generalization": ("rephrase", "target"),
    "specificity": ("locality_prompt", "locality_target"),
    "multi_hop": ("multi_hop_prompt", "multi_hop_target"),
    "persona": ("persona", "target"),
}


def probes_of(request: EditRequest) -> dict[str, tuple[str, str]]:
    """``(prompt, answer)`` by probe, of those that the request has both for; a null multi-hop question is none."""
    pairs = {name: (getattr(request, prompt), getattr(request, answer)) for name, (prompt, answer) in PROBES.items()}
    return {name: (prompt, answer) for name, (prompt, answer) in pairs.items() if prompt and answer}
