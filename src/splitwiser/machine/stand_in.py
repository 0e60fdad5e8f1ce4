"""The mark of a device that only tests have (``tests/support/stand_in``): no time or rate of it may pass for a GPU's."""

STAND_IN = "stand-in"


def is_stand_in(name: object) -> bool:
    """Whether a device of this name is a stand-in for a GPU."""
    return STAND_IN in str(name)
