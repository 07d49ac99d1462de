"""Bring files of a hub repository into the Hugging Face cache, so that nothing is fetched twice.

Called by `hub`. huggingface_hub does the work, but for one thing: it drops a file that is cut off,
and a shard has 10 GB. So large files are taken one by one into `blobs/<sha256>.incomplete`, which
stays when the download is stopped and is added to by the next one; the cache's own layout, names
and locks are kept. Every error of the hub and the disk leaves here as one of ours.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, hf_hub_url, snapshot_download
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, tqdm

from vlmchat.config import DEMO_MODEL
from vlmchat.errors import DiskFull, ModelNotFound, NetworkError

# Smaller files are soon fetched again. Tests lower it.
RESUMED_BYTES = 8 * 2**20
HUB_TIMEOUT_S = 10


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub lists it. sha256 is None for small ones, which lie in git."""

    num_bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit. revision: what was asked for, None being the main branch."""

    repo: str
    revision: str | None
    commit: str
    files: Mapping[str, RemoteFile]


def ask(repo: str, revision: str | None) -> Listing:
    """What the hub has. Raises ModelNotFound or NetworkError."""
    with _told(repo, revision):
        # First of all: of the client's calls one that does not retry for 20 s without a network.
        info = HfApi().model_info(
            repo, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT_S
        )
        listed = {
            file.rfilename: RemoteFile(file.size or 0, file.lfs.sha256 if file.lfs else None)
            for file in info.siblings or ()
        }
        return Listing(repo, revision, info.sha, listed)


def fetch(listing: Listing, names: list[str], progress: Callable[[str], None] | None) -> Path:
    """The folder in the cache that holds these files, those fetched that were not there.

    progress is told what comes and how large it is; None for small things.
    Raises ModelNotFound, NetworkError, DiskFull.
    """
    folder = cache() / repo_folder_name(repo_id=listing.repo, repo_type="model")
    snapshot = folder / "snapshots" / listing.commit
    absent = {name: listing.files[name] for name in names if not (snapshot / name).exists()}
    to_come = sum(_num_bytes_to_come(folder, file) for file in absent.values())
    with _told(listing.repo, listing.revision, to_come):
        if to_come and progress is not None:
            _check_disk(listing.repo, to_come)
            kept = sum(file.num_bytes for file in absent.values()) - to_come
            files = f"{len(absent)} file{'s' if len(absent) > 1 else ''}"
            already = f", {size(kept)} are there already" if kept else ""
            progress(
                f"downloading {listing.repo}: {size(to_come)} in {files}{already} "
                "(Ctrl-C stops; the next start goes on from there)"
            )
        for name, file in absent.items():
            if file.sha256 and RESUMED_BYTES <= file.num_bytes <= constants.MAX_HTTP_DOWNLOAD_SIZE:
                _fetch_large(listing, folder, name, file)
        options = {"allow_patterns": names, "tqdm_class": _NoBar}
        return Path(snapshot_download(listing.repo, revision=listing.revision, **options))


def cache() -> Path:
    """The Hugging Face cache of this machine."""
    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def size(num_bytes: float) -> str:
    """Bytes for people: `13.5 GB`."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def sha256_of(file: Path) -> str:
    """The hash by which the hub knows a large file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def unreachable(what: str) -> NetworkError:
    """What is missing, and that it cannot be had now."""
    reason = (
        "HF_HUB_OFFLINE is set; unset it to download"
        if constants.is_offline_mode()
        else "the hub does not answer; check the network"
    )
    return NetworkError(
        f"{what} is not on this machine and {reason}, "
        f"or use the built-in model: --model-path {DEMO_MODEL}"
    )


class _NoBar(tqdm):  # type: ignore[misc]
    """For what is small: no bar."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})


def _num_bytes_to_come(folder: Path, file: RemoteFile) -> int:
    blob = folder / "blobs" / (file.sha256 or "-")
    if blob.exists():
        return 0
    return max(file.num_bytes - _size_of(_partial(blob)), 0)


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _fetch_large(listing: Listing, folder: Path, name: str, file: RemoteFile) -> None:
    """Put one file's content under its hash in the cache; `snapshot_download` then links it."""
    blob = folder / "blobs" / (file.sha256 or "")
    partial = _partial(blob)
    lock = folder.parent / ".locks" / folder.name / f"{blob.name}.lock"
    for directory in (blob.parent, lock.parent):
        directory.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():  # brought by another process meanwhile
            return
        start = _size_of(partial)
        if start > file.num_bytes:
            start = 0
        with partial.open("ab" if start else "wb") as stream:
            http_get(
                hf_hub_url(listing.repo, name, revision=listing.commit),
                stream,
                resume_size=start,
                headers=build_hf_headers(),
                expected_size=file.num_bytes,
                displayed_filename=name,
            )
        if start and sha256_of(partial) != file.sha256:  # the piece kept was not sound
            partial.unlink()
            raise NetworkError(f"{listing.repo}: {name} came out broken; start the download again")
        os.replace(partial, blob)


def _check_disk(repo: str, to_come: int) -> None:
    """Raise DiskFull before the download rather than hours into it."""
    existing = next(path for path in (cache(), *cache().parents) if path.exists())
    if shutil.disk_usage(existing).free < to_come:
        raise _disk_full(repo, to_come)


def _disk_full(repo: str, to_come: int) -> DiskFull:
    existing = next(path for path in (cache(), *cache().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return DiskFull(
        f"{repo} needs {size(to_come)} more on the disk of {cache()}, {size(free)} are free; "
        "free some, or set HF_HUB_CACHE to a folder on another disk"
    )


@contextmanager
def _told(repo: str, revision: str | None, to_come: int = 0) -> Iterator[None]:
    """Errors of the hub's client, and of the disk it writes to, as ours."""
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(f"model {repo} has no revision {revision}") from error
    except errors.GatedRepoError as error:
        raise ModelNotFound(
            f"model {repo} is gated: accept its terms on its page on the hub, and set HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelNotFound(
            f"no model {repo} on the hub, or it is private (then set HF_TOKEN to one that may read)"
        ) from error
    except errors.HfHubHTTPError as error:
        status = f"{error.response.status_code} {error.response.reason_phrase}"
        raise NetworkError(f"the hub answers {status} for {repo}; try again later") from error
    except (errors.HTTPError, ConnectionError, errors.LocalEntryNotFoundError) as error:
        raise unreachable(repo) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(repo, to_come) from error
        if error.errno is not None:  # the cache cannot be written: told with its path
            raise
        raise NetworkError(f"{repo} did not arrive whole ({error}); start again") from error
    except (ValueError, LookupError, TypeError) as error:  # a login page, a mirror that is none
        raise NetworkError(
            f"what answers for {repo} is not the hub; check the network and HF_ENDPOINT"
        ) from error
