"""Weights from the Hugging Face hub: which files a config needs, and how they come to where it looks for them.

huggingface_hub talks to the hub; this module selects, checks and explains. A file arrives beside its place under the
name NAME.CHECKSUM.incomplete and takes its name when its checksum is the one that the hub lists. So a file that has its
name is complete, and one that has not goes on where it stopped, in the next process as well. The client's own
`hf_hub_download`, with or without Xet, throws an interrupted file away; that is why its `http_get` is called here: it
asks for the rest of a file with an HTTP Range.

The hub's address is the client's business (the variable HF_ENDPOINT), and so is the token that is not given (the
variable HF_TOKEN, or what `hf auth login` saved). This module does not know torch, and loads nothing.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from kandinsky.checkpoints.files import REPOSITORY, WEIGHTS_PREFIX, find_weights, model_name, part_folder, resolve_path
from kandinsky.checkpoints.headers import read_header
from kandinsky.checkpoints.hub_errors import GO_ON, DownloadError, endpoint, explained, no_hub
from kandinsky.checkpoints.inspect import size_text
from kandinsky.common.given import shown
from kandinsky.common.untrusted import home_path, is_plain_name
from kandinsky.config.reading import load_config
from kandinsky.config.schema import Config

logger = logging.getLogger(__name__)


CONFIG_DIR = REPOSITORY / "configs"
TRANSFORMER = "transformer"  # the folder of the DiT in repositories of diffusers' layout

# The parts that models share: repository, folder in it, and the names of what is read of that. Weights as safetensors
# only; no pickles, no flax, no tensorflow.
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
VAES = {
    "hunyuan": ("hunyuanvideo-community/HunyuanVideo", "vae", VAE_FILES),
    "flux": ("black-forest-labs/FLUX.1-dev", "vae", VAE_FILES),
}
# The tiny decoders of their latents, by the names in checkpoints/files.py. One of them is on GitHub: its file is named
# here to the byte, as https://github.com/madebyollin/taehv has it at that commit.
TAEHV_COMMIT = "011dfc2112197741c540e0bdd5b7b67bcc930771"
TAEHV_URL = f"https://raw.githubusercontent.com/madebyollin/taehv/{TAEHV_COMMIT}/safetensors/taehv.safetensors"
TAEHV_SIZE, TAEHV_SHA256 = 22_642_902, "032ad4ddc689513287ce02fcc099b5278592526ed1eac0324a7fab94bb690ed9"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
QWEN_FILES = ("model-*.safetensors", "model.safetensors.index.json", "generation_config.json")
QWEN = (
    "Qwen/Qwen2.5-VL-7B-Instruct",
    "",
    ("config.json", *QWEN_FILES, "preprocessor_config.json", *TOKENIZER_FILES),
)
CLIP = ("openai/clip-vit-large-patch14", "", ("config.json", "model.safetensors", *TOKENIZER_FILES))

# How many bytes to ask for at once: the hub's CDN sends at most 50 GB in one answer, and a Pro model is larger.
SEGMENT = 40_000_000_000
MOST_COMPARED = 1000  # names of a listing, where one is looked for that is like another
_CHECKSUM = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # of git, or sha256


@dataclass(frozen=True)
class Source:
    """Some files of one folder of a hub repository, and the folder that they come to."""

    repo: str
    folder: str  # "" is the repository itself
    names: tuple[str, ...]  # in that folder; * stands for anything, and each name must be there
    target: Path
    elsewhere: Elsewhere | None = None  # the one file, where it is not on the hub


@dataclass(frozen=True)
class Elsewhere:
    """A file that is not on the hub, and all that the hub would say of it."""

    url: str
    commit: str
    size: int
    sha256: str


@dataclass(frozen=True)
class File:
    """One file as the hub lists it."""

    repo: str
    commit: str
    path: str  # in the repository
    size: int  # bytes
    checksum: str  # 64 digits: the sha256 of a large file; 40 digits: the sha1 of a small one as a git blob
    gated: bool  # whether its repository is handed out to those only who accepted its licence
    target: Path
    url: str | None = None  # None: where the hub has it

    @property
    def partial(self) -> Path:
        return self.target.with_name(f"{self.target.name}.{self.checksum[:12]}.incomplete")

    @property
    def missing_bytes(self) -> int:
        """How much of it is still to come; all of it where what has arrived is too long to be right."""
        arrived = self.partial.stat().st_size if self.partial.is_file() else 0
        return self.size - arrived if arrived <= self.size else self.size

    def is_there(self, verify: bool = False) -> bool:
        """Whether the file has its name and its size, and with `verify` (which reads it all) its checksum."""
        if not self.target.is_file() or self.target.stat().st_size != self.size:
            return False
        return not verify or checksum(self.target, self) == self.checksum


# --- what to download -------------------------------------------------------------------------------------------------


def known_models() -> dict[str, Config]:
    """name -> config of every model that can be downloaded, the name as in configs/config_NAME.yaml."""
    configs = {model_name(path): load_config(path) for path in sorted(CONFIG_DIR.glob("config_*.yaml"))}
    return {name: config for name, config in configs.items() if config.model.hub_repo is not None}


def choose(words: str, known: Mapping[str, Config]) -> list[str]:
    """The names meant by "5s_sft,t2i", "all", or repositories as the hub calls them, with or without their owner.

    A repository that serves two configs stands for the first of them; what is downloaded is the same.
    Raises ValueError for an unknown name, with those that are near.
    """
    if words.strip() == "all":
        return list(known)
    meant = {name.lower(): name for name in known}
    for name, config in known.items():
        repo = str(config.model.hub_repo)
        meant.setdefault(repo.lower(), name)
        meant.setdefault(repo.split("/")[-1].lower(), name)

    chosen = []
    for word in (word.strip() for word in words.split(",")):
        if not word:
            continue
        match = meant.get(word.lower()) or meant.get(model_name(word).lower())
        if match is None:
            near = difflib.get_close_matches(word.lower()[:100], meant, n=len(meant), cutoff=0.01)
            near = list(dict.fromkeys(meant[name.lower()] for name in near))[:3] or list(known)
            names = f"{', '.join(near[:-1])} or {near[-1]}"
            raise ValueError(f"unknown model {shown(word)}: did you mean {names}? (--models list shows all)")
        chosen.append(match)
    if not chosen:
        raise ValueError(f"--models is empty: choose from {', '.join(known)}, all or list")
    return list(dict.fromkeys(chosen))


def sources(config: Config, cache_dir: str | Path = "./weights/", *, only_missing: bool = False) -> list[Source]:
    """Where the parts of a config's model come from, and which folder below cache_dir each comes to.

    With `only_missing` not those whose weights are on this machine and complete; that asks nobody.
    Raises ValueError where a config does not say enough.
    """
    model, encoders = config.model, config.model.text_embedder
    dit = PurePosixPath(model.checkpoint_path)
    # The VAE first: it is small, and it may be refused, which is better known before the large files than after.
    parts: list[tuple[str, str, str | None, str, tuple[str, ...]]] = [
        ("vae", model.vae.checkpoint_path, *VAES[model.vae.name]),
        ("dit", model.checkpoint_path, model.hub_repo, *_dit_files(model.hub_repo, dit)),
        ("text_encoder", encoders.qwen.checkpoint_path, *QWEN),
        ("text_encoder2", encoders.clip.checkpoint_path, *CLIP),
    ]
    found = []
    for part, path, repo, folder, names in parts:
        if only_missing and _has_weights(part_folder(resolve_path(path, config, cache_dir), part)):
            continue
        below = _below_weights(path)
        if repo is None or not below.parts:
            raise ValueError(
                f"{config.source} does not say where to download {path} from: that takes a model.hub_repo, and paths "
                f"that begin with ./{WEIGHTS_PREFIX}/"
            )
        target = home_path(cache_dir) / below
        is_file = path == model.checkpoint_path and folder != TRANSFORMER
        found.append(Source(repo, folder, names, target.parent if is_file else target))
        if folder == TRANSFORMER:
            found.append(Source(repo, "scheduler", ("scheduler_config.json",), target.parent / "scheduler"))
    return found


def tiny_sources(names: Sequence[str], cache_dir: str | Path = "./weights/") -> list[Source]:
    """Where tiny decoders come from, of those names: "taehv" for videos, "taef1" for pictures."""
    folders = {name: home_path(cache_dir) / name for name in names}
    taehv = Elsewhere(TAEHV_URL, TAEHV_COMMIT, TAEHV_SIZE, TAEHV_SHA256)
    known = {
        "taehv": lambda to: Source("github.com/madebyollin/taehv", "safetensors", ("taehv.safetensors",), to, taehv),
        "taef1": lambda to: Source("madebyollin/taef1", "", VAE_FILES, to),
    }
    return [known[name](folder) for name, folder in folders.items()]


def _dit_files(repo: str | None, path: PurePosixPath) -> tuple[str, tuple[str, ...]]:
    """The folder of a repository that has the DiT, and which of its files: by its name, in diffusers' layout or not."""
    if repo is not None and repo.endswith("-Diffusers"):
        return TRANSFORMER, ("*.json", "*.safetensors")
    return str(_below_weights(path).parent), (path.name,)


