"""A Hugging Face model whose linear layers are elsewhere.

In this room:

    quantizer        what `from_pretrained` calls
    remote_linear    such a layer
    absent_weight    what stands for its weight, and refuses to be computed with
    layer_group      layers that share a request, from floating point to floating point
    kept             which frozen weights stay here, and why
    fused_head       output heads that trainers compute by themselves
    guard            refuses settings that cannot work; row_guard those that would show more than lengths
"""
