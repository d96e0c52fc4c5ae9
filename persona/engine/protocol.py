"""The messages between the service and the engine process: small, typed, msgpack, never pickle.

Each frame on the socket is a 4-byte big-endian length and one message. Weights never cross it: they travel as
files, named by `AdapterRef`.
"""

from typing import Any

import msgspec

from persona.domain import Version

MAX_FRAME = 64 << 20


class AdapterRef(msgspec.Struct, frozen=True):
    """Names one immutable version: the engine loads it from `path` and refuses any other content."""

    user_id: int
    number: int
    path: str  # folder holding adapter.safetensors
    sha256: str  # of adapter.safetensors


class Sampling(msgspec.Struct, frozen=True):
    """How the next token is drawn. `temperature` 0 is greedy.

    Frequency and presence penalties count what was generated, the repetition penalty the prompt, too.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # tokens that end a text are never drawn: only `stop` and the limit end the reply
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0  # of the likeliest token's probability
    frequency_penalty: float = 0.0  # off a logit for each time that the token stands in the reply
    presence_penalty: float = 0.0  # off a logit once
    repetition_penalty: float = 1.0  # a positive logit is divided by it, a negative one multiplied
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit), each token once
    logprobs: int | None = None  # how many alternatives are told with each token; None: not even its own
    tell_end: bool = False  # of the token that ends the text, too
    grammar: str = ""  # of persona.engine.schema; the reply is held to it


class GenerateRequest(msgspec.Struct, frozen=True):
    """Continue `tokens` for one user on one version (None: the bare base)."""

    tokens: list[int]
    sampling: Sampling = Sampling()
    adapter: AdapterRef | None = None
    user_id: int = 0


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token, its natural log-probability, and the likeliest tokens in its place with theirs, in order."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = []


class Chunk(msgspec.Struct, frozen=True):
    """A piece of a reply. The last one has `finish`: stop, length, abort or error (then `error` says why).

    `logprobs` are those of the tokens whose text begins in this piece, if they were asked for.
    """

    text: str
    tokens: int = 0  # generated so far
    finish: str | None = None
    error: str | None = None
    logprobs: list[TokenLogprob] = []
    cached: int = 0  # in the last one: tokens of the prompt that the prefix cache had
    kind: str = ""  # of the error: a class name of persona.errors


class ScoreRequest(msgspec.Struct, frozen=True):
    """Log-probabilities of `tokens[i]` given `tokens[:i]`, for each i of `targets` (ascending, all ≥ 1)."""

    tokens: list[int]
    targets: list[int]
    adapter: AdapterRef | None = None
    top: int | None = None  # how many alternatives are told with each; None: nothing but the numbers
    user_id: int = 0  # who waits for it, like for a reply; 0: nobody, and chats go first


class PrefillRequest(msgspec.Struct, frozen=True):
    """What a coming prompt of this user will begin with under this version: computed once nothing else is to be."""

    tokens: list[int]
    adapter: AdapterRef
    user_id: int


class Example(msgspec.Struct, frozen=True):
    """What the trainer sees: a token sequence and the positions whose prediction is trained.

    distil: what is wanted at a target is the bare base's whole distribution in place of the token (self-distillation).
    """

    tokens: list[int]
    targets: list[int]
    weight: float = 1.0
    distil: bool = False


class Plan(msgspec.Struct, frozen=True):
    """How one adapter is trained. The shape fields fix the stored form; the rest the optimisation."""

    rank: int = 2
    alpha: float = 4.0
    layers: float = 0.9  # share of the layers, from the top, that have factors
    seed: int = 0  # of A before training and of the order of the examples
    passes: int = 2
    batch_tokens: int = 160  # targets per optimizer step, at most
    least_steps: int = 0  # that a run has: where there are few targets, a step has fewer of them
    slice_tokens: int = 256  # tokens per slice: bounds the time between two serving steps
    learning_rate: float = 3e-3
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0
    weight_decay: float = 0.0
    max_norm: float = 50.0  # of the update (SparseAdapter.norm); above it the run fails
    max_tokens: int = 0  # budget of trained-on tokens but for distilled ones, 0: all passes


class TrainRequest(msgspec.Struct, frozen=True):
    """Train from `start` (None: from zero) and write adapter.safetensors into the folder `out`."""

    examples: list[Example]
    plan: Plan
    out: str
    start: AdapterRef | None = None
    checkpoint: str = ""  # folder in which the state is kept at optimizer steps; none is kept without
    half: str = ""  # folder for another one, half of the way from `start` to what was trained; none is made without


class Progress(msgspec.Struct, frozen=True):
    """How far a training is. The last one has `done`."""

    step: int
    steps: int
    loss: float
    tokens: int  # seen so far
    seconds: float
    skipped: int = 0  # optimizer steps left out for a non-finite gradient
    done: bool = False
    resumed: int = 0  # the step after which it went on from a checkpoint


class Health(msgspec.Struct, frozen=True):
    """What the engine says of itself."""

    base: str  # hash of the base weights
    model: str
    device: str
    weights: str  # nf4, int4 or none
    context: int  # tokens one sequence may have
    vocab: int = 0  # tokens that there are
    running: int = 0
    waiting: int = 0
    resident: int = 0  # adapters on the device
    resident_bytes: int = 0
    adapter_pages: int = 0  # pages that they take
    host: int = 0  # adapters in RAM, as they are stored
    host_bytes: int = 0
    loads: int = 0  # adapters brought to the device since the start
    disk_loads: int = 0  # of these, from their files
    loaded_bytes: int = 0
    free_pages: int = 0  # that a request could get
    cached_pages: int = 0  # of these, that hold what a later prompt may begin with
    pages: int = 0
    prompt_tokens: int = 0  # of all prompts since the start
    cached_tokens: int = 0  # of these, that needed no computing
    training: bool = False
    steps: int = 0
    slices: int = 0
    generated: int = 0
    memory: int = 0  # bytes, resident set or device
    base_bytes: int = 0


# Requests: service → engine. `id` is chosen by the client and names every answer.


class Call(msgspec.Struct, frozen=True, tag_field="type"):
    """A request with its id."""

    id: int


class Generate(Call, tag="generate", frozen=True):
    request: GenerateRequest


class Score(Call, tag="score", frozen=True):
    request: ScoreRequest


class ScoreAll(Call, tag="score_all", frozen=True):
    requests: list[ScoreRequest]


class Prefill(Call, tag="prefill", frozen=True):
    request: PrefillRequest


class Abort(Call, tag="abort", frozen=True):
    """Ends the generation, score, prefill or training `id`; it is answered with its last message."""


class Stage(Call, tag="stage", frozen=True):
    ref: AdapterRef


class Flip(Call, tag="flip", frozen=True):
    ref: AdapterRef


class Drop(Call, tag="drop", frozen=True):
    user_id: int


class Train(Call, tag="train", frozen=True):
    request: TrainRequest


class Pause(Call, tag="pause", frozen=True):
    """Stop giving slices to training, until Resume."""


class Resume(Call, tag="resume", frozen=True):
    pass


class Ping(Call, tag="ping", frozen=True):
    pass


Request = Generate | Score | ScoreAll | Prefill | Abort | Stage | Flip | Drop | Train | Pause | Resume | Ping


# Answers: engine → service.


class Answer(msgspec.Struct, frozen=True, tag_field="type"):
    """An answer to the call `id`."""

    id: int


class Piece(Answer, tag="piece", frozen=True):
    chunk: Chunk


class Scores(Answer, tag="scores", frozen=True):
    logprobs: list[float]
    told: list[TokenLogprob] = []  # if `top` was given


class AllScores(Answer, tag="all_scores", frozen=True):
    logprobs: list[list[float]]  # one list per request, in their order


class Done(Answer, tag="done", frozen=True):
    """Prefill, stage, flip, drop, pause and resume succeeded."""


class Step(Answer, tag="step", frozen=True):
    progress: Progress


class Pong(Answer, tag="pong", frozen=True):
    health: Health


class Failed(Answer, tag="failed", frozen=True):
    """The call failed. `kind` is a class name of persona.errors; `code` and `retry_after` are what it carried."""

    kind: str
    message: str
    code: str = ""
    retry_after: int = 0


Reply = Piece | Scores | AllScores | Done | Step | Pong | Failed

replace = msgspec.structs.replace
_encoder = msgspec.msgpack.Encoder()
requests: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Request)
replies: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Reply)


def pack(message: Request | Reply) -> bytes:
    """One message as a frame. Raises ValueError above MAX_FRAME bytes."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ValueError(f"message of {len(body)} bytes exceeds {MAX_FRAME}")
    return len(body).to_bytes(4, "big") + body


def ref(version: Version) -> AdapterRef:
    """How the engine is told of a stored version."""
    return AdapterRef(version.user_id, version.number, version.path, version.sha256)
