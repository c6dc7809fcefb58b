"""What client and worker share and neither owns.

In this room:

    blocks          how many rows a worker multiplies at once
    listening       addresses to listen at
    metrics_page    figures for Prometheus
    reload          values made from files, made anew when those change
    core_dumps      none of either
    extras          optional parts of an installation
"""
