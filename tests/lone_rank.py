"""An exchange of one rank, for tests and benchmarks that write directories alone."""

from typing import Any


class LoneRank:
    """A `manifest.Exchange` that has nobody to talk to."""

    rank = 0

    def all_gather(self, name: str, value: Any) -> list[Any]:
        """The value alone."""
        return [value]
