"""The sections of a Plan: immutable values, each with what can be said about it alone."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Quantization = Literal["none", "nf4", "int8"]

SMALLEST_SUM: Final = 3
"""The fewest clients whose sum hides anything: from a sum of two, each of them knows the other's part."""


class Settings(BaseModel):
    """A section of the Plan: immutable, strict about types, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class Model(Settings):
    """The backbone and what it is for.

    `backbone` is `builtin:<name>` or the path of a local Hugging Face folder, relative to the Plan's own folder. With
    `owner_only` it never leaves its owner: clients get an emulator of it.

    `quantization` is what whoever loads it holds the frozen matrices of its blocks in: as they are, in the 4 bits of
    NF4 (Dettmers et al. 2023) or in 8. It is shipped whole, and every machine rounds it alike.
    """

    backbone: Annotated[str, Field(min_length=1)]
    owner_only: bool = False
    task: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    labels: Annotated[int, Field(ge=2)] | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantization: Quantization = "none"

    @model_validator(mode="after")
    def _labels_belong_to_classification(self) -> Self:
        if (self.task == "sequence-classification") != (self.labels is not None):
            raise ValueError(
                "'labels' (how many classes) goes with task = \"sequence-classification\", and only with it"
            )
        return self


class Alternative(Settings):
    """Another way to tune, for clients that are short of memory; what is left out is as the Plan has it.

    `kind` names a method that trains the same tensors, `rank` is a smaller rank of them, and `quantization` the format
    that the frozen weights of the backbone are in.
    """

    kind: str | None = None
    rank: PositiveInt | None = None
    quantization: Quantization | None = None


class TuningSettings(Settings):
    """What every tuning method has; `farfield.emulator.methods` holds the methods themselves.

    `alternatives` are what a client may do instead where its memory does not allow this, the first that fits. How a
    batch is cut and whether blocks are checkpointed changes no result, so that a client may always choose.
    """

    kind: str
    alternatives: Annotated[tuple[Alternative, ...], Field(strict=False)] = ()

    @property
    def by_gradient(self) -> bool:
        """Whether it is trained by gradients that autograd finds; else by steps of its own, of plain SGD."""
        return True

    @property
    def by_example(self) -> bool:
        """Whether all that it trains has a gradient of each example of its own, as DP-SGD needs it."""
        return False

    @property
    def by_block(self) -> bool:
        """Whether it can be kept to some blocks of a model, and does not depend on how many others there are."""
        return True

    @property
    def optimizers(self) -> tuple[str, ...] | None:
        """Those of `training.optimizer` that its steps can be made by; None is all."""
        return None

    @property
    def on_quantised(self) -> bool:
        """Whether it can be trained beside weights of 4 or 8 bits: not where these are themselves what it trains."""
        return True

    @property
    def merges(self) -> bool:
        """Whether it can be folded into the weights, whatever the model."""
        return True

    @property
    def checkpoints(self) -> bool:
        """Whether blocks can be computed once more on the way back (`training.checkpointing`)."""
        return True

    @property
    def corrects_rounding(self) -> bool:
        """Whether it begins with what quantising the backbone has taken away, instead of with nothing."""
        return False

    @property
    def adapter_of(self) -> str:
        """Which tensors it trains: methods that are alike in it train the same ones, at equal ranks."""
        return self.kind

    @property
    def adapter_rank(self) -> int | None:
        """The rank of LoRA's two factors where both are trained in every round and shared; None elsewhere."""
        return None


class Data(Settings):
    """What a client's files are expected to hold, and how they become examples.

    A record is text (`text`), a prompt with its completion, a chat (`messages`), or a text with its class (`label`);
    the keys name the columns. `held_out` is the share of each client's examples that is never trained on. With
    `truncate`, what a record has beyond `max_length` is left out, so that one record is one example.
    """

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    label: str = "label"
    max_length: Annotated[int, Field(ge=8)] = 256
    packing: bool = True
    truncate: bool = False
    completion_only: bool = True
    held_out: Share = 0.1

    @model_validator(mode="after")
    def _one_fate_for_long_records(self) -> Self:
        if self.truncate and self.packing:
            raise ValueError("'truncate' cuts each record by itself, so it goes with packing = false")
        return self


