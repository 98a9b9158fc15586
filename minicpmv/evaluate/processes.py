"""The processes of one run: one, or several that `accelerate launch` or `torchrun` has started."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any


LONGEST_WAIT = timedelta(hours=6)  # for the slowest process; torch's ten minutes are soon over where models think


class Processes:
    """This process among those of the run. Nothing is started, and without a launcher torch is not even imported.

    `share` and `gather` have to be called in all of them.
    """

    def __init__(self):
        self.rank, self.count, self.device = 0, 1, None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch
            from accelerate import PartialState

            # accelerate joins processes without an accelerator only where it is told that there is none.
            has_accelerator = getattr(torch, "accelerator", torch.cuda).is_available()
            state = PartialState(cpu=not has_accelerator, timeout=LONGEST_WAIT)
            self.rank, self.count, self.device = state.process_index, state.num_processes, state.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes the log and talks to the terminal."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """What the main process gives, in all of them."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def gather(self, values: Sequence[Any]) -> list[Any]:
        """The values of all processes, those of the main one first."""
        if self.count == 1:
            return list(values)
        from accelerate.utils import gather_object

        return gather_object(list(values))
