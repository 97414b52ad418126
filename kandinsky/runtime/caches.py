"""Which cache a request gets.

The caches themselves are magcache.py, which follows a plan, and adaptive_caches.py, which look at what they skip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from kandinsky.config.schema import Config
from kandinsky.runtime.adaptive_caches import KINDS, AdaptiveCache, Agree
from kandinsky.runtime.magcache import MagCache, cache_for_request
from kandinsky.sampling.sampler import Branch


def cache_maker(
    config: Config, agree: Agree = bool
) -> Callable[[Sequence[bool], Sequence[float]], MagCache | AdaptiveCache] | None:
    """What makes each request its own cache from which of its steps are guided, and how long each is.

    None where the config has no cache.

    agree: makes processes decide alike.
    """
    cache = config.block_cache
    if cache is None:
        return None
    if cache.kind == "magcache":
        settings = replace(config.magcache, threshold=cache.threshold, max_skips=cache.max_skips)
        return partial(cache_for_request, settings)

    def make(guided: Sequence[bool], lengths: Sequence[float]) -> AdaptiveCache:
        steps: dict[Branch, list[int]] = {
            "cond": list(range(len(guided))),
            "uncond": [step for step, is_guided in enumerate(guided) if is_guided],
        }
        blocks = config.model.dit_params.num_visual_blocks
        return KINDS[cache.kind](steps, lengths, blocks, cache.threshold, cache.max_skips, cache.order, agree)

    return make
