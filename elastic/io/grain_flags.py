"""Answers grain's own absl flags, so that a script without absl can use grain."""


def mark_grain_flags_parsed() -> None:
    """Grain asks for its own flags, which raises where nobody has parsed the command line. Call it after its import."""
    from absl import flags

    for name in flags.FLAGS:
        if name.startswith("grain_") and not flags.FLAGS.is_parsed():
            flags.FLAGS[name].present = 1
