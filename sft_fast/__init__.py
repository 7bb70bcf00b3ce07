"""Supervised fine-tuning on megatron-core: one YAML, one command, loss on trained tokens only.

From the ground up, in the order in which data flows. What has no line of its own belongs to its
folder's; a line imports only what stands above it, and tests/test_imports.py holds that.

    models/choices.py data/choices.py packing/choices.py  what a key of the
    metrics/choices.py evaluation/choices.py  YAML may say, beside the code that does it
    exit_codes.py constants.py redact.py errors.py files.py  codes, secrets, messages, JSON
    kernels/loss_options.py  likewise, of the loss
    registry.py  what users add by name: stages, losses, metrics; how a plugin file is run
    recipes/     configurations to start from
    config/      the YAML: sections, checks, where each value comes from, Primus files
    runtime/     what keeps a run alive: watchdog, hangs, locks, manifests, launcher
    kernels/     what loss, layers and experts compute, by backend; a link to ../kernels
    reference/   oracles: the plainest correct form of kernels and C++
    models/      what a model is, how it is laid out over ranks, what it costs
    data/        records -> conversations -> tokens with a mask -> store
    packing/     store -> packs -> steps -> micro-batches
    loss.py      hidden states -> LM head -> loss of the supervised tokens
    stages.py    what a run trains; supervised fine-tuning, and the base of others
    metrics/     what a run says: log, progress, trackers, curves, report, model card
    evaluation/  answers of the exported model, early stopping
    preflight/   what is said before it costs: machine checks, preview
    megatron/    the model in megatron-core, parallelism, the loop, checkpoints, export
    train.py megatron/pretrain.py  stages, and their start under torchrun
    commands/    the subcommands of `sft_fast`
    cli.py __main__.py  the command line
"""

__version__ = "0.1.0"
