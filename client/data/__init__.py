"""The private data: from files to token numbers. Nothing here leaves the client."""
