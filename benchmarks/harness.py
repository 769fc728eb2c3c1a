"""One harness for every op: how variants are run, timed, checked and recorded.

A benchmark file declares an `Op`: its inputs, its variants, its fp64 reference, its work, and its sizes; see
bench_exp_map.py for the shortest. `Op.as_test()` turns it into one pytest-benchmark test per (case, variant, mode).

Method. All variants of a case are measured together, in rounds of one call each, in an order that rotates, so that
drift of clocks or of other load meets all of them alike. Rounds begin after a warm-up by time (compilation, thermal
steady state). Inputs rotate over enough copies to leave the L2 cache cold. One call yields three times: forward,
backward, full. Quantiles, never means. Running out of memory is a result.
"""

import contextlib
import functools
import gc
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

import psutil
import pytest
import torch
from torch import Tensor

from benchmarks import devices

MODES = ("forward", "backward", "full")


@dataclass(frozen=True)
class Case:
    """One size of an op. `columns` differs from `rows` for the b x B block that one of many GPUs computes."""

    rows: int
    dim: int
    columns: int = 0
    dtype: torch.dtype = torch.float32
    data: str = "clusters"
    scale: float = 100.0

    def __post_init__(self):
        object.__setattr__(self, "columns", self.columns or self.rows)

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}-d{self.dim}-{str(self.dtype).removeprefix('torch.')}-{self.data}"


def grid(rows: Iterable[int], dims: Iterable[int] = (512,), **options) -> list[Case]:
    """The square cases of every combination of rows and dims."""
    return [Case(rows=r, dim=d, **options) for r, d in itertools.product(rows, dims)]


@dataclass(frozen=True)
class Work:
    """The least work of an op, which rates are computed from: floating point operations, and bytes moved, by mode."""

    forward_flop: float = 0.0
    backward_flop: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0

    def of(self, mode: str) -> tuple[float, float]:
        """(flop, bytes) of a mode."""
        parts = {
            "forward": (self.forward_flop, self.forward_bytes),
            "backward": (self.backward_flop, self.backward_bytes),
        }
        return parts[mode] if mode in parts else tuple(map(sum, zip(*parts.values(), strict=True)))


@dataclass(frozen=True)
class Variant:
    """One implementation: `run(*inputs)` returns a tensor.

    package: the PyPI distribution it comes from; an absent one is reported in one line.
    compiled: run it through torch.compile.
    needs_cuda: it has no CPU path.
    max_rows: beyond this size a single call takes minutes; larger cases leave it out.
    """

    name: str
    run: Callable[..., Tensor]
    package: str = "torch"
    compiled: bool = False
    needs_cuda: bool = False
    max_rows: int = 1 << 30

    def absence(self, device: torch.device) -> str | None:
        """Why this variant cannot run here, or None."""
        if devices.package_version(self.package) is None:
            return f"{self.name}: not measured, {self.package} is not installed (pip install {self.package})"
        if self.needs_cuda and device.type != "cuda":
            return f"{self.name}: not measured, it needs a CUDA device"
        return None

    def callable(self) -> Callable[..., Tensor]:
        return torch.compile(self.run, fullgraph=True, dynamic=False) if self.compiled else self.run


