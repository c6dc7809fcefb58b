"""Chat templates: from messages to a text that holds all of them, and to what of it is an answer.

Read `template` first, then `marks`, which sees what a template leaves out; `borders` finds turns among
tokens, and `ends` the tokens that end them.
"""
