"""The contract between client and worker: ``worker.proto``, its generated code, and two constants.

`PROTOCOL_VERSION` is what a request's header names and a manifest lists. It goes up whenever the same
bytes would mean something else. `MAX_MESSAGE_BYTES` bounds every gRPC message in both directions;
operands and results travel in chunks far below it.
"""

# Loaded twice, every class and every stock of masks would be there twice.
if not __name__.startswith("blindtune."):
    raise ImportError(f"import this as blindtune.{__name__}")

__all__ = ["MAX_MESSAGE_BYTES", "PROTOCOL_VERSION"]

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 4 << 20