@dataclass(frozen=True)
class Op:
    """A public operation with everything needed to measure it.

    inputs(case, device, seed): the input tensors, requires_grad set on those to differentiate; the harness casts float
        ones of more than one element to case.dtype.
    reference(*inputs): the same result from fp64 inputs; None where there is no exact one.
    cases: sizes for "smoke" (seconds, to test the suite itself), "cpu" and "gpu".
    reference_max: largest rows * columns for which the fp64 result is computed.
    """

    name: str
    inputs: Callable[[Case, torch.device, int], Sequence[Tensor]]
    variants: Sequence[Variant]
    reference: Callable[..., Tensor] | None
    work: Callable[[Case], Work]
    cases: dict[str, list[Case]]
    differentiable: bool = True
    reference_max: int = 1 << 26

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.differentiable else ("forward",)

    def present(self, case: Case, device: torch.device, *, compiled: bool = True) -> list[Variant]:
        """The variants that can run a case here, without the compiled ones if they are not wanted."""
        fitting = [v for v in self.variants if case.rows <= v.max_rows and (compiled or not v.compiled)]
        return [v for v in fitting if v.absence(device) is None]

    def as_test(self) -> Callable:
        """A pytest function, parametrised by benchmarks/conftest.py over this op's cases, variants and modes."""

        @pytest.mark.benchmark(timer=CLOCK.now, disable_gc=True)
        def test(benchmark, measured: "Measurement", mode: str) -> None:
            benchmark.group = f"{self.name} {measured.case} {mode}"
            benchmark.extra_info.update(measured.row(mode))
            if measured.status == "ok":
                CLOCK.load(measured.seconds[mode])
                benchmark.pedantic(CLOCK.tick, rounds=len(measured.seconds[mode]))
            else:
                benchmark.pedantic(lambda: None)
            assert not measured.status.startswith("failed"), measured.status

        test.op = self
        return test


class ReplayClock:
    """Hands samples that were measured interleaved to pytest-benchmark, through its public `timer` option."""

    def __init__(self) -> None:
        self._now = 0.0
        self._samples: Iterable[float] = iter(())

    def load(self, samples: Sequence[float]) -> None:
        self._samples = itertools.cycle(samples)

    def tick(self) -> None:
        self._now += next(self._samples)

    def now(self) -> float:
        return self._now


CLOCK = ReplayClock()


class Stopwatch:
    """Time stamps on a device's own clock: CUDA events on a GPU, so that launches stay asynchronous."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def splits(self) -> list[float]:
        """Seconds between consecutive marks."""
        pairs = list(itertools.pairwise(self._marks))
        if self.device.type == "cuda":
            self._marks[-1].synchronize()
            return [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [end - start for start, end in pairs]


def relative_rms(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact| in the Euclidean norm, in fp64."""
    exact = exact.double()
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


