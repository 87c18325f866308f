"""An export on the Hugging Face hub, by the options that transformers and peft have for it."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from stableedit_cpp.export.provenance import EXPORT_FILE
from stableedit_cpp.files.hub import why_hub_is_silent
from stableedit_cpp.model.load import SMOLLM2

__all__ = ["check_hub", "push_to_hub"]


def push_to_hub(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> str:
    """Upload what an export wrote, a model, delta, patch, adapter or GGUF file with its card, in one commit.

    Args:
        repo_id: "owner/name", or a name of the owner of the token; made if it is not there.
        private: of a repository that is made; None leaves it to the owner's default.
        token: None takes what ``hf auth login`` stored, or HF_TOKEN.
        revision: branch, made if it is not there; None is the main one.
        create_pr: propose the upload instead of committing it.
        commit_message, commit_description: of the commit; None says what is uploaded.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: for a directory that is no export, a wrong repo_id, or if the hub cannot be reached or refuses; what
            is in the directory is as it was.
    """
    directory = Path(directory)
    if not (directory / EXPORT_FILE).exists():
        raise ValueError(f"{directory} is no export: it has no {EXPORT_FILE}, which every export has")
    api = huggingface_hub.HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo,
            _operations(directory),
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload {directory.name}, edited with StableEdit",
            commit_description=commit_description,
        )
    except Exception as error:  # of the hub and of the HTTP library, which are of many kinds
        raise ValueError(
            f"{directory} is whole, and could not be uploaded to {repo_id}: {' '.join(str(error).split())[:300]}; "
            f"once that is mended: hf upload {repo_id} {directory}"
        ) from error
    return str(done.pr_url or done.commit_url)


def _operations(directory: Path) -> list[CommitOperationAdd]:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "README.md")
    adds = [CommitOperationAdd(path.relative_to(directory).as_posix(), path) for path in files]
    card = huggingface_hub.ModelCard.load(directory / "README.md")
    card.data.base_model = _name_on_the_hub(card.data.base_model)
    return [*adds, CommitOperationAdd("README.md", str(card).encode("utf-8", errors="backslashreplace"))]


def _name_on_the_hub(base_model: str | None) -> str | None:
    """The hub refuses a card whose data name a directory as the base model; the text of the card still says which."""
    if base_model is None or Path(base_model).exists():
        return None
    if base_model.lower() == SMOLLM2:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    try:
        validate_repo_id(base_model)
    except HFValidationError:
        return None
    return base_model


def check_hub(token: str | None = None) -> str:
    """Find out before hours of work whether an upload can succeed.

    Returns:
        The name of the user that the token belongs to.

    Raises:
        ValueError: if the hub cannot be reached, or there is no token that it takes.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError("nothing can be pushed to the hub while HF_HUB_OFFLINE is set")
    if reason := why_hub_is_silent():
        raise ValueError(f"nothing can be pushed to the hub: {reason}")
    try:
        return huggingface_hub.HfApi(token=token).whoami()["name"]
    except Exception as error:  # as above
        what = "the token that was given" if token else "the token of this machine (hf auth login, or HF_TOKEN)"
        raise ValueError(f"the hub does not take {what}: {' '.join(str(error).split())[:200]}") from error
