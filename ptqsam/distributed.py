"""Several processes: one decides for all, or each does its share."""

from collections.abc import Callable
from typing import Any, TypeVar

from mmengine.dist import broadcast_object_list, get_dist_info, is_main_process

T = TypeVar('T')


def decided_by_main(decide: Callable[[], T]) -> T:
    """Let the main process decide, as it does alone, and give all processes what it found.

    Args:
        decide: called in the main process only; what it returns can be pickled.

    Returns:
        What it returned.

    Raises:
        Exception: whatever it raised, in all processes; without it the others would wait for ever.
    """
    found: list[Any] = [None, None]
    if is_main_process():
        try:
            found[0] = decide()
        except Exception as error:
            found[1] = error
    broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def own_block(count: int) -> range:
    """Positions of this process's share of some items: a block, so that shares in the order of processes are all.

    Args:
        count: number of items.
    """
    rank, world_size = get_dist_info()
    start, stop = (-(-number * count // world_size) for number in (rank, rank + 1))
    return range(start, stop)
