"""The scales of the certified fixed point in a run's checkpoints, without which it would not go on as it was.

They tell of the data a little, and are in no folder that may be given away.
"""

from pathlib import Path

from blindtune.client.rounds.multiplier import PrivateMultiplier
from blindtune.client.training.checkpoints import damage_is_clear, read_json, write_json
from blindtune.errors import CheckpointError

__all__ = ["SCALES", "restore_scales", "save_scales"]

SCALES = "scales.json"


def save_scales(multiplier: PrivateMultiplier | None, checkpoint: Path) -> None:
    """Writes the scales of a certified parameter set beside the rest of a checkpoint; none for any other."""
    if multiplier is not None and multiplier.certified is not None:
        write_json(checkpoint / SCALES, multiplier.certified.history.state())


def restore_scales(multiplier: PrivateMultiplier | None, checkpoint: Path) -> None:
    """Goes on with the scales of a checkpoint, where the parameter set is a certified one.

    Raises:
        CheckpointError: they are not there, or damaged.
    """
    if multiplier is None or multiplier.certified is None:
        return
    path = checkpoint / SCALES
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing, and parameter set {multiplier.source.parameters.name} would go on with "
            "other scales than it had: restore it, or delete the checkpoint and go on from the one before; a "
            "run that an earlier release began with masking.parameter_set q31 or mlwe1280 goes on with that"
        )
    state = read_json(path)
    with damage_is_clear(path):
        multiplier.certified.history.restore(state)
