"""Certificates.

In this room:

    files    those that show an operator who a client is, read as a whole
    certs    an authority for each operator, for trials
"""
