"""What goes wrong between the hub and the disk, in one line that says what to do.

The client, its transport and the disk raise what they like; people get a DownloadError. Knows what errors mean, and
nothing of what is downloaded.
"""

from __future__ import annotations

import contextlib
import errno
import json
import ssl
from collections.abc import Iterator

from kandinsky.common.untrusted import reason

GO_ON = "what has arrived is kept, and the same command goes on from there"


class DownloadError(OSError):
    """Something on the way from the hub to the disk; the message is one line that says what to do."""


def no_hub() -> DownloadError:
    return DownloadError(
        f"{endpoint()} does not answer as a hub does: check HF_ENDPOINT, or whether the network wants a login"
    )


def endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


@contextlib.contextmanager
def explained(repo: str) -> Iterator[None]:
    """Turn what the client or the disk raises into a DownloadError."""
    from huggingface_hub import errors

    try:
        yield
    except DownloadError:
        raise
    except (OSError, ValueError, ImportError, errors.HTTPError) as error:
        raise DownloadError(_explain(error, repo)) from error


def _explain(error: Exception, repo: str) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)  # the hub's answer, where there is one
    if isinstance(error, errors.GatedRepoError):
        why = "no valid token came along" if status == 401 else "this token's owner has not, or it may not read that"
        return (
            f"{repo} is only for those who accept its licence ({status}: {why}). Accept it at "
            f"https://huggingface.co/{repo}, make a token that may read gated repositories at "
            "https://huggingface.co/settings/tokens, and give it with --hf_token or in the variable HF_TOKEN"
        )
    if status in (401, 403, 404):
        return (
            f"{endpoint()} has no {repo}, or not for this token ({status}): check the name, and the token in "
            "--hf_token or HF_TOKEN, which may have expired"
        )
    if status is not None:
        return f"{endpoint()} answers {status} for {repo}: try again later; {GO_ON}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename or repo}): make room; {GO_ON}"
    why = reason(error)
    if isinstance(error, ImportError):  # the client's transport, for what ALL_PROXY asks of it
        return (
            f"the proxy in ALL_PROXY, HTTPS_PROXY or HTTP_PROXY is of a kind that needs more packages ({why}); "
            "proxies of http:// need none, and pip install socksio adds socks5://"
        )
    # The client's transport reads certificates as it starts; its error doesn't say of which file.
    no_file = isinstance(error, FileNotFoundError) and error.filename is None
    if no_file or isinstance(error, ssl.SSLError):
        return (
            f"certificates can't be read or are not accepted ({why}): check the files that the variables SSL_CERT_FILE "
            "and SSL_CERT_DIR name, or unset them"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot write: {why}"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return str(no_hub())
    if isinstance(error, ValueError):
        return f"{repo}: {why}"
    return (
        f"the connection to {endpoint()} for {repo} failed ({why}): check the network, or set HTTPS_PROXY for a "
        f"proxy or HF_ENDPOINT for a mirror; {GO_ON}"
    )
