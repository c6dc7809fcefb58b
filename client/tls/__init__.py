"""Certificates: the files that show an operator who a client is, and authorities for trials."""
