"""Which of the copies of a program this is that a launcher has started."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kandinsky.common.signals import Stopper
    from kandinsky.config.schema import Config
    from kandinsky.pipelines.base import Pipeline
    from kandinsky.request import Request


class Launch:
    """Which copy of this program this is, of how many that a launcher has started.

    environment: with what torchrun and torch.distributed.launch tell; where they don't, there is one copy.
    """

    def __init__(self, environment: Mapping[str, str], together: bool = True) -> None:
        """together: whether the copies are to meet. Raises ValueError for variables that no launcher has set so."""

        def number(name: str, otherwise: int) -> int:
            text = environment.get(name, str(otherwise))
            if not re.fullmatch("[0-9]{1,9}", text.strip()):
                raise ValueError(f"the variable {name} is {text!r}; a launcher sets it to a number: unset it")
            return int(text)

        self.rank = number("RANK", 0)
        self.size = number("WORLD_SIZE", 1)
        self.local_rank = number("LOCAL_RANK", 0)  # on this machine
        if not self.rank < self.size:
            raise ValueError(f"the variable RANK is {self.rank} of WORLD_SIZE {self.size}: it counts from 0")
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if self.size > 1 and together and missing:
            raise ValueError(
                f"the variable WORLD_SIZE is {self.size}, and {missing[0]}, where they meet, is not set: start them "
                f"with torchrun --nproc-per-node {self.size} test.py ..., or unset WORLD_SIZE"
            )

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    @cached_property
    def processes(self) -> Any:
        """All copies, once they have met; None where there is one."""
        if self.size == 1:
            return None
        from kandinsky.runtime.processes import Processes

        return Processes.join(self.rank, self.size, self.local_rank)

    @cached_property
    def stopper(self) -> Stopper:
        """What signals come to; it is to know the pipeline."""
        from kandinsky.common.signals import Stopper

        return Stopper(self.size > 1, self.is_first)


def load(args: argparse.Namespace, config: Config, launch: Launch, request: Request, **options: Any) -> Pipeline:
    """The pipeline that the flags ask for, ready for `request` and known to what stops it.

    options: of `load_pipeline`, in place of what flags say. Raises as that does.
    """
    from kandinsky.loading.assemble import load_pipeline

    said = {"cache_dir": args.cache_dir, "attention_engine": args.attention_engine, "dtype": args.dtype}
    pipeline = load_pipeline(config, args.device, processes=launch.processes, request=request, **{**said, **options})
    launch.stopper.pipeline = pipeline
    return pipeline
