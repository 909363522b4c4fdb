"""When progress bars are shown."""


def hide_bar(shown: bool) -> bool | None:
    """tqdm's argument `disable`: None, with which it shows a bar in a terminal and none in a file; True for no bar at all."""
    return None if shown else True
