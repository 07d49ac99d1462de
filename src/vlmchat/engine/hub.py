"""Find a checkpoint: the shipped demo, a directory, the local cache, or the Hugging Face hub.

Called by the loader and by `vlmchat models`. Knows which files a model needs, nothing of what is
in them; no torch. What is cached is found without touching the network.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import get_cached_repo_tree, scan_cache_dir, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
)

from vlmchat.config import DEMO_MODEL
from vlmchat.engine.download import Listing, ask, cache, fetch, unreachable
from vlmchat.engine.spec import check_config
from vlmchat.errors import ModelNotFound, NetworkError, UnsupportedModel

Progress = Callable[[str], None]
# Names of a repository's files -> those that are needed.
Choice = Callable[[Iterable[str]], list[str]]

CONFIGS = ("config.json", "adapter_config.json")
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
# Whole models; safetensors are taken where a repository has both.
WHOLE = (
    re.compile(r"model(-\d+-of-\d+)?\.safetensors"),
    re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin"),
    re.compile(r"(?!adapter|consolidated).+\.safetensors"),
)
# What stands in place of a whole model in LLaVA's LoRA and projector-only checkpoints.
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
LORA_REST = "non_lora_trainables.bin"
PROJECTOR = "mm_projector.bin"


def find_checkpoint(
    path: str, revision: str | None, progress: Progress, *, as_base: bool = False
) -> Path:
    """The directory of a checkpoint, downloaded if need be.

    path: `demo`, a directory, or a hub id (`owner/name`). as_base: it is wanted as the base of
    another checkpoint, so that a language model will do. Where a checkpoint in LLaVA's own layout
    has to be downloaded, its vision tower comes first, so that nothing large is fetched in vain.
    Raises ModelNotFound, UnsupportedModel, DiskFull, or NetworkError when a download is needed and
    cannot be had; it names what is missing.
    """
    if not path.strip():
        raise ModelNotFound("--model-path is empty; give 'demo', a directory or a hub id")
    directory = _expanded(path)
    if revision is not None and (path == DEMO_MODEL or directory.exists()):
        raise ModelNotFound(f"--revision {revision}: {path} is no hub id, so it has no revisions")
    if path == DEMO_MODEL:
        return Path(str(files("vlmchat.demo") / "model"))
    if directory.is_dir():
        if not any((directory / name).is_file() for name in CONFIGS):
            raise ModelNotFound(f"{path} has no config.json, so it is not a model directory")
        return directory
    if directory.exists():
        raise ModelNotFound(f"{path} is a file; --model-path takes a directory or a hub id")
    if not is_hub_id(path):
        raise ModelNotFound(f"no model at {path}: no such directory, and not a hub id (owner/name)")
    found = cached(path, revision)
    if found is not None and not missing_files(found):
        return found
    return pull(path, revision, progress, as_base=as_base)


def find_base(base: str, named_by: str | None, progress: Progress, *, text: bool = False) -> Path:
    """The directory of another checkpoint's base.

    named_by: the checkpoint, where its files name the base; None where a person did. text: a
    language model will do. Raises as `find_checkpoint` does.
    """
    try:
        return find_checkpoint(base, None, progress, as_base=text)
    except ModelNotFound as error:
        if named_by is None:
            raise
        raise ModelNotFound(
            f"{error.message}; {named_by} names it as its base, --model-base takes another"
        ) from error


def find_tower(name: str, relative_to: Path, progress: Progress, *, weights: bool = True) -> Path:
    """The directory of the vision tower that a checkpoint names in `mm_vision_tower`.

    name: a hub id, or a path: absolute, or relative to the working directory or to the
    checkpoint, `relative_to`. weights False: the checkpoint brings its own, only config and
    preprocessor are needed. Raises as `find_checkpoint` does, with the tower's name.
    """
    choice = _tower_files if weights else _tower_settings
    if found := tower_here(name, relative_to, choice):
        return found
    if not is_hub_id(name):
        raise ModelNotFound(
            f"the vision tower {name}, which the checkpoint names, is not on this machine; "
            "put it there, or name another in mm_vision_tower of the checkpoint's config.json"
        )
    try:
        return _download(ask(name, None), choice, progress)
    except NetworkError as error:
        raise NetworkError(f"the vision tower: {error}") from error


def tower_here(name: str, relative_to: Path, choice: Choice | None = None) -> Path | None:
    """The tower's directory if it is whole on this machine. No network."""
    for directory in (_expanded(name), relative_to / name):
        if (directory / "config.json").is_file():
            return directory
    found = cached(name, None) if is_hub_id(name) else None
    return found if found and not missing_files(found, choice or _tower_files) else None


