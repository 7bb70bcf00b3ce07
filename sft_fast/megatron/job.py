"""What a run is made of before there is a model: ranks, data, plan, and where it speaks."""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch.distributed as dist

from sft_fast.config.schema import Config
from sft_fast.megatron.checkpoint.fingerprint import run_fields
from sft_fast.megatron.join import agree, check_is_shared, settings
from sft_fast.megatron.load_inputs import ExportSource, Inputs, read_inputs
from sft_fast.megatron.lora import adapter_fingerprint
from sft_fast.megatron.parallel import Parallel, init_parallel
from sft_fast.metrics.report import length_histogram
from sft_fast.metrics.trackers import check_trackers
from sft_fast.metrics.writer import MetricsWriter
from sft_fast.models.router import router_note
from sft_fast.packing.from_config import make_training_plan
from sft_fast.packing.report import PackingReport, packing_report
from sft_fast.packing.steps import StepPlan
from sft_fast.packing.streaming import StreamPlan
from sft_fast.runtime.phases import Phases
from sft_fast.runtime.rendezvous import public_address_warning
from sft_fast.stages import stage_of


@dataclass(frozen=True)
class Job:
    """A run that is prepared: everything that does not change while it trains."""

    config: Config
    phases: Phases
    """Told what this rank is doing."""
    parallel: Parallel
    metrics: MetricsWriter
    inputs: Inputs
    plan: StepPlan | StreamPlan
    fields: dict[str, str]
    """What the weights and the order of the data depend on; see fingerprint.run_fields."""

    @property
    def output(self) -> Path:
        """The run's directory."""
        return Path(self.config.output_dir)

    @cached_property
    def origin(self) -> ExportSource:
        """What an export of the run comes from."""
        return self.inputs.origin

    @cached_property
    def packing(self) -> PackingReport:
        """How full the packs are; of a stream, what to expect."""
        train = self.config.train
        return packing_report(self.plan.expected(), self.parallel.dp_size, train.micro_batch_size)

    def announce(self) -> None:
        """Says what is known of the run, and writes it to metrics.jsonl.

        Not before the run is known to belong to its directory: a refused one leaves no records.
        """
        parallel, store, metrics = self.parallel, self.inputs.store, self.metrics
        metrics.log(store.summary())
        if note := router_note(self.inputs.model.hf_config, self.config.router):
            metrics.log(f"note: {note}")
        metrics.log(f"packing: {self.packing.brief()}")
        metrics.write("launch", world_size=parallel.world_size, device=parallel.device.type)
        metrics.write("data", **asdict(store.report))
        metrics.write("lengths", **length_histogram(store.lengths))
        metrics.write("packing", **self.packing.record())

    def announce_read(self, data_step: int) -> None:
        """Says what became of the records before a step, where that is known only then."""
        if (report := self.plan.report_before(data_step)) is not None:
            self.metrics.write("data", **asdict(report))
            self.metrics.log(f"read in all, what waits in the buffer included: {report.summary()}")

    def part(self) -> None:
        """Lets the ranks go their own ways; every rank calls it."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def close(self) -> None:
        """Ends the run on all ranks."""
        self.metrics.close()
        self.part()


def prepare(config: Config, phases: Phases) -> Job:
    """Joins the ranks, reads the inputs, and plans which samples make a step.

    Raises:
        ValueError: the config does not fit the data, the model or the world size, or the machines
            disagree about one of them.
    """
    phases.enter("join", can_leave=True)
    parallel = init_parallel(
        config.parallel, config.train, config.seed, settings(config.model_dump())
    )
    check_is_shared(Path(config.output_dir), config.parallel.timeout_minutes * 60)
    check_trackers(config.metrics)
    metrics = MetricsWriter(Path(config.output_dir), parallel.is_main)
    metrics.log(parallel.describe())
    if warning := public_address_warning():
        metrics.log(warning)
    phases.enter("data", can_leave=True)
    inputs = read_inputs(config, metrics.log)
    phases.maps(inputs.mapped_files())
    architecture = inputs.model.architecture
    plan = make_training_plan(
        inputs.store,
        config.packing,
        config.train,
        config.seed,
        architecture,
        stage_of(config).group_size,
    )
    adapters = adapter_fingerprint(config.lora, inputs.model.weights)
    fields = run_fields(
        config.model, config.seed, inputs.store, inputs.tokenizer, plan, architecture, adapters
    )
    agree("inputs", fields, math.inf)
    return Job(config, phases, parallel, metrics, inputs, plan, fields)
