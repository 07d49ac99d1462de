"""Find a checkpoint: the shipped demo, a directory, the local cache, or the Hugging Face hub.

Called by the loader. Knows files only, nothing of models; no torch. What is cached is found
without touching the network; a download that was interrupted is taken up where it stopped.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from huggingface_hub import errors, hf_hub_download, model_info, snapshot_download

from vlmchat.config import DEMO_MODEL
from vlmchat.engine.spec import check_config
from vlmchat.errors import ModelNotFound, NetworkError

# Weights come as safetensors where a repository has them; .bin shards only where it has not.
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
SAFETENSORS = "*.safetensors"
PICKLED = "*.bin"
HUB_TIMEOUT_S = 10
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def find_checkpoint(path: str, revision: str | None, progress: Callable[[str], None]) -> Path:
    """The directory of a checkpoint, downloaded if need be.

    path: `demo`, a directory, or a hub id (`owner/name`).
    Raises ModelNotFound, or NetworkError when a download is needed and cannot be had; OSError when
    there is no room for it.
    """
    if path == DEMO_MODEL:
        return Path(str(files("vlmchat.demo") / "model"))
    if not path.strip():
        raise ModelNotFound("--model-path is empty; give 'demo', a directory or a hub id")
    directory = Path(os.path.expanduser(path))
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ModelNotFound(f"{path} has no config.json, so it is not a model directory")
        return directory
    if directory.exists():
        raise ModelNotFound(f"{path} is a file; --model-path takes a directory or a hub id")
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise ModelNotFound(f"no model at {path}: no such directory, and not a hub id (owner/name)")
    return _cached(path, revision) or _download(path, revision, progress)


def _cached(repo: str, revision: str | None) -> Path | None:
    try:
        directory = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except errors.IncompleteSnapshotError as error:
        directory = Path(error.snapshot_path)  # perhaps only files that are not needed are missing
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None
    return directory if _is_complete(directory) else None


def _is_complete(directory: Path) -> bool:
    """Whether the config and all weight files that its index names are there."""
    if not (directory / "config.json").is_file():
        return False
    for weights in (SAFETENSORS, PICKLED):
        for index in directory.glob(f"{weights}.index.json"):
            names = set(json.loads(index.read_text())["weight_map"].values())
            return all((directory / name).is_file() for name in names)
        if any(directory.glob(weights)):
            return True
    return False


def _download(repo: str, revision: str | None, progress: Callable[[str], None]) -> Path:
    try:
        # First of all: of these calls the only one that does not retry for 20 s without a network.
        info = model_info(repo, revision=revision, timeout=HUB_TIMEOUT_S)
        config = hf_hub_download(repo, "config.json", revision=revision)
        check_config(json.loads(Path(config).read_text()), repo)
        names = [file.rfilename for file in info.siblings or ()]
        weights = SAFETENSORS if any(n.endswith(".safetensors") for n in names) else PICKLED
        patterns = [*SMALL_FILES, weights]
        plan = snapshot_download(repo, revision=revision, allow_patterns=patterns, dry_run=True)
        missing = [file for file in plan if file.will_download]
        size_gb = sum(file.file_size for file in missing) / 1e9
        progress(
            f"downloading {repo}: {size_gb:.1f} GB in {len(missing)} files "
            "(Ctrl-C stops; the next start goes on from there)"
        )
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(f"model {repo} has no revision {revision}") from error
    except errors.GatedRepoError as error:
        raise ModelNotFound(f"model {repo} is gated: accept its terms and set HF_TOKEN") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelNotFound(
            f"no model {repo} on the hub, or it is private (then set HF_TOKEN)"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise ModelNotFound(f"{repo} has no config.json, so it is not a model") from error
    except (errors.HTTPError, OSError) as error:
        if getattr(error, "errno", None) in _DISK_ERRORS:
            raise
        raise NetworkError(
            f"{repo} is not on this machine and the hub does not answer; check the network, "
            f"or use the built-in model: --model-path {DEMO_MODEL}"
        ) from error
