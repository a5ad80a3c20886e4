"""Published weights: fail fast without a network, and say which file is missing and how to place it by hand."""

from __future__ import annotations

import logging
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import cast
from urllib.parse import urlparse

from clipbench.errors import ClipbenchError


@contextmanager
def hub_access(what: str, repo: str, files: str, instead: str, url: str = "", alone: bool = False) -> Iterator[None]:
    """Around code of a library that reads files of a Hub repository, from its cache or over the network.

    Without a network the libraries retry each file for half a minute; here they go to the cache at once.

    Args:
        what: What is being fetched ("the weights of timm:…").
        repo: Hub repository; "" where the file has only a URL.
        files: The file names that would do.
        instead: Another way to get on.
        url: Address of the file, where it is not on the Hub.
        alone: `files` is one file, and the rest of the repository is not needed.

    Raises:
        ClipbenchError: The files are neither cached nor reachable.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    before = constants.HF_HUB_OFFLINE
    offline = before or not _hub_resolves(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = offline
    # The Hub's own error is made from that of its HTTP client (requests, httpx, …), whose time-outs are not OSErrors;
    # and what is fetched by URL comes through http.client.
    client_error = cast("type[Exception]", HfHubHTTPError.__bases__[0])
    try:
        yield
    except (OSError, client_error, HTTPException) as error:
        causes = _chain(error)
        if any(isinstance(e, GatedRepoError) for e in causes):
            raise ClipbenchError(
                f"{what}: the repository {repo} asks to accept its terms first",
                "Accept them on its page, then log in on this machine: hf auth login",
            ) from error
        if any(isinstance(e, RepositoryNotFoundError) for e in causes):
            raise ClipbenchError(f"{what}: there is no public repository {repo}", instead) from error
        lines = str(error).strip().splitlines()
        said = ": ".join([type(error).__name__, *(line[:200] for line in lines[:1])])
        reason = "no network" if offline and not before else said
        cache = constants.HF_HUB_CACHE
        if repo:
            place = (
                f"Missing: {files} of repository {repo}\n"
                f"Looked in: {cache} (set by HF_HOME), then on the Hub\n"
                f"By hand: on a machine with a network, run  hf download {repo}{f' {files}' if alone else ''}\n"
                f"         and copy its folder models--{repo.replace('/', '--')} into {cache}"
            )
        else:
            place = f"Missing: {files}, from {url}"
        raise ClipbenchError(f"{what} could not be fetched ({reason})", f"{place}\n{instead}") from error
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def quiet_root_logger() -> Iterator[None]:
    """Keep open_clip, which logs to the root logger (and so installs a handler there), to itself."""
    root = logging.getLogger()
    sink = logging.NullHandler()

    def not_open_clip(record: logging.LogRecord) -> bool:
        return "open_clip" not in record.pathname

    root.addHandler(sink)
    root.addFilter(not_open_clip)
    try:
        yield
    finally:
        root.removeFilter(not_open_clip)
        root.removeHandler(sink)


def _hub_resolves(endpoint: str) -> bool:
    if urllib.request.getproxies():
        return True  # names may be resolved by the proxy alone
    parts = urlparse(endpoint)
    try:
        socket.getaddrinfo(parts.hostname, parts.port or 443)
    except OSError:
        return False
    return True


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
