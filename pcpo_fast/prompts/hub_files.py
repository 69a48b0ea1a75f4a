"""Prompt files in datasets on the Hugging Face hub."""

import re
from pathlib import Path

from pcpo_fast.errors import UserError

SCHEME = "hf://datasets/"
_ADDRESS = re.compile(rf"{SCHEME}(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?")


def hub_file(address: str) -> Path:
    """Download a file of a dataset, or find it in the hub's cache.

    Args:
        address: ``hf://datasets/OWNER/NAME[@REVISION][/FILE]``, as the hub's own libraries write it; without FILE the
            only one that may hold prompts.

    Raises:
        UserError: the address names no file where there is not exactly one, the dataset or file does not exist or may
            not be read, or there is no network and the file is not in the cache.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RevisionNotFoundError

    from pcpo_fast.files.hub_errors import hub_problem

    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise UserError(
            f"prompt file {address}: an address is {SCHEME}OWNER/NAME/FILE, or {SCHEME}OWNER/NAME@REVISION/FILE"
        )
    name, revision, file = found["name"], found["revision"], found["file"]
    try:
        if file is None:
            listed = HfApi().list_repo_files(name, repo_type="dataset", revision=revision)
            suitable = [one for one in listed if one.endswith((".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet"))]
            if len(suitable) != 1:
                some = ", ".join(suitable[:8]) + (", ..." if len(suitable) > 8 else "")
                raise UserError(
                    f"prompt file {address}: "
                    + (f"name one of the dataset's files: {some}" if some else "the dataset has no file of prompts")
                )
            [file] = suitable
        return Path(hf_hub_download(name, file, repo_type="dataset", revision=revision))
    except UserError:
        raise
    except RevisionNotFoundError:
        raise UserError(f"prompt file {address}: the dataset {name} has no revision {revision!r}") from None
    except Exception as error:
        raise UserError(f"prompt file {address}: {hub_problem(error, name, 'dataset')}") from None
