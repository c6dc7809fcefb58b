"""A recipe: everything about one fine-tuning run, in one YAML file."""

from blindtune.client.recipe.document import load_operators, load_recipe, write_recipe
from blindtune.client.recipe.schema import Recipe

__all__ = ["Recipe", "load_operators", "load_recipe", "write_recipe"]
