"""The training record: a signed, append-only log of what was trained, for auditors; it holds nothing of the
data. docs/record.md describes the format and what it proves."""
