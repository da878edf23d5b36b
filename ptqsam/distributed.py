"""Several processes: one decides for all, or each does its share."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mmengine.dist import all_gather_object, broadcast_object_list, get_dist_info, is_main_process

from ptqsam.errors import ConfigError

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


def demand_same(facts: Mapping[str, Any]) -> None:
    """Refuse to go on where a process would work with something else than the main one.

    Args:
        facts: name -> value, of this process.

    Raises:
        ConfigError: in all processes; names the process and what differs.
    """
    everyone = all_gather_object(dict(facts))
    for rank, theirs in enumerate(everyone):
        if differing := [name for name, value in everyone[0].items() if theirs.get(name) != value]:
            raise ConfigError(
                f'process {rank} differs from the main one in {", ".join(differing)}; give all the same files, '
                'options and environment (PTQSAM_CKPT, PTQSAM_DATA)'
            )


def own_block(count: int) -> range:
    """Positions of this process's share of some items: a block, so that shares in the order of processes are all.

    Args:
        count: number of items.
    """
    rank, world_size = get_dist_info()
    start, stop = (-(-number * count // world_size) for number in (rank, rank + 1))
    return range(start, stop)
