"""The HTML of the page that is no form: a job while it is made, its output, the gallery, and what a request will take.

Everything that people wrote is escaped, braces and dollars too: Gradio takes them for its templates.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

ENDED = ("done", "failed", "cancelled")
SETTINGS = {
    "model": "Model",
    "size": "Size",
    "seconds": "Seconds",
    "seed": "Seed",
    "steps": "Steps",
    "guidance": "Guidance",
    "negative_prompt": "Negative prompt",
    "scheduler_scale": "Scheduler scale",
    "magcache": "MagCache",
    "loras": "Adapters",
    "strength": "Strength",
    "loop": "Loop",
    "overlap": "Overlap",
    "fps": "Frames a second",
    "upscale": "Larger",
}
TASKS = {"t2v": "Video", "i2v": "Animate", "t2i": "Picture", "i2i": "Edit"}  # short: four have to fit beside each other
STAGES = {
    "queued": "Waiting for its turn",
    "loading": "Loading the model",
    "encoding": "Reading the prompt",
    "denoising": "Drawing",
    "decoding": "Making pixels of it",
}


def safe(text: object) -> str:
    escaped = html.escape(str(text))
    return re.sub(r"[${}`\\]", lambda found: f"&#{ord(found[0])};", escaped)


def button(action: str, job_id: str, words: str) -> str:
    return f'<button type="button" data-action="{action}" data-id="{safe(job_id)}">{words}</button>'


def link(url: str, words: str, download: bool = False) -> str:
    """To one of the server's files; signed links have a query already."""
    if download:
        url += ("&" if "?" in url else "?") + "download=true"
    return f'<a href="{safe(url)}" download>{words}</a>'


def nothing_yet() -> str:
    return '<p class="k-empty">What you make appears here.</p>'


def mistake(sentence: str) -> str:
    return f'<p class="k-error" role="alert">{safe(sentence[:1].upper() + sentence[1:])}</p>'


def watched(job: dict[str, Any]) -> str:
    """A job as it is now."""
    if job["state"] == "done":
        return output(job)
    if job["state"] in ENDED:
        words = "It was cancelled." if job["state"] == "cancelled" else (job["error"] or {}).get("message", "It failed")
        return mistake(words)
    stage = STAGES.get(job["stage"] or "", "Working")
    steps = f" <span>step {job['step']} of {job['steps']}</span>" if job["stage"] in ("denoising", "decoding") else ""
    picture = ""
    if url := job["urls"]["preview"]:  # the step makes it another picture for the browser
        url += f"{'&' if '?' in url else '?'}step={job['step']}"
        picture = f'<img class="k-preview" src="{safe(url)}" alt="What there is of it so far">'
    return (
        f'<div class="k-running" role="status" data-step="{job["step"]}">'
        f'<p><b>{stage}</b>{steps}</p><progress max="100" value="{job["progress"]}"></progress>{picture}</div>'
    )


def output(job: dict[str, Any]) -> str:
    """What a job has made, with its files and settings."""
    urls, is_video = job["urls"], job["kind"] == "video"
    source = safe(urls["content"])
    shown = (
        f'<video class="k-output" src="{source}" controls autoplay muted loop playsinline></video>'
        if is_video
        else f'<img class="k-output" src="{source}" alt="{safe(job["settings"]["prompt"])}">'
    )
    took = sum(job["seconds"].values()) if job["seconds"] else None
    files = link(urls["content"], "MP4" if is_video else "PNG", download=True), link(urls["record"], "JSON")
    return (
        f'<div class="k-done" data-id="{safe(job["id"])}">{shown}<p class="k-links">{" ".join(files)}'
        f"<span>{'' if took is None else f'made in {duration(took)}'}</span></p>{settings(job)}</div>"
    )


def settings(job: dict[str, Any]) -> str:
    values = {name: job["settings"].get(name) for name in SETTINGS}
    if job["kind"] == "image":
        del values["seconds"]
    rows = "".join(
        f"<dt>{SETTINGS[name]}</dt><dd>{safe(', '.join(value) if isinstance(value, list) else _word(value))}</dd>"
        for name, value in values.items()
        if value not in (None, "", [])
    )
    return f"<details><summary>Settings</summary><p>{safe(job['settings']['prompt'])}</p><dl>{rows}</dl></details>"


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def gallery(jobs: Sequence[dict[str, Any]]) -> str:
    if not jobs:
        return '<p class="k-empty">Nothing was made yet.</p>'
    return f'<div class="k-gallery">{"".join(card(job) for job in jobs)}</div>'


def card(job: dict[str, Any]) -> str:
    urls, prompt = job["urls"], safe(job["settings"]["prompt"] or "no words")
    buttons = [button("use", job["id"], "Use these")]
    if job["state"] == "done":
        buttons.insert(0, button("show", job["id"], "Show"))
        buttons += [link(urls["content"], "MP4" if job["kind"] == "video" else "PNG", download=True)]
        buttons += [link(urls["record"], "JSON"), button("delete", job["id"], "Delete")]
        face = f'<img src="{safe(urls["thumbnail"])}" alt="" loading="lazy">'
    elif job["state"] in ENDED:
        buttons += [button("delete", job["id"], "Delete")]
        face = f'<p class="k-face">{safe(job["state"])}</p>'
    else:
        buttons.insert(0, button("show", job["id"], "Watch"))
        face = f'<p class="k-face">{safe(job["state"])}</p>'
    why = mistake(job["error"]["message"]) if job["state"] == "failed" and job["error"] else ""
    return (
        f'<article class="k-card" data-id="{safe(job["id"])}">{face}<p class="k-prompt" title="{prompt}">{prompt}</p>'
        f"{why}{settings(job)}<p class=k-links>{' '.join(buttons)}</p></article>"
    )


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def plan(found: dict[str, Any]) -> str:
    """What a request will take, in a line."""
    memory, seconds, until = found["memory"], found["seconds"], found["seconds_until_free"]
    parts = ["time is known after the first one" if seconds is None else f"about {duration(seconds)}"]
    if memory is None:
        parts.append("memory is known once a model is loaded")
    else:
        if memory["gpu_peak_gb"] is not None:
            parts.append(f"{memory['gpu_peak_gb']:.1f} of {memory['gpu_gb']:.0f} GB on the GPU")
        parts.append(f"{memory['host_peak_gb']:.1f} of {memory['host_gb']:.0f} GB of memory")
    if until:
        parts.append(f"its turn comes in {duration(until)}")
    words = f"<p class=k-plan><b>It will take</b> {safe(', '.join(parts))}.</p>"
    return words + (mistake(memory["refusal"]) if memory and memory["refusal"] else "")
