"""Work in a forked child, and what came of it."""

import os
import select
import time
from collections.abc import Callable

__all__ = ["in_a_child"]


def in_a_child(work: Callable[[], bytes]) -> bytes:
    """What ``work`` returns in a forked child; less than that if it failed or hung."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(work())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    answer, end = b"", time.monotonic() + 60
    try:
        while select.select([reading], [], [], max(0, end - time.monotonic()))[0]:
            part = os.read(reading, 1 << 16)
            if not part:
                break
            answer += part
        else:
            os.kill(child, 9)
    finally:
        os.close(reading)
        os.waitpid(child, 0)
    return answer
