"""Each class of error becomes one HTTP status and one code; `tests` show that no class is missing."""

from __future__ import annotations

import math
from typing import Any

from lorasmith import errors

# class → (status, `type` as OpenAI names it, `code`)
STATUS: dict[type[errors.LoraSmithError], tuple[int, str, str]] = {
    errors.ConfigError: (400, "invalid_request_error", "invalid_value"),
    errors.TargetError: (400, "invalid_request_error", "invalid_target"),
    errors.AdapterFileError: (422, "invalid_request_error", "invalid_adapter"),
    errors.BaseMismatchError: (409, "invalid_request_error", "base_mismatch"),
    errors.DataError: (400, "invalid_request_error", "invalid_prompt"),
    errors.BudgetError: (400, "invalid_request_error", "context_length_exceeded"),
    errors.UnknownAdapterError: (404, "invalid_request_error", "model_not_found"),
    errors.AccessError: (401, "authentication_error", "invalid_api_key"),
    errors.OverloadedError: (429, "rate_limit_error", "rate_limit_exceeded"),
    errors.DeadlineError: (504, "server_error", "deadline_exceeded"),
    errors.UnavailableError: (503, "server_error", "unavailable"),
    errors.OutputError: (507, "server_error", "storage"),
    errors.EngineError: (500, "server_error", "engine"),
    errors.MergeLossError: (422, "invalid_request_error", "merge_loss"),
    errors.MergeStateError: (500, "server_error", "internal"),
    errors.TrainingError: (500, "server_error", "internal"),
    errors.BaseNotFoundError: (500, "server_error", "internal"),
    errors.LoraSmithError: (500, "server_error", "internal"),
}
# 404, 405, 413 … have no class of their own: they never leave the HTTP layer.
HTTP_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "body_timeout",
    413: "body_too_large",
    415: "not_json",
}


def status_of(error: Exception) -> int:
    """The status of an error; 500 for what nobody raised on purpose."""
    return _entry(error)[0]


def body_of(error: Exception, request_id: str) -> dict[str, Any]:
    """The error as OpenAI's clients read it. What went wrong inside stays in the log."""
    status, kind, code = _entry(error)
    is_inner = status in (500, 507)
    message = f"the server failed; its log has the reason under {request_id}" if is_inner else str(error)
    return error_body(message, kind, code, request_id)


def error_body(
    message: str, kind: str, code: str, request_id: str, param: str | None = None
) -> dict[str, Any]:
    """One error object."""
    inner = {"message": message, "type": kind, "param": param, "code": code, "request_id": request_id}
    return {"error": inner}


def headers_of(error: Exception) -> dict[str, str]:
    """`Retry-After` where asking again makes sense."""
    if isinstance(error, errors.OverloadedError):
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    return {"retry-after": "5"} if isinstance(error, errors.UnavailableError) else {}


def _entry(error: Exception) -> tuple[int, str, str]:
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return STATUS[errors.LoraSmithError]
