"""When progress bars are shown, and when a log says instead how far the work is."""

import time

_SECONDS = 60.0  # between two lines of a log


def hide_bar(shown: bool) -> bool | None:
    """tqdm's argument `disable`: None, with which it shows a bar in a terminal and none in a file; True for no bar at all."""
    return None if shown else True


class Pace:
    """Whether it is time for another line: at most one a minute, the first one after a minute."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """True once a minute."""
        now = time.monotonic()
        if now - self._last < _SECONDS:
            return False
        self._last = now
        return True
