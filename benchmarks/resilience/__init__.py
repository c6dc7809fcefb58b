"""Crashes, lies, silence and hostile clients."""
