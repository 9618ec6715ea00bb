"""The admin API behind a token, for the loopback listener that ``--admin`` opens."""

from __future__ import annotations

import hmac

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send


def with_token(app: ASGIApp, tokens: tuple[str, ...]) -> ASGIApp:
    """``app`` for those who send ``Authorization: Bearer`` with one of ``tokens``; 401 for the others, before anything
    else of the request is read. Raises ValueError without tokens: nobody is let in by an empty file.
    """
    if not tokens:
        raise ValueError("the admin API on TCP needs a token")
    known = [token.encode() for token in tokens]

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        # Each is compared, in constant time: the time tells neither which nor how much of one was right.
        is_known = sum(hmac.compare_digest(given.strip(), token) for token in known) > 0
        if scheme.lower() == b"bearer" and is_known:
            await app(scope, receive, send)
            return
        message = "the admin API needs its token: send `Authorization: Bearer <token>` (lloomctl: --token-file FILE)"
        error = {"error": {"code": "invalid_token", "message": message}}
        await JSONResponse(error, status_code=401, headers={"www-authenticate": "Bearer"})(scope, receive, send)

    return guarded
