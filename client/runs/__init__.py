"""A run from its recipe to its adapter, and what is done with that.

In this room:

    run           `train_recipe`
    facts         what is known of a run before its model is loaded
    recording     what the training record is told, and when
    monitoring    figures for Prometheus
    stopping      on request, after the step under way
    learning      whether anything was learned; divergence says that it went wrong
    evaluation    the adapter on other data, and its answers
"""
