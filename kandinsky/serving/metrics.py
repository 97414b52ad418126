"""The engine's state as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kandinsky.serving.engine import Engine


class EngineMetrics(Collector):
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("kandinsky_jobs", "Jobs that there are, by state.", labels=["state"])
        for state, count in self.engine.store.counts().items():
            jobs.add_metric([state], count)
        yield jobs
        ended = CounterMetricFamily(
            "kandinsky_jobs_ended", "Jobs that ended since the start.", labels=["model", "state"]
        )
        for (model, state), count in list(self.engine.ended.items()):
            ended.add_metric([model, state], count)
        yield ended
        seconds = CounterMetricFamily(
            "kandinsky_stage_seconds", "Seconds in each stage of the jobs that were done.", labels=["model", "stage"]
        )
        for (model, stage), total in list(self.engine.stage_seconds.items()):
            seconds.add_metric([model, stage], total)
        yield seconds


def exposition(engine: Engine) -> bytes:
    """The text of /metrics."""
    registry = CollectorRegistry()
    registry.register(EngineMetrics(engine))
    return generate_latest(registry)
