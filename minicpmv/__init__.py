"""What people do with MiniCPM-V 4.5: conversations, data, training, evaluation, documents and serving.

    import minicpmv

    model, processor = minicpmv.load("nano")
    session = minicpmv.ChatSession(model, processor)
    print(session.send([Path("assets/number.jpg"), "What does it say?"]))

The public names below are imported when they are asked for, so that importing the package itself takes no time.
"""

import importlib
from typing import Any


__version__ = "0.1.0"

# Where the public names live, and the extra whose packages their modules need.
_PLACES = {
    "Assistant": ("chat.assistant", None),
    "ChatSession": ("chat.session", None),
    "CheckpointError": ("checkpoint", None),
    "ConversationCollator": ("data.collator", None),
    "DocumentReader": ("apps.documents.reader", "documents"),
    "MiniCPMVError": ("errors", None),
    "MissingPackageError": ("errors", None),
    "OpenDocument": ("apps.documents.pages", "documents"),
    "evaluate": ("evaluate", None),  # a package: minicpmv.evaluate.measure
    "load": ("checkpoint", None),
    "load_conversations": ("data.load", "train"),
    "locate": ("apps.grounding", None),
    "parse_boxes": ("apps.grounding", None),
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place, extra = _PLACES[name]
    try:
        module = importlib.import_module(f"{__name__}.{place}")
    except ModuleNotFoundError as error:
        if extra is None or error.name is None:
            raise
        from minicpmv.errors import MissingPackageError

        raise MissingPackageError(extra, error.name) from error
    return module if name == place else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
