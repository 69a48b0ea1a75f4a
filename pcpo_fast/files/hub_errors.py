"""Translates errors of the Hugging Face hub's client into messages for the user."""

from huggingface_hub.errors import (
    DryRunError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from pcpo_fast.errors import reason_of


def hub_problem(error: Exception, name: str, kind: str = "model") -> str:
    """Why a model or dataset cannot be downloaded, as the second half of a sentence.

    Args:
        error: raised by the hub's client, by diffusers, or by a library below them.
        name: the hub id.
        kind: "model" or "dataset".

    Raises:
        Exception: ``error`` itself, if it is none of these.
    """
    # The libraries wrap what the hub said when they find no local copy to fall back on.
    causes = [error] if error.__cause__ is None else [error, error.__cause__]
    reason = reason_of(causes[-1])

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    # An HTTP library gave up before it had an answer.
    no_answer = any(type(cause).__module__.startswith(("httpx", "httpcore", "requests")) for cause in causes)
    if met(GatedRepoError):
        return (
            f"the hub {kind} {name} is gated: accept its license on its page, then run `hf auth login` (or set "
            "HF_TOKEN)"
        )
    if met(RepositoryNotFoundError):
        return (
            f"the hub has no {kind} {name} that you may read: check the spelling, and for a private or gated {kind} "
            "run `hf auth login` (or set HF_TOKEN)"
        )
    if met(EntryNotFoundError) and not met(LocalEntryNotFoundError):
        return f"the hub {kind} {name} lacks a file that is needed: {reason}"
    if met(HfHubHTTPError):
        return f"the hub refused {name}: {reason}"
    if met(ConnectionError, TimeoutError, LocalEntryNotFoundError, DryRunError) or no_answer:
        return (
            f"the hub {kind} {name} is neither in the local cache nor can the hub be reached; download it once with a "
            f"network (`hf download`), or give a path ({reason})"
        )
    if met(OSError, ValueError):
        return f"{name} could not be downloaded from the hub: {reason}"
    raise error
