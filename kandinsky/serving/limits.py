"""How much a client may ask for: bounds of what is sent, of what waits, and of what one job makes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of a server; what a pipeline can do at all is for request.py and plan.py to say."""

    body_mb: int = 32  # of a request, its files included; MB of 10^6 bytes
    pixels: int = 200_000_000  # of a job: width x height x frames; 5 s of 1280x768 have 119 million
    written: int = 4_000_000_000  # likewise, after more frames and larger ones are made of them
    segments: int = 20  # of a longer video; each has as many pixels as a job may have
    clip_seconds: int = 120  # of a video that one goes on from
    files: int = 20  # of a request
    prompt: int = 8_000  # characters
    queue: int = 500  # jobs that wait
    images: int = 10  # of a request
    body_seconds: float = 60  # without a byte of the request's body
