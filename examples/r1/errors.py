"""What ends a run with a message rather than a traceback."""


class RunError(ValueError):
    """A run cannot go on. The message says why, and what to do."""
