"""What the API server may answer instead of what was asked for, as types that callers can tell apart."""

from __future__ import annotations

import msgspec

from tokenfactory.api.meta import Api


class Cause(Api, frozen=True, kw_only=True):
    reason: str = ""
    message: str = ""
    field: str = ""


class StatusDetails(Api, frozen=True, kw_only=True):
    causes: tuple[Cause, ...] = ()
    retry_after_seconds: float = 0


class Status(Api, frozen=True, kw_only=True):
    """The API server's own account of a failure."""

    code: int = 0
    reason: str = ""
    message: str = ""
    details: StatusDetails | None = None


class ApiError(Exception):
    """An answer that is not the one asked for."""

    def __init__(self, doing: str, status: Status, retry_after_seconds: float | None = None) -> None:
        super().__init__(f"{doing}: {status.code} {status.reason}: {status.message}")
        self.status = status
        self.code = status.code
        self.retry_after_seconds = retry_after_seconds


class NotFoundError(ApiError):
    """404: it is not there (or no longer, or its CRD is not installed)."""


class ConflictError(ApiError):
    """409: somebody else was there first; read again and decide anew."""

    @property
    def already_exists(self) -> bool:
        return self.status.reason == "AlreadyExists"


class GoneError(ApiError):
    """410: the history asked for has been compacted; only a fresh list helps."""


class UnauthorizedError(ApiError):
    """401: our credentials have expired or were withdrawn."""


class UnreachableError(Exception):
    """No complete answer. Unless `sent` is false, the API server may have done what was asked."""

    def __init__(self, doing: str, cause: BaseException, *, sent: bool) -> None:
        super().__init__(f"{doing}: no answer from the API server: {cause or type(cause).__name__}")
        self.sent = sent


class UnfitError(UnreachableError):
    """It was done, and the object in the answer does not fit our type: perhaps one of a newer version."""

    def __init__(self, doing: str, cause: BaseException) -> None:
        super().__init__(doing, cause, sent=True)
        self.args = (f"{doing}: done, and the answer cannot be read: {cause}",)


_KINDS: dict[int, type[ApiError]] = {
    401: UnauthorizedError,
    404: NotFoundError,
    409: ConflictError,
    410: GoneError,
}
_decode_status = msgspec.json.Decoder(Status).decode


def error_of(doing: str, code: int, body: bytes, retry_after: str | None = None) -> ApiError:
    """The error for one answer; a body that is no Status (a proxy's page, say) is quoted."""
    try:
        status = _decode_status(body)
    except msgspec.DecodeError:
        status = Status(message=body[:200].decode(errors="replace"))
    if status.code != code:
        status = msgspec.structs.replace(status, code=code)
    seconds = float(retry_after) if retry_after and retry_after.strip().isdigit() else None
    if seconds is None and status.details and status.details.retry_after_seconds:
        seconds = status.details.retry_after_seconds
    return _KINDS.get(code, ApiError)(doing, status, seconds)
