"""A gRPC server that answers what it was told to, in bytes: ``python hostile_server.py``.

It prints its port. Its own method ``/hostile/Plan`` takes a JSON object:

    messages   hex of each message of the answer
    forever    whether the last one is repeated without end
    code       number of the status that follows; 0 for none
    details    text of that status
    trailing   pairs of metadata that come with it
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc


class Hostile(grpc.GenericRpcHandler):
    """Answers every method, and its own."""

    def __init__(self) -> None:
        self._plan: dict[str, Any] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method == "/hostile/Plan":
            return grpc.unary_unary_rpc_method_handler(self._take)
        if handler_call_details.method.endswith("/GetManifest"):
            return grpc.unary_unary_rpc_method_handler(self._one)
        return grpc.stream_stream_rpc_method_handler(self._many)

    def _take(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        self._plan = json.loads(data)
        return b""

    def _one(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        self._finish(context)
        return next(self._messages(), b"")

    def _many(self, requests: Any, context: grpc.ServicerContext) -> Any:
        for _ in requests:
            pass
        for message in self._messages():
            if not context.is_active():
                return
            yield message
        self._finish(context)

    def _messages(self) -> Any:
        messages = [bytes.fromhex(x) for x in self._plan["messages"]]
        yield from messages
        while self._plan["forever"] and messages:
            yield messages[-1]

    def _finish(self, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata(tuple((k, v) for k, v in self._plan["trailing"]))
        if self._plan["code"]:
            code = next(x for x in grpc.StatusCode if x.value[0] == self._plan["code"])
            context.abort(code, self._plan["details"])


def main() -> None:
    unlimited = [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_metadata_size", 1 << 24),
    ]
    server = grpc.server(ThreadPoolExecutor(4), options=unlimited)
    server.add_generic_rpc_handlers([Hostile()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    sys.stdin.read()  # until whoever started it is gone
    server.stop(None)


if __name__ == "__main__":
    main()