def pull(repo: str, revision: str | None, progress: Progress, *, as_base: bool = False) -> Path:
    """Like `find_checkpoint` for a hub id, but the hub is asked for the newest state.

    What is there already is not downloaded again, an interrupted download goes on.
    """
    found = cached(repo, revision)
    try:
        listing = ask(repo, revision)
    except NetworkError as error:
        raise _missing(repo, found, error) from error
    settings = fetch(listing, [name for name in CONFIGS if name in listing.files], None)
    config = read_config(settings)
    if not config and "adapter_config.json" not in listing.files:
        raise ModelNotFound(f"{repo} has no config.json, so it is not a model")
    if config and not as_base:
        check_config(config, repo)
    if tower := tower_name(config):
        find_tower(tower, settings, progress, weights=not config.get("unfreeze_mm_vision_tower"))
    return _download(listing, needed_files, progress)


def cached(repo: str, revision: str | None) -> Path | None:
    """The cache's folder for that revision, whole or not; None if there is none. No network."""
    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except IncompleteSnapshotError as error:
        return Path(error.snapshot_path)
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def needed_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files those that running the model takes.

    Folders, other formats, a second copy of the weights and a trainer's leavings are left out.
    """
    top = [name for name in names if "/" not in name]
    small = [name for name in top if any(fnmatch(name, pattern) for pattern in SMALL_FILES)]
    small += [name for name in names if name.startswith("additional_chat_templates/")]
    whole = weight_files(top)
    adapter = [name for name in ADAPTERS if name in top][:1]
    rest = [LORA_REST] if LORA_REST in top else []
    projector = [PROJECTOR] if PROJECTOR in top and not (whole or adapter) else []
    return small + whole + adapter + rest + projector


def weight_files(names: Collection[str]) -> list[str]:
    """The files of a whole model's weights, in the form that is preferred."""
    found = ([n for n in names if pattern.fullmatch(n)] for pattern in WHOLE)
    return next((each for each in found if each), [])


def missing_files(directory: Path, choice: Choice = needed_files) -> list[str]:
    """Files that a model in the cache lacks, by the hub's listing or by the weights' index."""
    listed = listed_sizes(directory)
    if listed is not None:
        return [name for name in choice(listed) if not (directory / name).is_file()]
    if not any((directory / name).is_file() for name in CONFIGS):
        return ["config.json"]
    present = [file.name for file in directory.iterdir()]
    form = {Path(name).suffix for name in weight_files(present)}  # of two, only one is fetched
    for index in sorted(directory.glob("*.index.json")):
        shards = weight_files(sorted(set(read_index(index).values())))
        if shards and form <= {Path(shards[0]).suffix}:
            if absent := [shard for shard in shards if shard not in present]:
                return absent
            break
    chosen = choice(present)
    if choice is not _tower_settings and not any(is_weights(name) for name in chosen):
        return ["the weights"]
    return []


def listed_sizes(directory: Path) -> dict[str, int] | None:
    """What the hub said is in a snapshot of the cache: file -> bytes; None: not known."""
    if directory.parent.name != "snapshots":
        return None
    repo = repo_of(directory.parent.parent)
    try:
        tree = get_cached_repo_tree(
            repo, revision=directory.name, cache_dir=directory.parent.parent.parent
        )
    except (CachedRepoTreeNotFoundError, HFValidationError):
        return None
    return {file.path: file.size for file in tree}


def repo_of(folder: Path) -> str:
    """The hub id of a folder in the cache: `models--owner--name` -> `owner/name`."""
    return "/".join(folder.name.split("--")[1:])


