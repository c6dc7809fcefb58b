"""The figures of a client for Prometheus: what passed between it and its operators.

    registry.register(Collector(model))

Counts, sizes and times. Nothing of the data, and neither loss nor accuracy: they are private, and whoever
reads metrics is not always who may see them.
"""

from collections.abc import Iterator
from importlib.metadata import version

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector as PrometheusCollector
from torch import nn

from blindtune.client.operators.operator import OperatorStatistics
from blindtune.client.operators.policy import Failure
from blindtune.client.rounds.certified import Certificates
from blindtune.client.rounds.multiplier import PrivateMultiplier

__all__ = ["Collector"]

_PREFIX = "blindtune_client"
# By attribute of `OperatorStatistics`.
_PER_OPERATOR = {
    "requests": ("requests", "Requests that were sent, retries included."),
    "retries": ("retries", "Requests that were sent again since an attempt had failed."),
    "hedges": ("hedges", "Requests that were sent to a replica while another worker was taking long."),
    "hedges_won": ("hedges_won", "Of those, the ones that were answered first."),
    "rows": ("rows", "Rows of the operands of requests."),
    "bytes_sent": ("sent_bytes", "Payload of requests, without the framing of gRPC and TLS."),
    "bytes_received": ("received_bytes", "Payload of answers, without the framing of gRPC and TLS."),
    "verified_responses": ("verified_responses", "Answers that passed their check."),
    "verification_seconds": ("verification_seconds", "Seconds that checking answers took."),
}


class Collector(PrometheusCollector):
    """What a model's multiplier counts, read whenever it is asked for.

    Args:
        source: a model with remote layers, or its multiplier. Layers in this process alone count rounds only.

    Raises:
        ConfigurationError: the model has no remote layers.
    """

    def __init__(self, source: nn.Module | PrivateMultiplier) -> None:
        if isinstance(source, PrivateMultiplier):
            self._multiplier = source
        else:
            from blindtune.client.model.quantizer import multiplier_of

            self._multiplier = multiplier_of(source)

    def describe(self) -> Iterator[Metric]:
        return _families({})

    def collect(self) -> Iterator[Metric]:
        yield from _families(self._multiplier.statistics())
        rounds = self._multiplier.rounds()
        yield CounterMetricFamily(
            f"{_PREFIX}_rounds", "Products that were asked of all operators at once.", rounds.count
        )
        yield CounterMetricFamily(
            f"{_PREFIX}_round_seconds", "Seconds from asking to the last verified answer.", rounds.seconds
        )
        certified = self._multiplier.certified
        yield from _certificates(Certificates() if certified is None else certified.certificates())
        yield InfoMetricFamily(f"{_PREFIX}_build", "What this client is.", {"version": version("blindtune")})


def _certificates(found: Certificates) -> Iterator[Metric]:
    yield CounterMetricFamily(
        f"{_PREFIX}_wrapped_rows", "Rows whose results wrapped around, and were corrected.", found.wraps
    )
    yield CounterMetricFamily(
        f"{_PREFIX}_rows_asked_again", "Rows that were asked for again since they wrapped.", found.reasks
    )
    yield CounterMetricFamily(
        f"{_PREFIX}_decoding_seconds", "Seconds that telling wraps took.", found.decoding_seconds
    )
    scale = GaugeMetricFamily(
        f"{_PREFIX}_scale_part",
        "Part of the proven bound that results are expected to take.",
        labels=["product"],
    )
    precision = GaugeMetricFamily(
        f"{_PREFIX}_expected_error", "Relative error to be expected of results.", labels=["product"]
    )
    for label, of_product in found.scales.items():
        scale.add_metric([label], of_product.part)
        precision.add_metric([label], of_product.precision)
    yield from (scale, precision)


def _families(statistics: dict[str, OperatorStatistics]) -> Iterator[Metric]:
    for attribute, (name, text) in _PER_OPERATOR.items():
        family = CounterMetricFamily(f"{_PREFIX}_{name}", text, labels=["operator"])
        for operator, figures in statistics.items():
            family.add_metric([operator], getattr(figures, attribute))
        yield family
    lies = CounterMetricFamily(f"{_PREFIX}_lies", "Answers that failed their check.", labels=["operator"])
    failures = CounterMetricFamily(
        f"{_PREFIX}_failures", "Requests that failed, by how they did.", labels=["operator", "kind"]
    )
    excluded = GaugeMetricFamily(
        f"{_PREFIX}_workers_excluded", "Workers that are not asked again in this run.", labels=["operator"]
    )
    aside = CounterMetricFamily(
        f"{_PREFIX}_workers_set_aside",
        "Times that a worker was set aside since it was silent again and again.",
        labels=["operator"],
    )
    for operator, figures in statistics.items():
        aside.add_metric([operator], len(figures.set_aside))
        lies.add_metric([operator], len(figures.lies))
        excluded.add_metric([operator], len({x.worker for x in figures.excluded}))
        for kind in Failure:
            failures.add_metric([operator, kind.name.lower()], figures.failures[kind])
    yield from (lies, failures, excluded, aside)