def _below_weights(path: str | PurePosixPath) -> PurePosixPath:
    """./weights/model/x -> model/x; empty for a path that is elsewhere."""
    path = PurePosixPath(path)
    return PurePosixPath(*path.parts[1:]) if path.parts[:1] == (WEIGHTS_PREFIX,) else PurePosixPath()


def _has_weights(path: Path) -> bool:
    try:
        for file in find_weights(path):
            read_header(file)
    except (ValueError, OSError):
        return False
    return True


def list_files(source: Source, token: str | None = None) -> list[File]:
    """A source's files as the hub lists them now, small ones first. Raises DownloadError, also where one is missing."""
    if (one := source.elsewhere) is not None:
        name, target = source.names[0], source.target / source.names[0]
        path = f"{source.folder}/{name}"
        return [File(source.repo, one.commit, path, one.size, one.sha256, False, target, one.url)]
    info, listed = _listing(source.repo, token)
    begin = f"{source.folder}/" if source.folder else ""
    # Files of the folder itself, by their names in it: what leads elsewhere is none of them.
    names = [path.removeprefix(begin) for path in listed if path.startswith(begin)]
    names = [name for name in names if is_plain_name(name)]
    files = []
    for pattern in source.names:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, names[:MOST_COMPARED], n=2)
            hint = f" (it has {' and '.join(begin + name for name in near)})" if near else ""
            raise DownloadError(
                f"{source.repo} has no {begin}{pattern}{hint}: it has changed, or the config names another one"
            )
        for name in matches:
            path = begin + name
            size, checksum = listed[path].size, listed[path].blob_id
            if (lfs := listed[path].lfs) is not None:
                size, checksum = lfs.size, lfs.sha256
            if type(size) is not int or not 0 <= size < 2**50 or not _CHECKSUM.fullmatch(str(checksum)):
                raise DownloadError(
                    f"{endpoint()} lists no size and checksum of {source.repo}/{path}: take another hub"
                )
            files.append(File(source.repo, info.sha, path, size, checksum, bool(info.gated), source.target / name))
    return sorted(files, key=lambda file: file.size)


