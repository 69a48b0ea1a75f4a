"""Uploading a folder to the Hugging Face hub."""

import os
from pathlib import Path

from pcpo_fast.errors import UserError, reason_of


def check_repository(name: str) -> None:
    """Check that a name is one that the hub allows.

    Raises:
        UserError: it is not of the form owner/name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if name.count("/") != 1:
            raise HFValidationError
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"--push-to-hub: {name} is not a hub id of the form owner/name") from None


def upload(folder: Path, name: str, message: str, *, private: bool) -> str:
    """Upload a folder as a model repository, which is created if there is none; returns its address.

    Args:
        folder: what to upload, every file of it.
        name: "owner/name".
        message: of the commit.
        private: create the repository as a private one.

    Raises:
        UserError: there is no token, it may not write there, or the hub cannot be reached. The folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    disable_progress_bars()
    try:
        made = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except Exception as error:  # the hub's client raises many kinds, and so does the HTTP library below it
        status = (
            error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
        )
        if status in (401, 403) or "token" in str(error).lower():
            problem = (
                f"the hub does not let you write to {name}: run `hf auth login`, or set HF_TOKEN to a token that may"
            )
        elif status is not None:
            problem = f"the hub refused {name}: {reason_of(error)}"
        else:
            problem = f"{name} could not be uploaded: {reason_of(error)}"
        raise UserError(
            f"--push-to-hub: {problem.rstrip('.')}. The files are in {folder}, and the same command tries again"
        ) from None
    return str(made)