def tower_name(config: dict[str, Any]) -> str | None:
    """The vision tower that a config in LLaVA's own layout names."""
    name = config.get("mm_vision_tower")
    return name if isinstance(name, str) else None


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a directory; empty where there is none or it cannot be read."""
    return read_json(directory / "config.json")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none or it cannot be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_index(file: Path) -> dict[str, str]:
    """Which file holds each tensor, by an index of shards; empty where it cannot be read."""
    table = read_json(file).get("weight_map")
    return {name: str(shard) for name, shard in table.items()} if isinstance(table, dict) else {}


def is_weights(name: str) -> bool:
    """Whether a file holds tensors."""
    return name.endswith((".safetensors", ".bin"))


def is_hub_id(path: str) -> bool:
    """Whether a model's name has the form `owner/name`."""
    return not path.startswith(("/", ".", "~")) and path.count("/") == 1


def cached_folders() -> list[Path]:
    """The folders of all models in the cache, whole or not."""
    return sorted(folder for folder in cache().glob("models--*--*") if folder.is_dir())


def cached_folder(repo: str) -> Path:
    """The folder of a model in the cache. Raises ModelNotFound."""
    folders = {repo_of(folder): folder for folder in cached_folders()}
    if repo not in folders:
        raise ModelNotFound(f"{repo} is not in the cache, {cache()}; nothing else is deleted")
    return folders[repo]


def bytes_in(folder: Path) -> int:
    """What a model's folder in the cache takes on disk, downloads that have only begun included."""
    blobs = folder / "blobs"
    files = [file for file in blobs.iterdir() if file.exists()] if blobs.is_dir() else []
    return sum(file.stat().st_size for file in files)


def remove(folder: Path) -> None:
    """Delete a model's folder from the cache. Raises OSError where that cannot be done.

    huggingface_hub goes first, since files may be shared with other models; then what it does not
    know of: folders that it calls corrupted, downloads that have only begun, locks.
    """
    if folder.is_symlink() or folder.parent != cache():
        raise ModelNotFound(f"{folder} does not lie in the cache, {cache()}; it stays")
    known = (repo for repo in scan_cache_dir(cache()).repos if repo.repo_path == folder)
    commits = [revision.commit_hash for repo in known for revision in repo.revisions]
    scan_cache_dir(cache()).delete_revisions(*commits).execute()
    if folder.exists():
        shutil.rmtree(folder)
    shutil.rmtree(cache() / ".locks" / folder.name, ignore_errors=True)


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # the home of somebody who is not known here
        return Path(path)


def _tower_settings(names: Iterable[str]) -> list[str]:
    return [name for name in names if name in ("config.json", "preprocessor_config.json")]


def _tower_files(names: Iterable[str]) -> list[str]:
    needed = needed_files(names)
    weights = [name for name in needed if is_weights(name) or name.endswith(".index.json")]
    return _tower_settings(needed) + weights


def _download(listing: Listing, choice: Choice, progress: Progress) -> Path:
    names = choice(listing.files)
    if choice is not _tower_settings and not any(is_weights(name) for name in names):
        raise UnsupportedModel(
            f"{listing.repo} has no weights as .safetensors or .bin; choose another checkpoint"
        )
    return fetch(listing, names, progress)


def _missing(repo: str, found: Path | None, cause: NetworkError) -> NetworkError:
    """The line for a checkpoint that is not all here, with what is missing."""
    if found is None or isinstance(cause.__cause__, HfHubHTTPError):
        return cause
    absent = missing_files(found)
    what = absent[:1] + ([f"{len(absent) - 1} more files"] if len(absent) > 1 else [])
    config = read_config(found)
    if tower := tower_name(config):
        own_weights = config.get("unfreeze_mm_vision_tower")
        if tower_here(tower, found, _tower_settings if own_weights else _tower_files) is None:
            what.append(f"its vision tower {tower}")
    if not what:
        return NetworkError(f"the hub does not answer; {repo} stays as it is here, which is whole")
    return unreachable(f"{repo} lacks {' and '.join(what)}, which")
