"""The demonstration: two operators on this machine, a private fine-tuning, and a lie.

It is the one part of the client that starts workers, which is why it alone imports the server.
"""
