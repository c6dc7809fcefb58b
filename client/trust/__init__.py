"""Whose word counts: what a folder may say that came from elsewhere, and which operators a user trusts."""
