"""What several tests share: tiny checkpoints, operators in processes of their own, and lies."""
