"""What follows the last step: the export, the answers of the exported model, the report."""

from transformers.utils.logging import disable_progress_bar

from sft_fast.config.layout import mistaken_for_experts
from sft_fast.evaluation.early_stopping import EarlyStopping
from sft_fast.evaluation.samples import write_samples
from sft_fast.files import write_json
from sft_fast.megatron.checkpoint.load import load_checkpoint
from sft_fast.megatron.checkpoint.train_state import TrainState
from sft_fast.megatron.evaluation import Evaluator, report_exact_match
from sft_fast.megatron.export.adapter import export_adapter
from sft_fast.megatron.export.model import export_model
from sft_fast.megatron.job import Job
from sft_fast.megatron.model import unwrap
from sft_fast.megatron.optim import gather_parameters
from sft_fast.megatron.train_step import Run
from sft_fast.metrics.report import write_report
from sft_fast.runtime.run_files import EXPORTED_FILE, checkpoint_path, export_record
from sft_fast.stages import stage_of

# Of files that are gone or damaged by now; of devices, out of memory among them; of libraries.
NO_FAILURE = (ValueError, OSError, RuntimeError, ImportError)


def export(job: Job, run: Run, evaluator: Evaluator, state: TrainState) -> None:
    """Writes the trained model as a Hugging Face directory, and with LoRA the adapters."""
    config, phases = job.config, job.phases
    phases.enter("export", can_leave=True)
    disable_progress_bar()  # of transformers, for each look at the export
    evaluator.report_best()
    if config.export.best:
        load_best(job, run, state)
    if config.export.enabled:
        gather_parameters(run.model)
        models = [unwrap(chunk) for chunk in run.model]
        folder = job.output / "export"
        export_model(
            models,
            folder,
            job.origin,
            config.model,
            config.export,
            config.output_dir,
            job.parallel,
            phases,
        )
        if config.lora.rank > 0:
            adapter = job.output / "adapter"
            export_adapter(
                run.model,
                adapter,
                job.origin.tokenizer,
                job.origin.model.architecture,
                config.model,
                config.lora,
                config.export,
                job.parallel,
            )
            architecture = job.origin.model.architecture
            if mistaken := mistaken_for_experts(architecture, config.lora.targets):
                job.metrics.log(
                    f"warning: PEFT with transformers 5 takes {mistaken[0]} and its like for "
                    f"matrices of experts, and leaves them out of {adapter}; {folder} has them"
                )
        checkpoint = checkpoint_path(job.output / "checkpoints", state.step)
        if job.parallel.is_main and checkpoint.is_dir():
            write_json(job.output / EXPORTED_FILE, export_record(folder, checkpoint))
        job.metrics.log(f"exported to {folder}")


def load_best(job: Job, run: Run, state: TrainState) -> None:
    """Goes back to the checkpoint of the best evaluation."""
    best = EarlyStopping(**state.early_stopping).best_step
    if best in (0, state.step):
        return
    checkpoint, log = checkpoint_path(job.output / "checkpoints", best), job.metrics.log
    if not checkpoint.is_dir():
        log(f"warning: {checkpoint}, the best one, was not saved; the last weights stay")
        return
    load_checkpoint(checkpoint, run.model, run.optimizer, run.schedule, job.phases.tensor_done)
    log(f"loaded the best weights from {checkpoint}")


def finish(job: Job) -> None:
    """Lets the exported model answer, and draws the report.

    The run is done: the other ranks leave, however long that takes, and nothing in it is a failure.
    """
    config, output, log = job.config, job.output, job.metrics.log
    job.part()
    if not job.parallel.is_main:
        return
    if config.export.enabled and config.evaluation.exact_match_samples > 0:
        try:
            report_exact_match(
                output / "export", job.inputs, config.data, config.evaluation, job.metrics
            )
        except NO_FAILURE as error:
            log(f"warning: no exact match: {error}")
    if config.metrics.pictures:
        draw(job)
    if config.export.enabled and stage_of(config).writes_text:
        log(f"talk to it: sft_fast chat {output}")


def draw(job: Job) -> None:
    """Writes the pictures."""
    config, log = job.config, job.metrics.log
    try:
        if config.metrics.samples > 0:
            write_samples(job.output, config.metrics.samples, config.evaluation.max_new_tokens)
        log(f"pictures: {', '.join(map(str, write_report(job.output)))}")
    except NO_FAILURE as error:
        log(f"warning: report not written: {error}")
