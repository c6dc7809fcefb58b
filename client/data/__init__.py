"""The private data: from files to token numbers. Nothing here leaves the client.

`records` reads files, `fields`, `messages` and `formats` say what a record means, `chat` and `classes` make
tokens of it, with the model's chat template in `templates`, and `prepared` puts all of it together.
"""
