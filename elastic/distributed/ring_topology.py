"""Rings on a flat grid of chips: an order of the devices in which every send goes to a neighbour.

A TPU v5e slice is a grid without wrap-around links, and its routing is limited. The compiler (libtpu 0.0.42) makes a
send asynchronous only if each sender and receiver lie in one row or column, 1, 2, 4 or 8 chips apart; in slices of up
to 16 chips it always does. (Found by compiling single sends.) So a ring is a closed walk over a rectangle and not a
row, whose ends are far apart.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Place = tuple[int, int]


def ring_grid(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray | None:
    """The devices of a flat slice as an array [dp, fsdp, tp, sp] whose rings are closed walks between neighbours.

    The chips of one tp group form a block whose sides are powers of two. The ring steps from block to block.

    Returns:
      None if the devices do not form a rectangle, or no such walk fits into it.
    """
    by_place: dict[Place, Any] = {(d.coords[0], d.coords[1]): d for d in devices}
    columns, rows = (max(place[axis] for place in by_place) + 1 for axis in (0, 1))
    if len(by_place) != len(devices) or columns * rows != len(devices):
        return None
    *_, tp, sp = shape
    for across, down in _sides(tp, columns, rows):
        if across & (across - 1) or down & (down - 1):
            continue
        for wide, high in _sides(sp, columns // across, rows // down):
            walk = closed_walk(wide, high)
            if walk is None:
                continue
            block = [(x, y) for y in range(down) for x in range(across)]
            order = [
                (left + x * across + in_x, top + y * down + in_y)
                for top in range(0, rows, high * down)
                for left in range(0, columns, wide * across)
                for in_x, in_y in block
                for x, y in walk
            ]
            grid = np.empty(len(order), object)
            grid[:] = [by_place[place] for place in order]
            return grid.reshape(shape)
    return None


def closed_walk(wide: int, high: int) -> list[Place] | None:
    """A Hamiltonian cycle of a grid of `wide` x `high` places, as a list of (x, y); None if there is none."""
    if wide * high <= 2:
        return [(x, y) for y in range(high) for x in range(wide)]
    if min(wide, high) == 1 or wide * high % 2:
        return None
    if high % 2:
        return [(x, y) for y, x in closed_walk(high, wide) or ()]
    walk = [(0, y) for y in range(high)]  # through the first column, then back row by row
    for y in reversed(range(high)):
        row = [(x, y) for x in range(1, wide)]
        walk += row if y % 2 else row[::-1]
    return walk


def _sides(number: int, most_wide: int, most_high: int) -> list[Place]:
    """Sides (w, h) of the rectangles of `number` places that tile one of `most_wide` x `most_high`; squarest first."""
    sides = [(w, number // w) for w in range(1, number + 1) if number % w == 0]
    fitting = [(w, h) for w, h in sides if most_wide % w == 0 and most_high % h == 0]
    return sorted(fitting, key=lambda side: (abs(side[0] - side[1]), -side[0]))