class Training(Settings):
    """The work of one client in one round, and how many rounds there are.

    The budget of a round is `steps` or `epochs`. The learning-rate schedule runs over all rounds, not over each.
    Gradients are clipped to `max_grad_norm`; 0 leaves them as they are. `proximal_mu` is μ of FedProx (Li et al. 2020,
    eq. 2); 0 is plain local training. With `checkpointing` a block keeps its input only and is computed once more for
    the gradients: less memory, a longer step, the same result.

    `adamw-8bit` holds AdamW's two moments in 8 bits (Dettmers et al. 2022), `adafactor` the second one in factors and
    none of the first (Shazeer and Stern 2018).
    """

    rounds: PositiveInt
    steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    batch_size: PositiveInt = 8
    gradient_accumulation: PositiveInt = 1
    optimizer: Literal["adamw", "adamw-8bit", "adafactor", "sgd"] = "adamw"
    learning_rate: PositiveFloat = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: NonNegativeFloat = 1.0
    proximal_mu: NonNegativeFloat = 0.0
    checkpointing: bool = False
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give the budget of a round as 'steps' or as 'epochs', one of the two")
        if self.optimizer != "sgd" and self.momentum:
            raise ValueError("'momentum' goes with optimizer = \"sgd\"")
        return self

    @property
    def update_range(self) -> float | None:
        """A magnitude that values of one round's update hardly pass; None where nothing says how long a step is.

        A step of AdamW moves a value by about its learning rate (Kingma and Ba 2015, section 2.1), one of SGD by at
        most rate · max_grad_norm, divided by 1 − momentum in the long run. Epochs are taken for a thousand steps.
        """
        steps = self.steps or 1000
        if self.optimizer in ("adamw", "adamw-8bit"):
            return 2 * self.learning_rate * steps
        if self.optimizer == "sgd" and self.max_grad_norm:
            return self.learning_rate * self.max_grad_norm * steps / (1 - self.momentum)
        return None


class Cohort(Settings):
    """Who takes part in a round: `size` clients, or the `fraction` of those present, but never under `minimum`.

    A round that ends with fewer than `minimum` updates changes nothing. `round_seconds` is how long a round waits.
    `over_selection` is the share of clients that are asked in addition: the round closes when as many as wanted have
    answered, and does without the slowest.
    """

    size: PositiveInt | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    minimum: PositiveInt = 1
    round_seconds: PositiveFloat = 3600.0
    over_selection: Annotated[float, Field(ge=0, le=4)] = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.size is not None and self.fraction is not None:
            raise ValueError("give 'size' or 'fraction', not both")
        if self.size is not None and self.minimum > self.size:
            raise ValueError(f"'minimum' ({self.minimum}) is more than 'size' ({self.size})")
        if self.over_selection and self.size is None and self.fraction is None:
            raise ValueError("'over_selection' goes with 'size' or 'fraction': without them every client is asked")
        return self


class Aggregation(Settings):
    """How updates become the next adapter: a weighted mean, then a server optimiser (FedOpt, Reddi et al. 2021).

    `learning_rate` is η, `beta1`/`beta2` are β₁/β₂ and `tau` is τ of Algorithm 2.

    The other keys belong to rules that withstand hostile clients. `malicious` is f, how many of them there may be in a
    round, and `kept` is m, how many updates Krum chooses. An update is clipped to the L2 norm `norm_bound`, or to
    `norm_multiple` times the median of the round's norms. `groups` is in how many sums a cohort is added up.
    """

    rule: str = "mean"
    weighting: Literal["examples", "uniform"] = "examples"
    malicious: PositiveInt | None = None
    kept: PositiveInt | None = None
    norm_bound: PositiveFloat | None = None
    norm_multiple: PositiveFloat | None = None
    groups: Annotated[int, Field(ge=3)] | None = None
    server_optimizer: Literal["none", "momentum", "adam", "yogi"] = "none"
    learning_rate: PositiveFloat = 1.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: PositiveFloat = 1e-3

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if self.norm_bound is not None and self.norm_multiple is not None:
            raise ValueError("give the bound on an update's norm as 'norm_bound' or as 'norm_multiple', not both")
        return self


