"""The one exception of this package."""


class LodestreamError(Exception):
    """What the daemon refused, or what this client could not do.

    code: stable text, such as ``source.file.not_found``.
    message: what happened and what to do.
    retryable: whether the same call may succeed later.
    kept: what is still in place.
    """

    code: str
    message: str
    retryable: bool
    kept: str

    def __init__(self, code: str, message: str, retryable: bool = False, kept: str = "") -> None:
        super().__init__(code, message, retryable, kept)
        self.code = code
        self.message = message
        self.retryable = retryable
        self.kept = kept

    def __str__(self) -> str:
        kept = f"; kept: {self.kept}" if self.kept else ""
        return f"{self.message} [{self.code}]{kept}"
