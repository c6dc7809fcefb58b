"""What client and worker share and neither owns."""
