"""What decoding keeps with a model."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any


class Workspace(OrderedDict):
    """Recorded steps and their buffers, by kind of call, those used last at the end.

    They belong to one model at one address: a copy or a pickle of the model begins with none.
    ``clear()`` gives the memory back. ``lock`` guards additions and removals.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        return Workspace()

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()
