"""A child process that has all modules imported, and that may be killed at any moment."""

import os
from collections.abc import Callable
from threading import RLock

from tqdm import tqdm


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a child process, which ends with status 1 if it fails; returns its id.

    Progress bars share a lock with forked processes, and one that is killed while it writes never gives it back. So
    the child has a lock of its own.
    """
    child = os.fork()
    if child == 0:
        try:
            tqdm.set_lock(RLock())
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child
