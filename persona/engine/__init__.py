"""The engine: one 4-bit base, an adapter for each row, in a process of its own. The life of a step:

    wires.py     requests come in ──┐                                   ┌── answers go out     protocol.py: their form
                                    ▼                                   │
    loop.py      _dispatch ─> scheduler.plan ─> runner.run ─> deliver ──┴─> slices.work        one thread does it all
                                    │               │             │           │
    who may wait admission.py, ─────┤               │             │           ├── jobs/trainer.py   training, sliced
                 compiling.py       │               │             │           │
    whose turn   waiting.py, ───────┤               │             │           └── branches.py       scoring, sliced
                 lengths.py         │               │             └── underway.py: sampler.py, grammar.py, reply.py,
    in a step    turns.py, ─────────┤               │                 (CPU: draw.c)  stops.py, logprobs.py
                 sequence.py        │               │
    memory       pages.py, shelf.py,┤               │
                 prefix.py          │               ├── CPU: kernels/native.py, step.c   one call
    adapters     tiers.py: disk ─> RAM ─> device    ├── GPU: graphs.py                   a replay
                 (popularity.py says which stay;    └── else decoder.py, lora.py, attention.py, layer by layer
                 a thread beside the steps)
    versions     awaiting.py: staging, flips and a gate's scoring wait for room

The base is decoder.py over weights.py (its matrices), words.py (its vocabulary) and shape.py (its sizes); text.py is
its tokenizer, head.py its loss in training, memory.py the bytes behind all pages, device.py says what a machine has.
buckets.py has the sizes of replays; forest.py and score_all.py lay out what is scored, schema.py what a grammar may be.
What kernels compute is defined in kernels/reference.py and chosen in kernels/choice.py. On disk an adapter is
adapter_file.py's, PEFT's folders are peft_folder.py's, a training that was stopped is checkpoint_file.py's.
refusals.py words what went wrong.

The service holds the other end: faces.py says what an engine promises, client.py is this one, scripted.py a double.
What happens once: prepare.py, convert.py and quantize.py make the base's files, main.py puts all of it together.
random_adapter.py makes adapters for measuring.
"""
