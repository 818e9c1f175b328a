"""The one shape of this package's errors: where, what was found, what was expected, and the fix."""


class InputError(ValueError):
    """Bad input, said in one line.

    Args:
        where: the file, row, cell or setting that is wrong.
        found: what is there.
        expected: what should be there.
        fix: what the reader can do now.

    Example:
        >>> print(InputError("MAX_STEPS", found="0", expected="1 or more", fix="set MAX_STEPS to 60"))
        MAX_STEPS: found 0, expected 1 or more. Fix: set MAX_STEPS to 60.
    """

    def __init__(self, where: str, *, found: str, expected: str, fix: str):
        self.where, self.found, self.expected, self.fix = where, found, expected, fix
        super().__init__(f"{where}: found {found}, expected {expected}. Fix: {fix}.")

    def _render_traceback_(self) -> list[str]:
        """IPython shows this instead of a traceback: the one line that the reader needs."""
        return [f"{type(self).__name__}: {self}"]
