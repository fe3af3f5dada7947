"""Calls that may end their process run in a child."""

import os
import traceback
from collections.abc import Callable


def outcome(run: Callable[[], int]) -> int:
    """How ``run`` ends in a process of its own: its result, 1 for an error, or minus a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = run()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
