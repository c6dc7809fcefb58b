"""What could a worker learn? Attacks on what workers record, and on masks that are known to be broken."""