class Evaluation(Settings):
    """After every `every` rounds, on the held-out share of at most `clients` clients (the same ones each time)."""

    every: PositiveInt = 1
    clients: PositiveInt = 16
    batch_size: PositiveInt = 16
    examples: PositiveInt | None = None


class Delivery(Settings):
    """What is shipped to clients, and the number format of tensors on the wire.

    With `adapter` they get the backbone, and tune all of its blocks, or its `first` and `last` ones where these are
    given. With `emulator` they get those blocks and, instead of what lies between them, the stand-in that `[emulator]`
    describes (Offsite-Tuning; Xiao et al. 2023); 2 and 2 where nothing is given. What they tune fits the backbone.

    Every `plug_in_every` rounds the coordinator puts the adapter into the backbone and measures both, on text of its
    own. Every `redistill_every` rounds it distils the stand-in anew, with the adapter as it is then.
    """

    kind: Literal["adapter", "emulator"] = "adapter"
    dtype: Literal["bfloat16", "float32"] = "float32"
    first: PositiveInt | None = None
    last: PositiveInt | None = None
    plug_in_every: PositiveInt = 1
    redistill_every: PositiveInt | None = None

    @model_validator(mode="after")
    def _both_ends(self) -> Self:
        if (self.first is None) != (self.last is None):
            raise ValueError("give 'first' and 'last' together: the blocks at both ends that are tuned")
        if self.kind == "adapter" and self.redistill_every:
            raise ValueError("'redistill_every' goes with kind = \"emulator\"")
        return self

    @property
    def ends(self) -> tuple[int, int] | None:
        """How many blocks are tuned at the beginning and at the end (l and r); None is all blocks."""
        return None if self.first is None or self.last is None else (self.first, self.last)


class Emulator(Settings):
    """What stands in for the blocks between those that are tuned, for `delivery.kind = "emulator"`.

    `blocks` of them remain; where it is left out, all of those that are compressed in another way, and half of them
    otherwise. They are spaced evenly (`uniform`; Xiao et al. 2023, section 3.3), or are one of each cluster of similar
    neighbours, repeated to restore the depth (`clusters`; CRaSh, Zhang et al. 2023), or those that change the stream
    most (`influence`; ShortGPT, Men et al. 2024, eq. 1), or those without which the gradients of the tuned blocks
    change most (`gradient`; after GradOT, Zhang et al. 2025).

    `low_rank` is the share of their linear layers' parameters that is left when these are factorised; `nf4` stores
    what remains in 4 bits.

    With `turns` so many stand-ins are made, of other blocks each, and take turns from round to round: what is tuned
    then fits none of them better than the backbone. Clients get all of them.
    """

    select: Literal["uniform", "clusters", "influence", "gradient"] = "gradient"
    blocks: PositiveInt | None = None
    low_rank: Annotated[float, Field(gt=0, lt=1)] | None = None
    quantization: Literal["none", "nf4"] = "none"
    turns: Annotated[int, Field(ge=1, le=16)] = 1

    @model_validator(mode="after")
    def _evenly_where_there_are_turns(self) -> Self:
        if self.turns > 1 and self.select != "uniform":
            raise ValueError("'turns' goes with select = \"uniform\": the other ways have one best choice of blocks")
        return self


class Distillation(Settings):
    """How the stand-in is trained to do what it stands for, on public text: `steps` at most; 0 leaves it as it is.

    The loss is `lm_weight` times the language model's own plus `hidden_weight` times the relative squared distance of
    the stream after the middle (Xiao et al. 2023, section 3.3). It is measured on held-out public text every
    `check_every` steps, and training stops when it has not improved `patience` times in a row; the best is kept.
    """

    steps: Annotated[int, Field(ge=0)] = 200
    batch_size: PositiveInt = 8
    learning_rate: PositiveFloat = 3e-3
    lm_weight: NonNegativeFloat = 0.0
    hidden_weight: PositiveFloat = 30.0
    check_every: PositiveInt = 50
    patience: PositiveInt = 3


