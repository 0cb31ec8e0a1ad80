"""Where a model lies on this machine.

In: a folder or a hub name. Out: a folder: its own, or that of the hub's local cache. Nothing is fetched.
"""

from pathlib import Path


def local_model_folder(model: str | None) -> Path | None:
    """The folder of a model; None without a model, or where it is not on this machine."""
    if not model:
        return None
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    # Not before it is needed: the models of most runs are folders.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json")
    except HFValidationError:  # not a name that the hub could have
        return None
    return Path(cached).parent if isinstance(cached, str) else None
