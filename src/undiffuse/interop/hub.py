"""The Hugging Face Hub: models go there and come from there as folders of safetensors, JSON and text.

Nothing is sent or fetched unless it is asked for, and a dry run says what would be: every file with its size. What is
fetched is never code (trap: a repository may hold any file), and is opened by :meth:`.Pipeline.load` like any folder.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..config import write_bytes_atomic
from ..errors import UndiffuseError
from ..pipeline import Pipeline, find_pipeline
from .card import LICENSES, card_picture, model_card
from .export import new_folder, save_diffusers, sizes, translate

FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.md", "*.png")
"""Files that a model is made of; no code and no pickles."""


def write_folder(
    model: str | Path, folder: str | Path, *, form: str = "undiffuse", license: str | None = None
) -> str | None:
    """Write ``folder`` with the model as ``undiffuse`` or as ``diffusers`` wants it, its card and a picture.

    Returns why diffusers needs code of ours for it; None: it needs none, or was not asked for.
    """
    pipeline, run = Pipeline.load(model), None
    folder = new_folder(folder)
    if pipeline.home is None:
        above = find_pipeline(model).parent
        run = above if (above / "config.json").is_file() else None
    picture = card_picture(pipeline)  # what cannot be sampled leaves no folder that looks whole
    found = translate(pipeline) if form == "diffusers" else None
    if found is not None:
        save_diffusers(pipeline, folder, license=license, run=run, translation=found)
    else:
        pipeline.save(folder)
        write_bytes_atomic(folder / "README.md", model_card(pipeline, license=license, run=run).encode())
    if picture is not None:
        picture.save(folder / "samples.png")
    return None if found is None else found.reason


def push(
    model: str | Path,
    repo: str,
    *,
    form: str = "undiffuse",
    license: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    out: Path | None = None,
) -> tuple[dict[str, int], str | None]:
    """Send a model to ``repo`` on the Hub, which is made if there is none; its files with their bytes, and where it is
    now (None after a dry run).

    Args:
        form: ``undiffuse`` or ``diffusers``.
        license: of the weights, which must be stated: nobody may use what has none.
        dry_run: write the folder and send nothing.
        out: keep the folder that is sent here; None: it is removed.
    """
    check_repo(repo)
    if license is None:
        raise UndiffuseError(f"--license is missing: under which may others use it? Such as {', '.join(LICENSES[:4])}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary) / "model"
        write_folder(model, folder, form=form, license=license)
        files = sizes(folder)
        if dry_run:
            return files, None
        api = hub().HfApi()
        url = str(call(lambda: api.create_repo(repo, private=private, exist_ok=True), repo))
        call(lambda: api.upload_folder(repo_id=repo, folder_path=str(folder)), repo)
        return files, url


def pull(repo: str, to: str | Path, *, revision: str | None = None, dry_run: bool = False) -> dict[str, int]:
    """Fetch a model from the Hub into the folder ``to``; its files with their bytes. ``dry_run``: fetch nothing."""
    check_repo(repo)
    folder = Path(to)
    if not dry_run and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UndiffuseError(f"{folder}: is there already; choose another folder with --to")
    library = hub()
    told = call(lambda: library.HfApi().model_info(repo, revision=revision, files_metadata=True), repo)
    there = {each.rfilename: int(each.size or 0) for each in told.siblings or ()}
    files = {name: size for name, size in there.items() if wanted(name)}
    if not any(name.endswith(".safetensors") for name in files):
        raise UndiffuseError(f"{repo}: has no safetensors; weights in pickles (.bin, .pt, .ckpt) are never fetched")
    if dry_run:
        return files
    call(
        lambda: library.snapshot_download(repo, revision=told.sha, local_dir=str(folder), allow_patterns=list(FETCHED)),
        repo,
    )
    return sizes(folder)


def wanted(name: str) -> bool:
    """Whether a file of a repository is part of a model: by its ending alone."""
    return any(name.endswith(pattern.removeprefix("*")) for pattern in FETCHED)


def check_repo(repo: str) -> None:
    """Refuse what is no ``owner/name``."""
    owner, _, name = repo.partition("/")
    if not owner or not name or "/" in name or not all(c.isalnum() or c in "-_./" for c in repo) or ".." in repo:
        raise UndiffuseError(f"{repo!r}: a repository on the Hub is owner/name")


def hub() -> Any:
    """The package ``huggingface_hub``."""
    try:
        import huggingface_hub
    except ImportError:
        raise UndiffuseError("the Hub needs huggingface-hub, which is missing: pip install 'undiffuse[hub]'") from None
    return huggingface_hub


def call(ask: Any, repo: str) -> Any:
    """``ask()``, its failures in one line."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return ask()
    except OfflineModeIsEnabled:
        raise UndiffuseError(f"{repo}: the Hub is switched off (HF_HUB_OFFLINE); unset it, or take --dry-run") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        said = str(error).strip().splitlines()
        raise UndiffuseError(
            f"{repo}: {said[0] if said else type(error).__name__}; is the name right, are you logged in "
            "(`hf auth login`), is there a network?"
        ) from None
