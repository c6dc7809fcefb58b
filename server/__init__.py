"""The worker daemon: holds a model's frozen layers and multiplies operands by them.

    store       the frozen layers as integers, in the memory of a device
    wire        what a request's header must say
    rows        operands coming in and results going out, in blocks of rows
    identity    who sends a request: by certificate, by token, or anybody on loopback
    gate        how many requests run at once, in all and of one client, and when no more are let in
    watchdog    an end for requests whose clients stall
    service     the two calls of the contract
    transport   the listening socket: TLS, or plaintext on loopback
    daemon      all of it as a running server
    cli         the command ``blindtune-worker``

A worker is trusted with nothing: it sees masked operands and public weights, and keeps neither
operands nor results.
"""

if not __name__.startswith("blindtune."):  # loaded twice, there would be two stocks of masks
    raise ImportError(f"import this as blindtune.{__name__}")
