"""From files to records of known form, each with the place that it came from."""
