"""The worker daemon: holds a model's frozen layers and multiplies operands by them.

    admission/   who gets in, when, and for how long
    store        the frozen layers as integers, in the memory of a device
    wire         what a request's header must say
    rows         operands coming in and results going out, in blocks of rows
    service      the two calls of the contract
    threads      which threads products run in
    transport    the listening socket: TLS, or plaintext on loopback
    daemon       all of it as a running server
    metrics      what it counts; health, probe and log are how else it shows itself
    transcript   for audits: all that clients send, written down
    hooks        where tests and demonstrations look in
    cli          the command ``blindtune-worker``; options names their variables

A worker is trusted with nothing: it sees masked operands and public weights, and keeps neither
operands nor results.
"""

# Loaded twice, every class and every stock of masks would be there twice.
if not __name__.startswith("blindtune."):
    raise ImportError(f"import this as blindtune.{__name__}")
