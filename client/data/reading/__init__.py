"""From files to records of known form, each with the place that it came from.

In this room:

    records       the lines of a file; file_kinds knows files that have none
    fields        which are read, which change what a record means, and all others
    messages      of a conversation, and which are learned
    formats       the forms of records
"""
