"""Name of the emulated device of tests (``tests/support/stand_in``), so that its times never pass for a GPU's."""

STAND_IN = "stand-in"


def is_stand_in(name: object) -> bool:
    """Return whether a device of this name is a stand-in for a GPU."""
    return STAND_IN in str(name)
