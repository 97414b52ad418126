"""Signing in to the page where the server has a key: a form that asks for it, and a cookie that says it was right.

The cookie holds no key but a time and its signature, and opens the page alone: programs go on sending the key.
"""

from __future__ import annotations

import time
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from kandinsky.serving.gate import COOKIE, Keys

PATH = "/sign_in"
LASTS = 30 * 24 * 3600  # seconds
LONGEST = 4096  # bytes of the form

FORM = """<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>Kandinsky 5</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { min-height: 90vh; margin: 0; padding: 1rem; display: grid; place-content: center; }
form { display: grid; gap: .75rem; width: min(20rem, calc(100vw - 2rem)); }
h1 { margin: 0; font-size: 1.4rem; } p { margin: 0; }
input, button { font: inherit; padding: .5rem .75rem; border-radius: .4rem; border: 1px solid GrayText; }
button { background: #4f46e5; border-color: #4f46e5; color: white; cursor: pointer; }
</style>
<form method="post" action="sign_in">
<h1>Kandinsky 5</h1>
<p role="alert">WHY</p>
<label for="key">The server's key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Sign in</button>
</form>
</html>"""


def form(why: str = "This server has a key.", status: int = 200) -> Response:
    return HTMLResponse(FORM.replace("WHY", why), status, {"Cache-Control": "no-store"})


async def sign_in(request: Request, keys: Keys) -> Response:
    """What the form sends: the page, or the form again."""
    body = await request.body()
    if len(body) > LONGEST:
        return form("That is too long to be the key.", 401)
    given = parse_qs(body.decode("utf-8", "replace")).get("key", [""])[0]
    if not keys.fits(f"Bearer {given}"):
        return form("That is not the key.", 401)
    response = RedirectResponse("./", 303)
    secure = request.headers.get("x-forwarded-proto", request.url.scheme) == "https"
    response.set_cookie(
        COOKIE, keys.pass_until(int(time.time()) + LASTS), LASTS, httponly=True, samesite="strict", secure=secure
    )
    return response
