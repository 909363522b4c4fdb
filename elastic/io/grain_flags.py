"""Marks grain's absl flags as parsed, so that a script without absl can use grain."""


def mark_grain_flags_parsed() -> None:
    """Marks grain's own flags as parsed; call it after importing grain.

    Grain reads these flags, and absl raises where nobody has parsed the command line.
    """
    from absl import flags

    for name in flags.FLAGS:
        if name.startswith("grain_") and not flags.FLAGS.is_parsed():
            flags.FLAGS[name].present = 1
