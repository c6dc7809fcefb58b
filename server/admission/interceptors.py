"""What every call goes through before its service sees it: a token, a place, and a client that moves."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from blindtune.server.admission.gate import Gate
from blindtune.server.admission.identity import Identify
from blindtune.server.admission.pools import AtOnce
from blindtune.server.admission.refusals import Busy, Refusal, Unauthenticated
from blindtune.server.admission.strangers import Strangers
from blindtune.server.admission.tokens import Tokens
from blindtune.server.admission.watchdog import Patience, Watchdog

__all__ = ["DecodeAll", "RequireToken", "WatchClients"]

_HEALTH = "/grpc.health.v1.Health/"
# The attribute by which gRPC's server lets a handler name its pool.
_POOL = "experimental_thread_pool"
_at_once = AtOnce()
if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Inside = Callable[[grpc.ServicerContext], AbstractContextManager[Patience]]
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
                return _refused(error)
        return continuation(handler_call_details)


def _refused(refusal: Refusal) -> "_Handler":
    def refuse(messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        context.abort(refusal.code, str(refusal))

    setattr(refuse, _POOL, _at_once)
    # Whatever the method's kind, as a stream: nobody who may not call is waited for.
    return grpc.stream_stream_rpc_method_handler(refuse)


class DecodeAll(grpc.ServerInterceptor):
    """Lets a service see what can't be decoded as an empty message, which it refuses like any other.

    gRPC alone calls such bytes an internal error of the worker.
    """

    def intercept_service(
        self, continuation: "_Continuation", handler_call_details: grpc.HandlerCallDetails
    ) -> "_Handler | None":
        handler: Any = continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        decode = handler.request_deserializer

        def decoded(data: bytes) -> Any:
            try:
                return decode(data)
            except DecodeError:
                return decode(b"")

        return handler._replace(request_deserializer=decoded)


class WatchClients(grpc.ServerInterceptor):
    """Puts all calls under a watchdog and a gate, except those of a service that does so itself.

    Without them, a client that calls and then sends nothing would hold a thread, and one that does so again
    and again, or never comes to an end, all of them.

    Args:
        watchdog: cancels calls whose clients keep them waiting.
        gate: lets so many in at a time.
        identify: names the client of a call.
        besides: full names of methods that are left as they are.
        strangers: calls of those whom the tokens don't name are theirs; there are none unless given.
        tokens: the valid ones.
    """

    def __init__(
        self,
        watchdog: Watchdog,
        gate: Gate,
        identify: Identify,
        besides: frozenset[str],
        strangers: Strangers | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        self._watchdog = watchdog
        self._gate = gate
        self._identify = identify
        self._besides = besides
        self._strangers = strangers
        self._tokens = tokens

    def intercept_service(
        self, continuation: "_Continuation", handler_call_details: grpc.HandlerCallDetails
    ) -> "_Handler | None":
        handler = continuation(handler_call_details)
        if handler is None or handler_call_details.method in self._besides:
            return handler
        strangers = self._strangers_of(handler_call_details)
        if strangers is not None and strangers.are_too_many:
            return _refused(Busy("too many without a token ask at once"))
        inside = self._inside if strangers is None else strangers.inside
        behavior: Any
        if not handler.request_streaming:
            behavior = handler.unary_stream or handler.unary_unary
            watched = _watched_stream if handler.response_streaming else _watched_unary
            answer = watched(inside, lambda messages, context: behavior(_only(messages, context), context))
        elif handler.response_streaming:
            behavior = handler.stream_stream
            answer = _watched_stream(inside, behavior)
        else:
            raise TypeError(f"{handler_call_details.method} is of a kind that nothing here watches")
        if strangers is not None:
            setattr(answer, _POOL, strangers.pool)
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(answer, handler.request_deserializer, handler.response_serializer)

    def _strangers_of(self, details: grpc.HandlerCallDetails) -> Strangers | None:
        if self._strangers is None or self._tokens is None:
            return None
        try:
            self._tokens.name_of(details.invocation_metadata)
        except Unauthenticated:
            return self._strangers
        return None

    @contextmanager
    def _inside(self, context: grpc.ServicerContext) -> Iterator[Patience]:
        with self._gate.admit(self._identify(context)), self._watchdog.watch(context.cancel) as patience:
            yield patience


def _watched_unary(inside: "_Inside", behavior: Callable[..., Any]) -> Callable[..., Any]:
    def answer(messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
        with _aborting(context), inside(context) as patience:
            return behavior(patience.incoming(messages), context)

    return answer


def _watched_stream(inside: "_Inside", behavior: Callable[..., Any]) -> Callable[..., Any]:
    def answer(messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        with _aborting(context), inside(context) as patience:
            yield from patience.outgoing(behavior(patience.incoming(messages), context))

    return answer


@contextmanager
def _aborting(context: grpc.ServicerContext) -> Iterator[None]:
    """A refusal in the block becomes the call's status."""
    try:
        yield
    except Refusal as refusal:
        context.abort(refusal.code, str(refusal))


def _only(messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
    """The message of a call that has one, read as a stream: gRPC itself would wait for it without end."""
    message = next(messages, None)
    if message is None:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call carries no request")
    return message
