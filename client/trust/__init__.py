"""Whose word counts: what a folder may say that came from elsewhere, and which operators a user trusts.

In this room:

    choice            the operators of a command
    trust_list        those that the user's own runs have used
    adapter_config    what an adapter's settings may say
    links             none leads out of a folder
"""