def _listing(repo: str, token: str | None) -> tuple[Any, dict[str, Any]]:
    """What the hub says of a repository, and of each file by its path. What it says is not to be relied on."""
    from huggingface_hub import HfApi

    with explained(repo):
        try:
            info = HfApi().model_info(repo, files_metadata=True, timeout=30, token=token)
        # What the client finds in the place of what it is looking for shows as any of these.
        except (TypeError, KeyError, AttributeError, IndexError, RecursionError, OverflowError) as error:
            raise no_hub() from error
    siblings = info.siblings or []
    listed = {sibling.rfilename: sibling for sibling in siblings if isinstance(sibling.rfilename, str)}
    if len(listed) < len(siblings) or not _CHECKSUM.fullmatch(str(info.sha)):
        raise no_hub()
    return info, listed


# --- downloading ------------------------------------------------------------------------------------------------------


def download(
    wanted: Sequence[Source],
    cache_dir: str | Path = "./weights/",
    token: str | None = None,
    *,
    verify: bool = False,
    dry_run: bool = False,
    say: Callable[[str], object] = logger.info,
) -> None:
    """Fetch what is not there yet. Sizes, free space and access are checked, and said, before the first byte.

    Args:
        wanted: what `sources` returns; what appears twice is fetched once.
        cache_dir: one process at a time downloads into it; another one waits.
        token: None takes the variable HF_TOKEN, or the login that `hf auth login` saved.
        verify: read the files that are there too, and fetch those again whose checksum is not the hub's.
        dry_run: only say what would be fetched.
        say: gets one line after the other.

    Raises:
        DownloadError: no network, no access, no space, a damaged file; the message says what to do.
    """
    wanted = list(dict.fromkeys(wanted))
    if not wanted:
        return
    with contextlib.nullcontext() if dry_run else _alone_in(home_path(cache_dir), say):
        missing = []
        for source in wanted:
            files = list_files(source, token)
            gone = [file for file in files if not file.is_there(verify)]
            missing.extend(gone)
            total, left = sum(file.size for file in files), sum(file.missing_bytes for file in gone)
            there = "" if left == total else f" ({'all' if not gone else size_text(total - left)} of it is there)"
            count = "1 file" if len(files) == 1 else f"{len(files)} files"
            say(f"{source.repo}: {count}, {size_text(total)} -> {source.target}{there}")
        if not missing:
            say("nothing to download")
        _check_space(missing, say)
        _check_access(missing, token)
        if dry_run:
            return
        try:
            for number, file in enumerate(missing, 1):
                say(f"[{number}/{len(missing)}] {file.target} ({size_text(file.size)})")
                fetch(file, token)
        except KeyboardInterrupt:
            say(f"stopped: {GO_ON}")
            raise


