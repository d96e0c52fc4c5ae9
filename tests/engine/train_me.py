"""Trains a tiny model and keeps its state after every step; the environment says where the process dies.

Arguments: prepared model, hash of the base, folder of the adapter, folder of the state.
"""

import math
import sys
from pathlib import Path

import torch
from test_checkpoint import PLAN, examples

from jobs.trainer import Trainer
from persona.engine import decoder
from persona.engine.protocol import TrainRequest

torch.set_num_threads(1)
model, base, out, kept = sys.argv[1:]
request = TrainRequest(examples(), PLAN, out, None, kept)
for _ in Trainer(decoder.load(Path(model), "int4", "cpu"), base, request, None, math.inf).slices():
    pass
