"""What every call goes through before its service sees it: a valid token, and a client that keeps moving."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from blindtune.server.refusals import Unauthenticated
from blindtune.server.tokens import Tokens
from blindtune.server.watchdog import Watchdog

__all__ = ["DecodeAll", "RequireToken", "WatchClients"]

_HEALTH = "/grpc.health.v1.Health/"
if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Continuation = Callable[[grpc.HandlerCallDetails], _Handler | None]


class RequireToken(grpc.ServerInterceptor):
    """Refuses all calls without a valid token but those of the health service, which tells nothing.

    Args:
        tokens: the valid ones.
        refused: is told of each refusal.
    """

    def __init__(
        self, tokens: Tokens, refused: Callable[[Unauthenticated], None] = lambda error: None
    ) -> None:
        self._tokens = tokens
        self._tell = refused

    def intercept_service(
        self, continuation: "_Continuation", handler_call_details: grpc.HandlerCallDetails
    ) -> "_Handler | None":
        if not handler_call_details.method.startswith(_HEALTH):
            try:
                self._tokens.name_of(handler_call_details.invocation_metadata)
            except Unauthenticated as error:
                self._tell(error)
                return _refused(str(error))
        return continuation(handler_call_details)


def _refused(message: str) -> "_Handler":
    def refuse(messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        context.abort(Unauthenticated.code, message)

    # Whatever the method's kind, as a stream: nobody who may not call is waited for.
    return grpc.stream_stream_rpc_method_handler(refuse)


class DecodeAll(grpc.ServerInterceptor):
    """Lets a service see what can't be decoded as an empty message, which it refuses like any other.

    gRPC alone calls such bytes an internal error of the worker.

    Args:
        service: full name of the service.
    """

    def __init__(self, service: str) -> None:
        self._prefix = f"/{service}/"

    def intercept_service(
        self, continuation: "_Continuation", handler_call_details: grpc.HandlerCallDetails
    ) -> "_Handler | None":
        handler: Any = continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        decode = handler.request_deserializer

        def decoded(data: bytes) -> Any:
            try:
                return decode(data)
            except DecodeError:
                return decode(b"")

        return handler._replace(request_deserializer=decoded) if decode else handler


class WatchClients(grpc.ServerInterceptor):
    """Puts all calls under a watchdog, except those of a service that does so itself.

    Without it, a client that calls and then sends nothing would hold a thread.

    Args:
        watchdog: cancels calls whose clients keep them waiting.
        besides: full names of methods that are left as they are.
    """

    def __init__(self, watchdog: Watchdog, besides: frozenset[str]) -> None:
        self._watchdog = watchdog
        self._besides = besides

    def intercept_service(
        self, continuation: "_Continuation", handler_call_details: grpc.HandlerCallDetails
    ) -> "_Handler | None":
        handler = continuation(handler_call_details)
        if handler is None or handler_call_details.method in self._besides:
            return handler
        behavior: Any
        if not handler.request_streaming:
            behavior = handler.unary_stream or handler.unary_unary
            answer = self._watched_request(behavior)
        elif handler.response_streaming:
            behavior = handler.stream_stream
            answer = self._watched_stream(behavior)
        else:
            raise TypeError(f"{handler_call_details.method} is of a kind that nothing here watches")
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(answer, handler.request_deserializer, handler.response_serializer)

    def _watched_request(self, behavior: Callable[..., Any]) -> Callable[..., Any]:
        """One message, read here as a stream, since gRPC itself would wait for it without end."""

        def answer(messages: Iterator[Any], context: grpc.ServicerContext, *callback: Any) -> Any:
            with self._watchdog.watch(context.cancel) as patience:
                request = next(patience.incoming(messages), None)
            if request is None:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call carries no request")
            return behavior(request, context, *callback)

        # The health service's watch holds no thread: it says so by these.
        for name in ("experimental_non_blocking", "experimental_thread_pool"):
            if hasattr(behavior, name):
                setattr(answer, name, getattr(behavior, name))
        return answer

    def _watched_stream(self, behavior: Callable[..., Any]) -> Callable[..., Any]:
        def answer(messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            with self._watchdog.watch(context.cancel) as patience:
                yield from patience.outgoing(behavior(patience.incoming(messages), context))

        return answer
