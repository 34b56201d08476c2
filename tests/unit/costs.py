"""Work compared with itself, in processor time: a machine that is busy with other things changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable


def grows_in_proportion(work: Callable[[int], object], size: int) -> bool:
    """Eight times the input costs some eight times the processor time, and not sixty-four times."""

    def cost(size: int) -> float:
        began = time.process_time()
        work(size)
        return time.process_time() - began

    cost(size)  # warm
    return min(cost(8 * size) for _ in range(2)) < 30 * max(min(cost(size) for _ in range(3)), 0.001)
