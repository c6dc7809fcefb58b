"""This process and its machine: what it writes, and how it ends.

In this room:

    disk            files and folders that are whole or not there
    settings        the user's own folder
    log, output     lines for machines that collect logs, and readers that go away
    finite          figures in JSON
    exit_codes      what a command's status says
    local_worker    a worker on this machine, for trials and measurements
"""
