"""The protocol."""

if not __name__.startswith("blindtune."):  # loaded twice, there would be two stocks of masks
    raise ImportError(f"import this as blindtune.{__name__}")
