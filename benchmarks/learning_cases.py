"""The ways of learning that are compared, and how they are trained."""

import copy
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import models
from engine.data import TrainBatches
from engine.objectives import make_objective
from engine.optim import OPTIMIZERS, SCHEDULERS
from engine.pixel_loss import PixelLoss
from engine.start import TrainOptions
from engine.train_checks import required_sections
from engine.trainer import train
from models.pcsr import PCSR
from utils.checkpoint import LAST_NAME, build_model, load_checkpoint, load_phase0
from utils.config import Config, check_config
from utils.distributed import World
from utils.errors import UserError
from utils.run_metrics import METRICS_NAME, read_rows

PUBLISHED = "published"


@dataclass(frozen=True)
class RoutingVariant:
    """A way to train phase 1.

    Attributes:
        name: in tables.
        routing_loss: the config's key; None for the published loss.
        classifier: hidden widths in place of the config's.
        shows_orders: other orders of the pixels are measured beside the classifier's.
    """

    name: str
    routing_loss: Mapping[str, Any] | None = None
    classifier: Sequence[int] | None = None
    shows_orders: bool = False


def _regression(**args: Any) -> dict[str, Any]:
    return {"name": "gain-regression", "args": args}


ROUTING_VARIANTS = (
    RoutingVariant(PUBLISHED, shows_orders=True),
    RoutingVariant("regression; light and gain by HR", _regression(target="hr", reference="hr")),
    RoutingVariant(
        "the same, gain over 5x5 pixels",
        _regression(target="hr", reference="hr", smoothing_px=5),
    ),
    RoutingVariant("regression; light by HR, gain by heavy", _regression(target="hr")),
    RoutingVariant("regression; light and gain by heavy", _regression(), shows_orders=True),
    RoutingVariant("the same, classifier 32x2", _regression(), classifier=(32, 32)),
    RoutingVariant("ranking; light and gain by heavy", {"name": "gain-rank"}),
)


@dataclass(frozen=True)
class Variant:
    """A way to train from scratch: what it changes in the config, by key path."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)


def phase0_variants(config: Config, iterations: int) -> list[Variant]:
    """Each option alone; larger patches come in smaller batches, of as many pixels."""
    data, _ = required_sections(config)
    size = int((data.wrapper.get("args") or {})["inp_size"])
    larger = {
        "train_dataset.wrapper.args.inp_size": 2 * size,
        "train_dataset.batch_size": max(1, data.batch_size // 4),
    }
    return [
        Variant("config as it is"),
        Variant("warm-up, a tenth of the run", {"warmup": max(1, iterations // 10)}),
        Variant("EMA 0.99", {"ema": 0.99}),
        Variant("EMA 0.999", {"ema": 0.999}),
        Variant(f"patches {2 * size}, a quarter as many", larger),
    ]


def optimizer_variants(config: Config, _: int) -> list[Variant]:
    """The config's Adam and SOAP, each at several rates; SOAP's other arguments are its defaults.

    Raises:
        UserError: a config of another optimizer, or of phase 1.
    """
    spec = required_sections(config)[1]
    args = spec.get("args") or {}
    if spec["name"] != "adam" or "lr" not in args or config.phase == 1:
        raise UserError(
            f"config {config.name}: optimisers are compared on a config of an original network or "
            f"of phase 0, whose optimizer is adam, with a rate"
        )
    found = []
    for name, given, factors in (("adam", args, (0.5, 1, 2)), ("soap", {}, (1, 2, 4))):
        for factor in factors:
            lr = factor * args["lr"]
            changes = {"optimizer": {"name": name, "args": {**given, "lr": lr}}}
            found.append(Variant(f"{name}, lr {lr:.2g}", changes))
    return found


def loss_variants(config: Config, iterations: int) -> list[Variant]:
    """L1, L2, PSNR, and one with the next for the last part of the run.

    Raises:
        UserError: a config of phase 1, or fewer than 4 iterations.
    """
    if config.phase == 1:
        raise UserError(
            f"config {config.name}: pixel losses are compared on a config of an original network "
            f"or of phase 0"
        )
    if iterations < 4:
        raise UserError("--iterations: pixel losses are compared over 4 iterations or more")
    starts = {"the last quarter": iterations * 3 // 4, "the last half": iterations // 2}
    return [
        _loss_variant("L1"),
        *(_loss_variant(f"L1, L2 in {part}", l2_from=start) for part, start in starts.items()),
        _loss_variant("L2", l2_from=0),
        _loss_variant("L2, PSNR in the last half", l2_from=0, psnr_from=iterations // 2),
        _loss_variant("PSNR", psnr_from=0),
    ]


def _loss_variant(name: str, l2_from: int | None = None, psnr_from: int | None = None) -> Variant:
    return Variant(name, {"l2_from": l2_from, "psnr_from": psnr_from})


class _Once:
    """A function that is computed once until it is told to :meth:`forget`."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._value: Tensor | None = None

    def __call__(self, *args: Any) -> Tensor:
        if self._value is None:
            self._value = self._function(*args)
        return self._value

    def forget(self) -> None:
        """Before the next batch."""
        self._value = None


