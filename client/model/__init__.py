"""A Hugging Face model whose linear layers are elsewhere."""