@contextlib.contextmanager
def bounded_memory(device: torch.device, share: float = 0.7):
    """On a CPU, let allocations fail at a share of the free memory, before the kernel's out-of-memory killer comes."""
    if device.type == "cuda":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = psutil.Process().memory_info().data
    resource.setrlimit(resource.RLIMIT_DATA, (int(used + share * psutil.virtual_memory().available), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class Measurement:
    """What came out for one variant of one case."""

    op: Op
    case: Case
    variant: Variant
    device: torch.device
    status: str = "ok"
    seconds: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    extra_bytes: int | None = None
    launches: int | None = None
    value_error: float | None = None
    gradient_error: float | None = None
    clocks: str = ""

    def row(self, mode: str) -> dict:
        """The CSV row of one mode."""
        case, known = self.case, {"value_error", "extra_bytes", "launches"} if mode == self.op.modes[-1] else set()
        row = {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "op": self.op.name,
            "variant": self.variant.name,
            "version": devices.package_version(self.variant.package),
            "mode": mode,
            "rows": case.rows,
            "columns": case.columns,
            "dim": case.dim,
            "dtype": str(case.dtype).removeprefix("torch."),
            "data": case.data,
            "scale": case.scale,
            "status": self.status,
            "clocks": self.clocks,
            **{name: getattr(self, name) for name in known if getattr(self, name) is not None},
            **devices.describe(self.device),
        }
        if mode == "full" and self.gradient_error is not None:
            row["gradient_error"] = self.gradient_error
        if self.status == "ok":
            row |= self._rates(mode)
        return {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}

    def _rates(self, mode: str) -> dict:
        samples = self.seconds[mode]
        p20, p50, p80 = quantiles(samples)
        flop, moved = self.op.work(self.case).of(mode)
        rates = {"p20_ms": p20 * 1e3, "p50_ms": p50 * 1e3, "p80_ms": p80 * 1e3, "samples": len(samples)}
        limits = devices.datasheet(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        if flop:
            rates["tflop_per_s"] = tflop = flop / p50 / 1e12
            rates["percent_of_measured"] = 100 * tflop / devices.measured_fp32_tflop_per_s(self.device)
            if limits:
                rates |= {"percent_of_bf16": 100 * tflop / limits.bf16, "percent_of_tf32": 100 * tflop / limits.tf32}
        elif moved:
            rates["gb_per_s"] = gigabytes = moved / p50 / 1e9
            rates["percent_of_measured"] = 100 * gigabytes / devices.measured_copy_gb_per_s(self.device)
            if limits:
                rates["percent_of_bandwidth"] = 100 * gigabytes / limits.bandwidth
        return rates


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(p20, p50, p80); of few samples the nearest ones."""
    ordered = sorted(samples)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return low, statistics.median(ordered), high


class _Runner:
    """Calls one variant of a case on rotating copies of its inputs."""

    def __init__(self, measurement: Measurement, copies: Sequence[Sequence[Tensor]]) -> None:
        self.measurement = measurement
        self.differentiable = measurement.op.differentiable
        self.run = measurement.variant.callable()
        self.copies = itertools.cycle(copies)

    def call(self, watch: Stopwatch | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(output, gradients); marks the start, the end of forward and the end of backward."""
        mark = watch.mark if watch else lambda: None
        inputs = next(self.copies)
        mark()
        output = self.run(*inputs)
        mark()
        if not self.differentiable:
            return output, ()
        gradients = torch.autograd.grad(output, [x for x in inputs if x.requires_grad], _direction(output))
        mark()
        return output, gradients

    def attempt(self, step: Callable[[], object]) -> object | None:
        """Run a step; running out of memory or failing ends this variant's measurement and is recorded."""
        if self.measurement.status != "ok":
            return None
        try:
            return step()
        except Exception as error:  # a peer's failure, whatever it is, must not end the others' measurement
            first_line = next(iter(str(error).splitlines()), "")[:200]
            failure = f"failed: {type(error).__name__}: {first_line}"
            self.measurement.status = "out of memory" if is_out_of_memory(error) else failure
        release()
        return None

    def sample(self) -> float:
        """Time one call and keep its three durations; returns the full one."""
        watch = Stopwatch(self.measurement.device)
        self.call(watch)
        splits = watch.splits()
        for mode, seconds in zip(MODES, [*splits, sum(splits)] if self.differentiable else splits, strict=False):
            self.measurement.seconds[mode].append(seconds)
        return sum(splits)


@functools.cache
def _unit_direction(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(shape, dtype=torch.float32, device=device, generator=generator).to(dtype)


def _direction(output: Tensor) -> Tensor | None:
    """A fixed upstream gradient; one for a scalar loss."""
    return None if output.dim() == 0 else _unit_direction(output.shape, output.dtype, output.device)


def make_inputs(op: Op, case: Case, device: torch.device, seed: int) -> list[Tensor]:
    """One copy of the inputs in the case's dtype; single numbers (curv, logit_scale) and labels stay what they are."""

    def cast(x: Tensor) -> Tensor:
        if x.numel() == 1 or not x.is_floating_point():
            return x
        return x.detach().to(case.dtype).requires_grad_(x.requires_grad)

    return [cast(x) for x in op.inputs(case, device, seed)]


def measure_errors(runner: _Runner, exact: tuple[Tensor, tuple[Tensor, ...]]) -> None:
    """Relative RMS error of the value and the worst one among the gradients."""
    output, gradients = runner.call()
    runner.measurement.value_error = relative_rms(output.detach(), exact[0].to(output.device))
    if gradients:
        errors = [relative_rms(got, want) for got, want in zip(gradients, exact[1], strict=True)]
        runner.measurement.gradient_error = max(errors)


def measure_memory(runner: _Runner) -> None:
    """Peak of one call over its inputs and their gradients."""
    device = runner.measurement.device
    if device.type == "cuda":
        release()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _, gradients = runner.call()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            _, gradients = runner.call()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
        peak = max(itertools.accumulate(changes), default=0)
    runner.measurement.extra_bytes = max(0, peak - sum(gradient.nbytes for gradient in gradients))


def count_launches(runner: _Runner) -> None:
    """Kernels and copies that one call puts on the GPU; unknown where the profiler is not allowed to see them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        runner.call()
        devices.synchronize(runner.measurement.device)
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    runner.measurement.launches = len(on_gpu) or None


def exact_result(op: Op, case: Case, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """Value and gradients in fp64 of the case's (rounded) inputs, where it is affordable."""
    if op.reference is None or case.rows * case.columns > op.reference_max:
        return None

    def widen(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x

    inputs = [widen(x) for x in make_inputs(op, case, device, seed=0)]
    output = op.reference(*inputs)
    if not op.differentiable:
        return output, ()
    wanted = [x for x in inputs if x.requires_grad]
    direction = _direction(output)
    if direction is not None:  # the same upstream gradient that the variants get, from their output dtype
        direction = _unit_direction(output.shape, torch.float32, device).to(case.dtype).double()
    return output.detach(), torch.autograd.grad(output, wanted, direction)


def input_copies(op: Op, case: Case, device: torch.device) -> list[list[Tensor]]:
    """Enough copies that one call's inputs are out of the L2 cache when their turn comes again."""
    first = make_inputs(op, case, device, seed=0)
    if device.type != "cuda":
        return [first]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = 1 + min(15, 4 * cache // max(1, sum(x.nbytes for x in first)))
    return [first] + [make_inputs(op, case, device, seed=seed) for seed in range(1, count)]


@dataclass(frozen=True)
class Effort:
    """How long to measure: warm-up seconds per case, measuring seconds per variant, rounds, torch.compile or not."""

    warmup: float
    seconds: float
    min_rounds: int
    max_rounds: int
    compiled: bool = True


SMOKE = Effort(warmup=0, seconds=0, min_rounds=1, max_rounds=1, compiled=False)
CPU = Effort(warmup=1, seconds=3, min_rounds=5, max_rounds=50)
GPU = Effort(warmup=2, seconds=2, min_rounds=3, max_rounds=200)


def measure(op: Op, case: Case, device: torch.device, effort: Effort) -> dict[str, Measurement]:
    """Measure every variant that can run this case, interleaved; one Measurement by variant name."""
    torch.compiler.reset()
    release()
    variants = op.present(case, device, compiled=effort.compiled)
    measurements = [Measurement(op, case, variant, device) for variant in variants]
    with bounded_memory(device):
        exact = exact_result(op, case, device)
        copies = input_copies(op, case, device)
        runners = [_Runner(measurement, copies) for measurement in measurements]
        for runner in runners:
            if exact is not None:  # on the first copy, which the reference was computed from
                runner.copies = itertools.cycle(copies)
                runner.attempt(functools.partial(measure_errors, runner, exact))
            else:
                runner.attempt(runner.call)  # compiles before memory is looked at
            runner.attempt(functools.partial(measure_memory, runner))
            if device.type == "cuda":
                runner.attempt(functools.partial(count_launches, runner))
        del exact
        _rounds(runners, effort)
    for measurement in measurements:
        measurement.clocks = devices.clocks(device)
    _unit_direction.cache_clear()
    return {measurement.variant.name: measurement for measurement in measurements}


def _rounds(runners: list[_Runner], effort: Effort) -> None:
    start = time.perf_counter()
    while time.perf_counter() - start < effort.warmup:
        for runner in runners:
            runner.attempt(runner.call)
            devices.synchronize(runner.measurement.device)
        if all(runner.measurement.status != "ok" for runner in runners):
            return
    start, budget = time.perf_counter(), effort.seconds * len(runners)
    for number in range(effort.max_rounds):
        if number >= effort.min_rounds and time.perf_counter() - start > budget:
            break
        shift = number % max(1, len(runners))
        for runner in runners[shift:] + runners[:shift]:
            runner.attempt(runner.sample)
