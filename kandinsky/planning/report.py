"""A plan as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence

from kandinsky.planning.plan import Plan
from kandinsky.planning.stages import num_tokens
from kandinsky.planning.words import gb_text, yaml_text
from kandinsky.request import Request


def report_of_segments(requests: Sequence[Request], overlap: int, seconds: float, rate: float) -> str:
    """What all segments of a longer video come to; memory is that of the largest, as one is made after the other.

    seconds: of denoising, at `rate` floating point operations a second; both assumed.
    """
    steps, frames = sum(one.num_steps for one in requests), max(one.num_frames for one in requests)
    minutes = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    before = "last frame" if overlap == 1 else f"last {overlap} frames"
    return (
        f"{len(requests)} segments, one after the other, each from the {before} of what is there; above is the "
        f"largest, of {frames} frames. All of them: {steps} steps, {minutes} of denoising at {rate / 1e12:g} TFLOP/s, "
        "and what settings cost above once for each segment"
    )


def report(plan: Plan) -> str:
    """The plan as a person reads it: a table of the stages, the settings, and their costs."""
    request, runtime = plan.request, plan.config.runtime
    frames = "1 picture" if request.is_image else f"{request.num_frames} frames"
    source = plan.config.source.name if plan.config.source else plan.config.task
    lines = [
        f"{source}: {frames} of {request.width}x{request.height}, {num_tokens(plan.config, request):,} tokens, "
        f"{request.num_steps} steps; {plan.machine.words}; GB of 2^30 bytes",
        "",
        f"{'stage':14}{'weights':>9}{'besides':>9}{'GPU, peak':>11}{'host, peak':>12}",
    ]
    for stage in plan.stages:
        numbers = (stage.weights, stage.activations, stage.gpu, stage.host)
        cells = ["-" if not number else gb_text(number) for number in numbers]
        lines.append(f"{stage.name:14}{cells[0]:>9}{cells[1]:>9}{cells[2]:>11}{cells[3]:>12}")
    if plan.machine.processes > 1:
        lines.append("of the first process, which alone has the text encoders; on the host, of all that share it")
    if mapped := max(stage.mapped for stage in plan.stages):
        lines.append(
            f"and up to {gb_text(mapped)} GB of mapped weight files, which the host drops where it needs the room"
        )
    lines += [
        "",
        f"settings: {' '.join(f'runtime.{n}={yaml_text(v)}' for n, v in plan.settings.items() if v is not None)}",
    ]
    lines.append(f"  because {plan.reason}")
    lines += [f"  {cost}" for cost in plan.costs]
    if plan.overrides:
        lines.append(f"it also takes, and changes some pixels: {' '.join(plan.overrides)}")
    quantized = [
        f"{name}={yaml_text(value)}" for name, value in vars(runtime).items() if "quantization" in name and value
    ]
    if quantized:
        lines.append(f"as asked for, and changes results: {' '.join(f'runtime.{word}' for word in quantized)}")
    if runtime.qwen_quantization or runtime.dit_quantization == "nf4":
        lines.append("nf4 needs a package: pip install bitsandbytes")
    return "\n".join(lines)
