#!/usr/bin/env bash
# Checks and measures everything that needs GPUs. Results go to a folder, one log per stage.
#   bash benchmarks/run_gpu.sh OUT [stage...]
# Stages for one GPU: tests marked sanitizer demo tune tune_block loss head block loader step; for several: ranks faults parallel stall.
# A stage that fails or takes too long does not stop the others; the last lines are a summary.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:?usage: run_gpu.sh OUT [stage...]}"
shift
mkdir -p "$out"
[ $# -gt 0 ] || set -- tests marked sanitizer demo tune tune_block loss head block loader step ranks faults parallel stall
# The fault tests fork their ranks from a server, which must not open the GPU.
export PYTORCH_NVML_BASED_CUDA_CHECK=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

run() { "${PYTHON:-python3}" -m "$@"; }
run_file() { "${PYTHON:-python3}" "$@"; }
check() { run pytest -q -rs -p no:cacheprovider "$@"; }
# A stage that hangs says where.
bench() {
  check -o faulthandler_timeout=120 --benchmark-disable-gc --benchmark-json="$out/$1.json" "${@:2}"
  local code=$?
  run_file benchmarks/slim.py "$out/$1.json"
  return $code
}

stage() {
  case "$1" in
    tests) check tests/kernels tests/test_loss.py \
      tests/packing/test_prefetch.py tests/megatron/test_device.py -m "not slow" -k "not compiles" ;;
    marked) check -m gpu tests/megatron tests/test_train.py tests/packing/test_prefetch.py ;;
    sanitizer) check tests/csrc/test_gpu_sanitizer.py ;;
    demo) run torch.distributed.run sft_fast/train.py "output_dir=$(mktemp -d)" model.dtype=bf16 ;;
    tune) run_file benchmarks/tune_launch.py ;;
    tune_block) run_file benchmarks/tune_block_launch.py ;;
    loss) bench loss benchmarks/bench_masked_cross_entropy.py ;;
    head) bench head benchmarks/bench_masked_linear_cross_entropy.py ;;
    block) bench block benchmarks/bench_block_kernels.py ;;
    loader) bench loader benchmarks/bench_loader.py ;;
    step) bench step benchmarks/bench_training_step.py ;;
    ranks) check tests/megatron/test_layout_invariance.py tests/megatron/attention/test_context_parallel.py \
      tests/megatron/test_experts.py tests/megatron/checkpoint/test_optimizer_shards.py tests/test_train.py ;;
    faults) check tests/faults/test_kills.py -k "torchrun or restarted or signal_to_one" ;;
    parallel) bench parallel benchmarks/bench_parallel.py -k "not stall" ;;
    stall) bench stall benchmarks/bench_parallel.py -k stall ;;
    *) echo "unknown stage $1" && return 2 ;;
  esac
}

export -f run run_file check bench stage
export out
summary=()
for name in "$@"; do
  SECONDS=0
  # An interrupted pytest still reports what it has seen.
  timeout -s INT -k 20 "${STAGE_TIMEOUT:-900}" bash -c "stage $name" >"$out/$name.log" 2>&1
  summary+=("$name: exit $? after ${SECONDS}s: $(tail -n 1 "$out/$name.log")")
done
printf '%s\n' "${summary[@]}"
