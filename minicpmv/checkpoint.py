"""Model and processor for a command, by the name that a user gave."""

from pathlib import Path


class CheckpointError(ValueError):
    """The model cannot be loaded: the message says why and what to do."""


def load(name: str, revision: str | None = None, trust_remote_code: bool = False):
    """`(model, processor)` of a model folder or Hub repository, on the accelerator if there is one.

    The code in a folder is trusted, since the user named the folder; that of a Hub repository needs `trust_remote_code`.

    Raises:
        CheckpointError: it cannot be loaded, its code is not trusted, or it is a model of another kind.
    """
    from transformers import AutoModel, AutoProcessor

    folder = Path(name).expanduser()
    if folder.is_dir():
        name = str(folder)
    elif not trust_remote_code:
        raise CheckpointError(
            f"{name} is no folder here. A Hub repository brings code of its own, which loading it runs: read it, pin it "
            "with --revision, and add --trust-remote-code."
        )
    source = {"revision": revision, "trust_remote_code": True}
    try:
        model = AutoModel.from_pretrained(name, dtype="auto", device_map="auto", **source).eval()
        processor = AutoProcessor.from_pretrained(name, **source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name} is no model that can be loaded: {reason} Give another one, or get the published weights with "
            "minicpmv fetch."
        ) from error
    if not hasattr(model, "start_chat"):
        raise CheckpointError(
            f"{name} is a {type(model).__name__} without sessions: give a MiniCPM-V 4.5 with the code of this repository."
        )
    return model, processor
