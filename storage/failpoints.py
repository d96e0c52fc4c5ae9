"""Named places where a test may kill the process, to prove that what is left behind can be repaired.

Does nothing unless PERSONA_FAILPOINT names the place.
"""

import os

KILLED = 137  # the status that a shell reports for kill -9


def reach(name: str) -> None:
    """End the process on the spot, without any clean-up, if the environment asks for it here."""
    if os.environ.get("PERSONA_FAILPOINT") == name:
        os._exit(KILLED)
