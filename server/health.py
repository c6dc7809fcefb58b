"""The standard health service, for whoever is allowed to connect, and so bounded.

The library's own way to watch without a thread sends under the lock that all health checks need, and lets
the thread that serves the connections wait for that lock. A client that takes nothing, or goes away at the
wrong moment, could stop the whole worker. So each watch has a thread here, and there are few of them.
It also keeps every name that anybody ever watched, so none but those that there are can be watched here.
"""

import threading
from collections.abc import Iterator

import grpc
from grpc_health.v1 import health, health_pb2

__all__ = ["HealthService"]


class HealthService(health.HealthServicer):
    """Answers checks, and a bounded number of watches.

    Args:
        watches: how many at a time; more are refused, and may check instead.
    """

    def __init__(self, watches: int) -> None:
        super().__init__(experimental_non_blocking=False)
        self._free = threading.BoundedSemaphore(watches)

    def List(
        self, request: health_pb2.HealthListRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthListResponse:
        # The library's raises, and the log would get a traceback for each call of a stranger.
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "use Check")

    def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> Iterator[health_pb2.HealthCheckResponse]:
        if self.Check(request, context).status == health_pb2.HealthCheckResponse.UNKNOWN:
            context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service here")
        if not self._free.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watch already: use Check")
        try:
            yield from super().Watch(request, context)
        finally:
            self._free.release()
