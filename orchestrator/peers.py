"""The workers of a lane as one object: what each is given of a list, what all say, what the first decides. No Ray, and torch only where there are
several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Peers:
    """This worker among those of its group. `gather`, `first` and `agree` are collective: every worker calls them, in the same order."""

    rank: int = 0
    world_size: int = 1

    def share(self, count: int) -> list[int]:
        """Indices of this worker's part of `count` rows: every `world_size`-th from `rank` on."""
        return list(range(self.rank, count, self.world_size))

    def gather(self, value: T) -> list[T]:
        """Every worker's value, by rank; values must be picklable."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]  # filled by torch, which cannot say so

    def first(self, value: T) -> T:
        """Worker 0's value; that of the others is ignored."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def agree(self, found: bool) -> bool:
        """Whether every worker says so: files may reach the others' view of a shared folder late, and all must do the same."""
        return all(self.gather(found))