class _Frozen:
    """What phase 1 fixes, shared by all variants: each batch goes through it once."""

    def __init__(self, first: PCSR) -> None:
        self.encoder, self.heavy = first.encoder, first.upsamplers[-1]
        self._functions = (_Once(self.encoder.forward), _Once(self.heavy.dense))

    def __enter__(self) -> "_Frozen":
        # In the instances alone, and only while variants are trained.
        self.encoder.__dict__["forward"], self.heavy.__dict__["dense"] = self._functions
        return self

    def __exit__(self, *_: object) -> None:
        del self.encoder.__dict__["forward"], self.heavy.__dict__["dense"]

    def next_batch(self) -> None:
        for function in self._functions:
            function.forget()


class _Learner:
    """One variant's model, loss, optimiser and schedule."""

    def __init__(self, config: Config, model: PCSR, routing_loss: Any, iterations: int) -> None:
        self.model = model
        self.pixel_loss = PixelLoss(config.l2_from, config.psnr_from).to(
            next(model.parameters()).device
        )
        self.objective = make_objective(
            model,
            loss_rgb_w=config.loss_rgb_w,
            loss_avg_w=config.loss_avg_w,
            routing_loss=routing_loss,
            pixel_loss=self.pixel_loss,
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        _, spec = required_sections(config)
        self.optimizer = OPTIMIZERS.make(spec, "optimizer", params=trained)
        cosine = {"name": "CosineAnnealingLR_Restart", "args": {"T_period": [iterations]}}
        self.scheduler = SCHEDULERS.make(cosine, "lr_scheduler", optimizer=self.optimizer)

    def step(self, index: int, batch: Mapping[str, Tensor], precision: str) -> None:
        """Iteration `index`, from 0.

        Args:
            batch: "lr" (B, 3, h, w) and "hr" (B, 3, H, W), float RGB in [0, 1], on the device.
            precision: "fp32" or "bf16" (autocast).
        """
        self.scheduler.set_step(index)
        self.pixel_loss.set_step(index)
        self.optimizer.zero_grad()
        device_type = batch["lr"].device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16"):
            loss = self.objective(batch["lr"], batch["hr"])["loss"]
        loss.backward()
        self.optimizer.step()


def train_routing(
    config: Config, weights: Path, iterations: int, device: torch.device
) -> Iterator[tuple[RoutingVariant, PCSR]]:
    """All ROUTING_VARIANTS from the same weights on the same batches, side by side.

    Backbone and heavy upsampler, the same for all, work once per batch; that is two thirds of what
    a run of its own would take for each.

    Args:
        config: of phase 1; its schedule is replaced by a cosine over `iterations`.
        weights: phase 0's.
    """
    learners = [
        _Learner(config, model, variant.routing_loss, iterations)
        for variant, model in zip(ROUTING_VARIANTS, _models(config, weights, device), strict=True)
    ]
    data, _ = required_sections(config)
    seed = config.seed or 0
    batches = TrainBatches(data, seed=seed, start=0, stop=iterations, world=World(0, 1, device))
    with _Frozen(learners[0].model) as frozen:
        for index, batch in enumerate(batches):
            moved = {key: value.to(device) for key, value in batch.items()}
            frozen.next_batch()
            for learner in learners:
                learner.step(index, moved, config.precision)
    batches.skipped.report()
    for variant, learner in zip(ROUTING_VARIANTS, learners, strict=True):
        yield variant, learner.model.eval()


def _models(config: Config, weights: Path, device: torch.device) -> Iterator[PCSR]:
    """A model for each variant; all share the first one's backbone and heavy upsampler."""
    first: PCSR | None = None
    for variant in ROUTING_VARIANTS:
        spec = copy.deepcopy(config.model)
        if variant.classifier is not None:
            classifier = spec["args"]["classifier_spec"]["args"]["imnet_spec"]
            classifier["args"] = {"hidden_list": list(variant.classifier)}
        torch.manual_seed(config.seed or 0)
        model = models.make(spec, data_norm=config.data_norm)
        if not isinstance(model, PCSR) or model.classifier is None:
            raise UserError("--config: the routing's losses need a config of phase 1")
        load_phase0(model, load_checkpoint(weights)["model"]["sd"], weights)
        if first is not None:
            model.encoder, model.heavy_sampler = first.encoder, first.upsamplers[-1]
        first = first or model
        yield model.freeze_phase0().to(device).train()


class Trained(NamedTuple):
    """The end of a short run."""

    variant: Variant
    model: nn.Module
    iterations_per_s: float


def train_variants(
    config: Config, variants: Iterable[Variant], iterations: int, device: torch.device
) -> Iterator[Trained]:
    """Each of `variants` in a run of its own, from scratch, with a cosine over `iterations`."""
    for variant in variants:
        raw = copy.deepcopy(config.raw)
        cosine = {"name": "CosineAnnealingLR_Restart", "args": {"T_period": [iterations]}}
        always = {"iter_max": iterations, "lr_scheduler": cosine, "valid_dataset": None}
        # One figure of speed for the whole run; the same start for all runs.
        always |= {"iter_print": iterations, "seed": config.seed or 0, "init": None}
        for path, value in {**always, **variant.changes}.items():
            *parents, last = path.split(".")
            functools.reduce(lambda node, key: node[key], parents, raw)[last] = value
        with tempfile.TemporaryDirectory() as folder:
            options = TrainOptions(save_dir=Path(folder), resume="never")
            train(check_config(raw, config.name), options, World(0, 1, device))
            last_path = Path(folder) / LAST_NAME
            model = build_model(load_checkpoint(last_path), last_path, config.data_norm)
            rows, _ = read_rows(Path(folder) / METRICS_NAME)
        yield Trained(variant, model.to(device), rows[-1]["iterations_per_s"])
