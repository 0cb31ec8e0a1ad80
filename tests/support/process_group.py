"""Workers in the test's own process."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist


@contextmanager
def group_of_one() -> Iterator[None]:
    """Workers in this process form a group of one, which ends with the block, and use half the machine's cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        yield
    if dist.is_initialized():
        dist.destroy_process_group()
