"""A Hugging Face Space: the page of `minicpmv web` for everybody."""

import os
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the package lies beside this file

from minicpmv import checkpoint  # noqa: E402
from minicpmv.web import page  # noqa: E402
from minicpmv.web.conversation import Conversations  # noqa: E402


MODEL = os.environ.get("MODEL", str(HERE / "nano"))


def main() -> None:
    model, processor = checkpoint.load(MODEL, revision=os.environ.get("REVISION"), trust_remote_code=True)
    conversations = Conversations(model, processor, most=64)
    page.launch(page.build(conversations, Path(MODEL).name), "0.0.0.0", 7860)


if __name__ == "__main__":
    main()
