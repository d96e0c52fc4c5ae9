"""The engine: one 4-bit base, an adapter for each row, in a process of its own. The life of a step:

    wires.py     requests come in ──┐                                   ┌── answers go out     protocol.py: their form
                                    ▼                                   │
    loop.py      _dispatch ─> scheduler.plan ─> runner.run ─> deliver ──┴─> slices.work        one thread does it all
                                    │               │             │           │
    who may wait admission.py, ─────┤               │             │           ├── jobs/trainer.py   training, sliced
    whose turn   waiting.py         │               │             │           │
    memory       pages.py, shelf.py,┤               │             │           └── branches.py       scoring, sliced
                 prefix.py          │               │             └── underway.py: sampler.py, reply.py, stops.py
    adapters     tiers.py: disk ─> RAM ─> device    │
                 (a thread beside the steps)        ├── CPU: kernels/native.py, step.c   one call
                                                    ├── GPU: graphs.py                   a replay
                                                    └── else decoder.py, lora.py, attention.py, layer by layer

The service holds the other end: faces.py says what an engine promises, client.py is this one, scripted.py a double.
What happens once: prepare.py, convert.py and quantize.py make the base's files, main.py puts all of it together.
"""
