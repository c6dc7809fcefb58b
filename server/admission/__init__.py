"""Who gets in, when, and for how long.

In this room:

    identity        under which name a client is limited: its certificate, its token, or this machine
    tokens          of clients
    interceptors    what every call goes through first
    strangers       those who may only ask for the health, in places of their own
    limits, rate    what one client may ask for, and how often
    gate            which calls run at once
    fair_queue      whose request runs next; places lets it wait in the thread of its call
    turns           which of a connection's answers goes on
    watchdog        an end for those who stall
    pools           threads of calls
    refusals        why a request is refused, and the status that says so
"""
