"""A stage that runs out of memory is gone on with under settings that take less: what is done by then is kept.

Which settings these are, and how the models are put together under them, is for loading to say (`Frugality` in
parts.py); none of them changes a result by more than rounding. Several processes go on with the same ones together. The
new models are there before the old ones go, so that whatever fails leaves a pipeline that works as it did.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import torch

from kandinsky.common.out_of_memory import of_the_host, ran_out_of_memory
from kandinsky.config.reading import with_settings
from kandinsky.pipelines.parts import Parts, Value
from kandinsky.request import Request

logger = logging.getLogger(__name__)

# What a pipeline takes over from one that was put together under other settings.
REPLACED = ("dit", "vae", "text_embedder", "placement", "execution", "expander", "adapters")


class NothingLessLeft(torch.OutOfMemoryError):
    """A stage ran out of memory, in all processes that work together, and no settings are left that take less."""


class Retries(Parts):
    """Runs parts of a stage until they have the memory that they need."""

    def frugally(self, stage: str, request: Request | None, attempt: Callable[[], Value]) -> Value:
        """What `attempt` returns, in the end: it is called again after the models have been replaced.

        stage: its name as in a plan. request: None where it is not known, or does not matter. Raises NothingLessLeft.
        """
        if self.frugality is None:
            return attempt()
        while True:
            try:
                return self.team.together(attempt)
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # with which goes what the attempt had made
            if not self.take_less(stage, request, failure):
                so_far = f" even with {', '.join(self.taken)}" if self.taken else ", and there are none that take less"
                raise NothingLessLeft(
                    f"{stage} ran out of memory{so_far}: ask for something smaller or shorter, or for weights in fewer "
                    f"bits (runtime.dit_quantization, runtime.qwen_quantization) ({failure})"
                ) from None

    def take_less(self, stage: str, request: Request | None, failure: BaseException) -> bool:
        """Go on with settings under which a stage takes less, and say so; whether there are any.

        Called in all processes at once. Raises what putting the models together raises; nothing has changed then.
        """
        frugality = self.frugality
        if frugality is None:
            return False
        settings = self.team.agree(
            dict(frugality.settings(self.config, request, stage, of_the_host(failure))) if self.team.is_first else {}
        )
        if not settings:
            return False
        words = ", ".join(f"runtime.{name}={value}" for name, value in settings.items())
        if self.team.is_first:
            logger.warning("%s ran out of memory and goes on with %s; set so, it does at once", stage, words)
        _give_back_memory()
        config = with_settings(self.config, runtime=settings)
        try:
            loaded = self.team.together(lambda: frugality.load(config, self))
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            logger.warning("there was not enough memory to put the models together anew: %s", error)
            return False
        self.taken.append(words)
        for pipeline in self.relatives:
            vars(pipeline).update({name: getattr(loaded, name) for name in REPLACED})
            pipeline.config = with_settings(pipeline.config, runtime=settings)
        del loaded
        _give_back_memory()
        return True


def _give_back_memory() -> None:
    """Of models that are gone, which may refer to themselves, too."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU
