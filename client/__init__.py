"""The client: everything private happens here."""

from blindtune.client.config import BlindConfig, Operator
from blindtune.client.quantizer import BlindQuantizer, multiplier_of

__all__ = ["BlindConfig", "BlindQuantizer", "Operator", "multiplier_of"]
