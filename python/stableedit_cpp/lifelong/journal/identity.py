"""How a session knows its model and its tokenizer again."""

from __future__ import annotations

from stableedit_cpp.editors import Editor
from stableedit_cpp.files.digest import model_digest, tensor_digests, tokenizer_digest

__all__ = ["check_identity", "edited_weights", "identity"]


def identity(editor: Editor) -> dict[str, object]:
    """What tells an editor's model and tokenizer from others, for the first record of a session."""
    names = [f"{module.name}.weight" for module in editor.modules]
    return {
        "class": type(editor.model).__name__,
        "dtype": str(editor.modules[0].weight.dtype).removeprefix("torch."),
        "outside": model_digest(editor.model, exclude=names),
        "edited": edited_weights(editor),
        "tokenizer": tokenizer_digest(editor.tokenizer),
    }


def edited_weights(editor: Editor) -> dict[str, str]:
    """Digests of the weights of the edited modules, as they are now."""
    return tensor_digests({module.name: module.weight for module in editor.modules})


def check_identity(editor: Editor, expected: dict[str, object], session: object) -> None:
    """
    Raises:
        ValueError: if the editor's model or tokenizer is not the ``expected``; its edited weights may be others.
    """
    found = identity(editor)
    for name, what in (
        ("class", "the model is a {found}, not a {expected}"),
        ("dtype", "the model is in {found}, not in {expected}"),
        ("outside", "weights of the model that the session does not edit are not those of its model"),
        ("tokenizer", "the tokenizer is another"),
    ):
        if found[name] != expected[name]:
            what = what.format(found=found[name], expected=expected[name])
            raise ValueError(f"{what}; load what the session {session} was created with")
