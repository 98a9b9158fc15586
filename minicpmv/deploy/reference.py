"""The checkpoint in PyTorch, asked once, and every export of it held against that."""

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minicpmv.checkpoint import load
from minicpmv.deploy.folder import write_record
from minicpmv.deploy.parity import ModelRuntime, ParityError, Runtime, cases, hold, observe
from minicpmv.deploy.source import Checkpoint


def open_runtime(place: str | Path, *packages: str) -> ModelRuntime:
    """What a place holds, as `minicpmv.load` gives it, and the versions of the packages that run it."""
    model, processor = load(place)
    versions = {name: version(name) for name in packages}
    return ModelRuntime(model, processor, versions, tokenize=getattr(model.llm, "tokenize", None))


class Reference:
    """What a checkpoint answers in PyTorch.

    Args:
        samples: questions of each row of NanoBench.
        note: is told what happens.
    """

    def __init__(self, checkpoint: Checkpoint, samples: int, note: Callable[[str], None]):
        from transformers import AutoProcessor

        self.checkpoint, self.samples, self.note = checkpoint, samples, note
        source = str(checkpoint.folder)
        self.asked = cases(AutoProcessor.from_pretrained(source, trust_remote_code=True))
        runtime = partial(open_runtime, source, "torch", "transformers")
        self.record = observe(runtime, self.asked, samples, note=self._noted("PyTorch"))

    def check(
        self,
        stage: Path,
        runtime: Callable[[], Runtime],
        name: str,
        write_card: Callable[[], Any],
        remedy: str,
        **export: Any,
    ) -> None:
        """Hold an export against it, and write down beside the export what was found.

        Args:
            stage: the folder that the export is in.
            runtime: makes what runs it.
            name: of the export.
            write_card: writes the card of an export that does not pass.
            remedy: what to do then.
            export: `type`, `size`, `margin` and `feature_margin`, as of [`minicpmv.deploy.parity.hold`].

        Raises:
            ParityError: the answers differ beyond what the type allows.
        """
        config = self.checkpoint.config
        found = hold(
            self.record,
            runtime,
            self.asked,
            name=name,
            samples=self.samples,
            reference_type=str(config.get("dtype") or config.get("torch_dtype")),
            note=self._noted(name),
            **export,
        )
        write_record(stage, found)
        if found.faults:
            write_card()
            raise ParityError(
                f"{name} does not answer as PyTorch does: {'; '.join(found.faults)}. It stays in {stage}, to be looked at; "
                f"{remedy}"
            )

    def _noted(self, who: str) -> Callable[[str], None]:
        return lambda what: self.note(f"{who}: {what}")
