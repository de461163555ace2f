"""Errors of the Hugging Face hub's client -> one line each: what is wrong, and what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from minitf.data.config import DataConfig
from minitf.errors import MinitfError, RequestError

# Errors of a lost or missing connection, in the libraries between this one and the hub. They are known by name because
# the hub's client has changed its HTTP library, and importing either is slow.
UNREACHABLE = {
    "ConnectionError", "TimeoutError", "TransportError", "TimeoutException", "LocalEntryNotFoundError",
    "OfflineModeIsEnabled", "IncompleteRead",
}  # fmt: skip


@contextmanager
def naming_errors(config: DataConfig, split: str = "") -> Iterator[None]:
    """An error of the hub's client in the block becomes one line; our own errors pass."""
    try:
        yield
    except MinitfError:
        raise
    except Exception as error:
        raise describe_error(config, error, split) from error


def is_unreachable(error: BaseException) -> bool:
    """Whether the hub could not be reached, or did not answer."""
    return bool(UNREACHABLE & _class_names(error))


def _class_names(error: BaseException) -> set[str]:
    """The classes of an error, of the errors that caused it, and of all their bases."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return {cls.__name__ for link in chain for cls in type(link).__mro__}


def describe_error(config: DataConfig, error: Exception, split: str = "") -> MinitfError:
    """The error to raise in place of `error`, which opening or reading `split` of the data set caused."""
    from huggingface_hub import constants

    name, classes = config.hub_path, _class_names(error)
    if "GatedRepoError" in classes or "is a gated dataset" in str(error):
        return RequestError(
            f"{name} is gated: accept its terms on {constants.ENDPOINT}/datasets/{name}, then log in with: hf auth "
            "login, or set HF_TOKEN"
        )
    if "RevisionNotFoundError" in classes:
        return RequestError(f"{name} has no revision {config.hub_revision}; check data.hub_revision")
    if "RepositoryNotFoundError" in classes:
        return RequestError(
            f"{name} is no data set of the hub, or a private one: check data.hub_path, or log in with: hf auth login"
        )
    if is_unreachable(error):
        return _describe_unreachable(config, classes)
    return _describe_loading(config, error, split)


def _describe_unreachable(config: DataConfig, classes: set[str]) -> MinitfError:
    import datasets
    from huggingface_hub import constants

    if datasets.config.HF_HUB_OFFLINE:
        return MinitfError(
            f"{config.hub_path} is not in the cache, and HF_HUB_OFFLINE forbids downloading it; data=kjv and data=web "
            "work offline"
        )
    if any("Timeout" in name for name in classes):
        waits = f"{constants.HF_HUB_ETAG_TIMEOUT} and {constants.HF_HUB_DOWNLOAD_TIMEOUT} s"
        return MinitfError(
            f"no answer from the hub at {constants.ENDPOINT} for {config.hub_path}; to wait longer, set "
            f"HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT, now {waits}"
        )
    return MinitfError(f"cannot reach the Hugging Face hub for {config.hub_path}; data=kjv and data=web work offline")


def _describe_loading(config: DataConfig, error: BaseException, split: str) -> MinitfError:
    name = config.hub_path
    while error.__cause__ is not None and str(error.__cause__).strip():  # "An error occurred ...": the cause says which
        error = error.__cause__
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    found = re.search(r"\[('[^\]]*)\]", reason)
    known = f", one of: {found[1]}".replace("'", "") if found else ""
    if "BuilderConfig" in reason or "Config name is missing" in reason:
        wanted = f"has no configuration {config.hub_name!r}" if config.hub_name else "has several configurations"
        return RequestError(f"{name} {wanted}; set data.hub_name{known}")
    if "split" in reason.lower() and found:
        key = "hub_val_split" if split and split == config.hub_val_split else "hub_split"
        return RequestError(f"{name} has no split {split!r}; set data.{key}{known}")
    return RequestError(f"cannot load {name}: {reason[:200]}; check data.hub_path, data.hub_name and data.hub_split")
