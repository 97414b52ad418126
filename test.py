"""Make a video or a picture: python test.py --config configs/config_tiny_t2v.yaml --prompt "..." [--image FILE]

The config's `task` says what is made and whether a picture is needed; its file's name decides nothing.

The command line turns words into one checked `Request` before anything heavy is imported or loaded; everything else
happens in the `kandinsky` package. A flag that is not given leaves what the YAML says.

Several GPUs make one output together where a launcher starts this program once for each of them:

    torchrun --nproc-per-node 4 test.py ...        python -m torch.distributed.launch --nproc-per-node 4 test.py ...
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # until signals are heeded (below), and while Python ends: imports take a while
    import os
    import signal
    from types import FrameType

    def interrupted_early(number: int, frame: FrameType | None) -> None:
        os.write(2, b"interrupted\n")
        os._exit(128 + number)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, interrupted_early)

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import join

from kandinsky.commands.decode import finish
from kandinsky.commands.extend import extend
from kandinsky.commands.flags import FIXED_BY_A_FILE, build_parser, check_strays
from kandinsky.commands.generate import run
from kandinsky.commands.launch import Launch
from kandinsky.commands.many import run_many
from kandinsky.commands.plan import plan
from kandinsky.commands.resume import resume

PROMPT_OF_A_BARE_LAUNCH = "The bear plays balalaika."


def main(arguments: Sequence[str] | None = None) -> int:
    from kandinsky.common.command_line import show_every_character

    show_every_character()
    parser = build_parser()
    words = sys.argv[1:] if arguments is None else arguments
    # torch.distributed.launch adds the number that it also has in the environment, with a name like no flag of ours.
    own = [word for word in words if not word.startswith(("--local-rank=", "--local_rank="))]
    args = parser.parse_intermixed_args(own)
    check_strays(parser, args, words)
    if not own and "LOCAL_RANK" in os.environ:  # the original's example of a launch names nothing at all
        args.prompt = PROMPT_OF_A_BARE_LAUNCH
    # Longer by nothing is the plain run, unless it is a clip that is to be longer.
    is_long = args.segments is not None or bool(args.extend) or (args.extend is not None and args.video is not None)
    if args.resume and args.prompts_file is None and not is_long:
        parser.error(
            "--resume is for many prompts: give --prompts_file, or for a video of segments --extend or --segments; one "
            "run that was stopped is gone on with by --resume_from FILE"
        )
    starts = (args.prompt, args.prompts_file, args.decode_latents, args.resume_from, args.segments)
    if all(given is None for given in starts) and not args.plan:
        parser.error("the following arguments are required: --prompt")
    for flag in ("prompts_file", "resume_from"):
        if args.plan and getattr(args, flag) is not None:
            parser.error(f"--plan is for one request, or for --decode_latents: leave --{flag} out")
    for flag in ("memory_gb", "host_memory_gb"):
        if getattr(args, flag) is not None and not args.plan:
            parser.error(f"--{flag} says for which machine --plan is made: give --plan, or leave it out")
    if args.processes is not None and not args.plan:
        parser.error("--processes is for --plan: several processes are started by torchrun (docs/gpus.md)")
    work = finish if args.decode_latents is not None else resume if args.resume_from is not None else run
    if work is not run:
        given = [flag for flag in FIXED_BY_A_FILE if getattr(args, flag) is not None]
        if given:
            flag = "decode_latents" if work is finish else "resume_from"
            parser.error(f"--{flag} goes on from a file that settles this: leave out --{', --'.join(given)}")
    for flag in ("prompt", "extend"):
        if args.segments is not None and getattr(args, flag) is not None:
            parser.error(f"--segments has its own prompts and seconds: leave --{flag} out")
    for flag in ("extend", "segments", "save_last_frame"):
        if getattr(args, flag) is not None and args.prompts_file is not None:
            parser.error(f"--{flag} is for one video that is made: leave --{flag} or --prompts_file out")
    if args.save_last_frame and args.plan:
        parser.error("--save_last_frame is for a video that is made: leave --save_last_frame or --plan out")
    for flag in ("overlap", "no_colour_match"):
        if getattr(args, flag) is not None and args.extend is None and args.segments is None:
            parser.error(f"--{flag} is about segments: give --extend SECONDS or --segments FILE")
    for flag in ("data_parallel", "ray_address", "ray_actors", "ray_gpus"):
        if getattr(args, flag) and args.prompts_file is None:
            parser.error(f"--{flag} is for many prompts: give --prompts_file")
    work = extend if is_long and work is run else work
    # How long a CPU thread that waits for the others spins before it sleeps, read when torch is loaded. As long as GNU
    # OpenMP does it by default (300,000), a tiny model is 60 times slower wherever another program runs on the machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # Read when torch is loaded, too: memory that is given back can be given out again in another size. Not where
    # somebody has set it, under either of its names.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # Processes that share a file of prompts have nothing to do with each other.
    try:
        launch = Launch(os.environ if args.prompts_file is None else {})
    except ValueError as error:
        return fail(Launch({}), error)
    who = f"rank {os.environ.get('RANK')}: " if args.data_parallel else ""
    level = logging.INFO if launch.is_first else logging.ERROR
    logging.basicConfig(level=level, format=f"{who}%(message)s", stream=sys.stderr)
    # Libraries report every file they open at this level; their warnings stay.
    for library in ("httpx", "httpx2", "torch"):  # torch reports its caches when it is interrupted as it is imported
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what is wrong with a picture is ours to say
    from kandinsky.common.signals import stop_on_signals

    with stop_on_signals(launch.stopper):
        return work_on(work, args, words, launch)


def work_on(
    work: Callable[[argparse.Namespace, Launch], Path | None],
    args: argparse.Namespace,
    words: Sequence[str],
    launch: Launch,
) -> int:
    """Do what flags ask for, and tell how it ended; the exit status."""
    from kandinsky.common.given import check_device_name

    try:
        if args.device is not None:
            check_device_name(args.device)
        if args.plan:
            print(plan(args))
            return 0
        if args.prompts_file is not None:
            return 1 if run_many(args, launch) else 0
        output = work(args, launch)
        if launch.is_first:
            print(output, flush=True)
        if launch.processes is not None:
            launch.processes.leave()
    except (ValueError, OSError) as error:
        return fail(launch, *getattr(error, "mistakes", [error]))
    except KeyboardInterrupt as stop:
        return interrupted(stop, args, words, launch)
    except Exception as error:
        from kandinsky.common.out_of_memory import of_the_host, ran_out_of_memory

        if ran_out_of_memory(error):
            whose = "host" if of_the_host(error) else "GPU"
            advice = "--plan says what fits; or try a smaller --width and --height, or less duration"
            return fail(launch, f"out of {whose} memory: {advice} ({' '.join(str(error).split())})")
        if args.data_parallel:
            logging.error("failed unexpectedly", exc_info=error)
            return 1
        if launch.size == 1:
            raise
        launch.processes.fail(error)
    return 0


def interrupted(stop: KeyboardInterrupt, args: argparse.Namespace, words: Sequence[str], launch: Launch) -> int:
    """Say what there is and how to go on from it; the exit status."""
    from kandinsky.common.writing import Kept
    from kandinsky.outputs.resume import Stopped

    file = args.decode_latents or args.resume_from
    is_long = args.extend is not None or args.segments is not None
    if is_long and args.output_filename is not None:
        more = [] if args.resume else ["--resume"]
        more += [] if "--output_filename" in words else ["--output_filename", str(args.output_filename)]
        how = f"finished segments are kept; go on with: python test.py {join([*words, *more])}"
    elif isinstance(stop, Kept) and args.prompts_file is None:
        launcher = "python" if launch.size == 1 else f"torchrun --nproc-per-node {launch.size}"
        how = f"{stop}; go on with: {launcher} test.py {stop.flags}"
    elif str(args.prompts_file) == "-":
        how = "what was made is there; the same lines with --resume go on with the others"
    elif args.prompts_file is not None:
        kept = f"{stop}; " if isinstance(stop, Kept) else ""
        same = f": python test.py {join(words if args.resume else [*words, '--resume'])}"
        how = f"{kept}the same command with --resume goes on{'' if args.data_parallel else same}"
    elif file is not None:
        how = f"{file} is still there, and the same command goes on from it"
    else:
        how = "nothing was written"
    if launch.is_first:
        print(f"interrupted; {how}", file=sys.stderr, flush=True)
    if launch.size > 1 and "processes" in vars(launch):  # otherwise they have not met yet
        if isinstance(stop, Stopped):  # all of them have
            launch.processes.leave()
        else:
            launch.processes.interrupted(launch.stopper.status)
    return launch.stopper.status


def fail(launch: Launch, *mistakes: object) -> int:
    from kandinsky.common.given import LONGEST_LINE, shortened

    if launch.size > 1:
        launch.processes.fail("; ".join(map(str, mistakes)), 2)
    for what in mistakes:
        print("error:", shortened(str(what), LONGEST_LINE), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
