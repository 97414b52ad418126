"""`--download`: the weights that are missing, fetched first."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kandinsky.commands.launch import Launch

if TYPE_CHECKING:
    from kandinsky.config.schema import Config


def download(args: argparse.Namespace, config: Config, launch: Launch) -> None:
    """With --download, the weights that are missing.

    Of several processes the first one fetches them, then the first one of each other machine, if that has its own disk.
    """
    if not args.download:
        return
    from kandinsky.checkpoints import hub

    def fetch() -> None:
        hub.download(hub.sources(config, args.cache_dir, only_missing=True), args.cache_dir, args.hf_token)

    if launch.is_first:
        fetch()
    if launch.processes is not None:
        launch.processes.wait_for_all("the first download")
        if launch.local_rank == 0 and not launch.is_first:
            fetch()
        launch.processes.wait_for_all("downloads")