class Protection(Settings):
    """Who can read one client's update: nobody (`secagg`), the coordinator (`sealed`), whoever carries it (`none`).

    A Plan that leaves `kind` out gets `secagg` where three clients can take part in a round and the aggregation rule
    needs sums only, and `sealed` elsewhere. `none` is for simulations; a coordinator's service starts no such run.

    The other keys are for `secagg`. A value is sent with at least `bits` bits, over the range ±`clip_range`; without
    one the range follows from the learning rate, and with `adapt_range` it then follows each tensor's last aggregate.
    An example count above `weight_limit` counts as that many. `corrupt` and `dropouts` are the shares of a cohort that
    may work together against the others, and vanish; with `adversary = "semi-malicious"` the coordinator may also lie
    about who is there. A step other than training has `step_seconds`.
    """

    kind: Literal["none", "sealed", "secagg"] | None = None
    bits: Annotated[int, Field(ge=4, le=24)] = 16
    clip_range: PositiveFloat | None = None
    adapt_range: bool = True
    weight_limit: Annotated[int, Field(ge=1, lt=2**31)] = 4096
    corrupt: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    dropouts: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    adversary: Literal["curious", "semi-malicious"] = "semi-malicious"
    step_seconds: PositiveFloat = 60.0


class Privacy(Settings):
    """Which differential privacy the run promises: for one `example` of a client, for a `client`, or none.

    Neighbouring datasets differ in one example (or client) whose contribution is replaced by zero; how many there are
    is public. `noise_multiplier` is σ, in units of `clipping_norm`; or `target_epsilon` at `delta` decides it.

    With `example` each training example is in a step's batch with probability `sampling_rate`, its gradient is clipped
    to `clipping_norm`, and the client adds the noise (DP-SGD; Abadi et al. 2016). With `client` the whole update is
    clipped, and noise is added once to the sum by the coordinator (`central`; McMahan et al. 2018), or in shares by
    the clients before it is masked (`distributed`; Agarwal et al. 2021). `clipping = "adaptive"` follows the quantile
    `target_quantile` of the updates' norms, at `quantile_rate`; `count_noise` is the standard deviation of the noise
    on that count (Andrew et al. 2021: γ, η_C and σ_b).

    ε is for a client that trains in every round, for nothing else is certain; or in `participations` of them, and then
    the clients take turns (`protocols/turns.py`). Held-out losses are not covered by ε, so nothing is evaluated unless
    `exact_evaluation` allows it. `population` names those whose budget is spent.
    """

    kind: Literal["none", "example", "client"] = "none"
    noise: Literal["central", "distributed"] = "central"
    target_epsilon: PositiveFloat | None = None
    noise_multiplier: PositiveFloat | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    clipping_norm: PositiveFloat = 1.0
    clipping: Literal["fixed", "adaptive"] = "fixed"
    target_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    quantile_rate: PositiveFloat = 0.2
    count_noise: PositiveFloat = 10.0
    participations: PositiveInt | None = None
    sampling_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    exact_evaluation: bool = False
    population: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "default"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "none":
            if any((self.target_epsilon, self.noise_multiplier, self.sampling_rate, self.participations)):
                raise ValueError('the other keys go with kind = "example" or kind = "client"')
            return self
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError(
                "give how much noise there is as 'target_epsilon' or as 'noise_multiplier', one of the two"
            )
        if (self.kind == "example") != (self.sampling_rate is not None):
            raise ValueError("'sampling_rate' goes with kind = \"example\", and there it is needed")
        if self.kind == "example" and (self.noise, self.clipping) != ("central", "fixed"):
            raise ValueError("'noise' and 'clipping' go with kind = \"client\": examples get theirs at the client")
        return self