def fetch(file: File, token: str | None = None) -> None:
    """Download one file, or the rest of it, check it, and give it its name. Raises DownloadError."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, tqdm

    url = file.url or hf_hub_url(file.repo, file.path, revision=file.commit)
    # As it is, not compressed on the way: only then are ranges those of the file.
    headers = {**build_hf_headers(token=False if file.url else token), "Accept-Encoding": "identity"}
    with explained(file.repo):
        file.target.parent.mkdir(parents=True, exist_ok=True)
        _remove_older_parts(file)
        with file.partial.open("ab") as out:
            if (arrived := out.tell()) > file.size:
                arrived = out.truncate(0)

            def bar(**options: Any) -> tqdm:  # of the whole file, where http_get knows of a segment only
                return tqdm(**{**options, "total": file.size, "initial": out.tell(), "disable": None})

            for begin in range(arrived // SEGMENT * SEGMENT, file.size, SEGMENT):
                end = min(begin + SEGMENT, file.size)
                span = {"Range": f"bytes={begin}-{end - 1}"} if file.size > SEGMENT else {}
                http_get(
                    url,
                    out,
                    resume_size=max(arrived - begin, 0),
                    headers={**headers, **span},
                    expected_size=end - begin,
                    displayed_filename=file.target.name,
                    tqdm_class=bar,  # type: ignore[arg-type]
                )
        if checksum(file.partial, file) != file.checksum:
            file.partial.unlink()
            raise DownloadError(
                f"{file.repo}/{file.path} arrived damaged (its checksum is not the hub's) and is removed: run the same "
                "command again; should it happen again, a proxy on the way or the disk is at fault"
            )
        os.replace(file.partial, file.target)


def checksum(path: Path, file: File) -> str:
    """The checksum of what is at `path`, of the kind that the hub lists for `file`."""
    from huggingface_hub.utils import tqdm

    blob = b"blob %d\0" % path.stat().st_size  # what git puts before a file's content
    digest = hashlib.sha256() if len(file.checksum) == 64 else hashlib.sha1(blob)
    quick = True if file.size < 500_000_000 else None  # no bar; None: a bar where there is a terminal
    bar = tqdm(total=file.size, desc=f"checking {file.target.name}", unit="B", unit_scale=True, disable=quick)
    with path.open("rb") as content, bar:
        while block := content.read(2**22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _remove_older_parts(file: File) -> None:
    """Parts of what the hub had under this name before: they would never be finished."""
    for path in file.target.parent.iterdir():
        if path.name.startswith(f"{file.target.name}.") and path.suffix == ".incomplete" and path != file.partial:
            path.unlink()


@contextlib.contextmanager
def _alone_in(folder: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process: two would write into the same file."""
    from huggingface_hub.utils import WeakFileLock

    with contextlib.ExitStack() as stack:
        with explained(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(WeakFileLock(folder / ".download.lock", timeout=0.5))
            except TimeoutError:
                say(f"another process downloads into {folder}: waiting for it")
                stack.enter_context(WeakFileLock(folder / ".download.lock"))
        yield


def _check_space(files: Sequence[File], say: Callable[[str], object]) -> None:
    needs: dict[int, tuple[Path, int]] = {}  # one entry for each file system: a folder of weights may be a link
    for file in files:
        folder = next(folder for folder in file.target.absolute().parents if folder.exists())
        device = folder.stat().st_dev
        first, need = needs.get(device, (folder, 0))
        needs[device] = (first, need + file.missing_bytes)
    for folder, need in needs.values():
        free = shutil.disk_usage(folder).free
        say(f"to download: {size_text(need)}; free in {folder}: {size_text(free)}")
        if need > free:
            raise DownloadError(
                f"not enough disk space in {folder}: {size_text(need)} are needed, {size_text(free)} are free; make "
                f"room for {size_text(need - free)} more, or choose another disk with --cache_dir"
            )


def _check_access(files: Sequence[File], token: str | None) -> None:
    """Ask for one file of every gated repository, without fetching it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    for file in {file.repo: file for file in files if file.gated}.values():
        with explained(file.repo):
            get_hf_file_metadata(hf_hub_url(file.repo, file.path, revision=file.commit), token=token)
