"""A model behind Ray Serve: serve run serve:app, then POST http://127.0.0.1:8000/v1/completions.

$REPLICAS replicas (2 by default), each with a GPU where $GPUS is 1, else with a CPU. $STATE_DIR is a folder that all
machines of the cluster see.
"""

import os

from based.ray.serve import application

app = application(
    os.environ.get("MODEL", "based-bytes"),
    replicas=int(os.environ.get("REPLICAS", "2")),
    gpus=int(os.environ.get("GPUS", "0")),
    state_dir=os.environ.get("STATE_DIR", "states"),
)
