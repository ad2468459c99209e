"""The errors that users meet. Each message says what was wrong, the value seen, what was expected and what to do."""


class GrassError(Exception):
    """Something failed that is not the user's input; the command line ends with exit code 1."""

    exit_code = 1


class UsageError(GrassError, ValueError):
    """The input was wrong; nothing has been computed. The command line ends with exit code 2."""

    exit_code = 2


class SpecError(UsageError):
    """A compression or Hessian string that cannot be parsed, or does not fit the number of parameters."""


class DataError(UsageError):
    """A data set that is missing, damaged or of another shape than expected."""


class BankError(GrassError):
    """A retraining bank that is damaged or belongs to another recipe, data set or plan."""


class RecordError(GrassError):
    """A run record that does not follow its schema."""


class StoreError(GrassError):
    """A gradient store that is damaged, incomplete, of another fingerprint, or cannot be written."""


class NoStoreError(StoreError, UsageError):
    """A folder without a gradient store was named."""


class BusyError(GrassError):
    """Another process is at work on the same thing."""


class BaselineError(GrassError):
    """Another system, run for comparison, failed or was killed in its own process."""
